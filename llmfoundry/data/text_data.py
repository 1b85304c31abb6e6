"""Pre-training text: a StreamingDataset of token samples, and its loader.

Samples are tokens cut to one length when the data were prepared (the fast way, and the only one that packs), or raw text that is tokenised here, truncated and padded, for small experiments.
Run as a script, it prints a few batches: ``python llmfoundry/data/text_data.py --local_path ./my-copy-c4 --split val_small``.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any, Mapping, Sequence

import numpy as np
import torch
from composer.core import DataSpec
from streaming import Stream
from transformers import PreTrainedTokenizerBase

from llmfoundry import dist
from llmfoundry.data import shard_checks
from llmfoundry.data import streams as stream_settings
from llmfoundry.data.dataloader import TextDataLoader, loader_arguments
from llmfoundry.data.elastic_streaming import ElasticStreamingDataset
from llmfoundry.data.preview import print_batches
from llmfoundry.data.sample_ids import Sample
from llmfoundry.data.text_collators import ConcatenatedSequenceCollatorWrapper, build_text_collator
from llmfoundry.errors import ConfigError, ConfigProblem, DataError, NotEnoughDatasetSamplesError
from llmfoundry.registry import collators, construct_from_registry, data_specs, dataset_replication_validators
from llmfoundry.tokenizers.build import build_tokenizer, num_token_ids

__all__ = ['ConcatenatedSequenceCollatorWrapper', 'StreamingTextDataset', 'SUPPORTED_MDS_ENCODING_TYPES', 'build_text_collator', 'build_text_dataloader']

log = logging.getLogger(__name__)

SUPPORTED_MDS_ENCODING_TYPES = ['int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64']

# Keys of a `dataset` block that are the loader's, not the dataset's.
LOADER_DATASET_KEYS = (
    'bos_token_id', 'eos_token_id', 'mlm_probability', 'override_bos_token_id_mismatch_error', 'override_eos_token_id_mismatch_error', 'seq_parallel_replication',
)
_OWN_DATASET_KEYS = ('max_seq_len', 'token_encoding_type')
# Given by the loader, so not keys of the block.
_FILLED_IN = ('tokenizer', 'batch_size')


def dataset_keys() -> set[str]:
    """Every key that the `dataset` block of a `text` loader may have."""
    return (set(stream_settings.streaming_argument_names()) | set(_OWN_DATASET_KEYS) | set(LOADER_DATASET_KEYS)) - set(_FILLED_IN)


class StreamingTextDataset(ElasticStreamingDataset):
    """Samples of ``max_seq_len`` tokens from MDS shards.

    A sample is ``{'input_ids', 'attention_mask'}``, int64 tensors ``(max_seq_len,)``. The column ``text``, if there is one, is tokenised, truncated and padded;
    otherwise the column ``tokens`` holds ids (an ndarray, or bytes of ``token_encoding_type``) and is cut to ``max_seq_len``.

    Args:
        tokenizer: tokenises ``text``, and bounds the ids of ``tokens``.
        max_seq_len: tokens per sample.
        token_encoding_type: type of the ids where ``tokens`` is stored as bytes.
        streams: several sources, mixed by proportion, repeat or choose.
        **streaming_arguments: every other argument of StreamingDataset, under its own name. ``num_canonical_nodes`` and ``shuffle_block_size`` have fixed defaults
            here (see ``streams``), so that the order of samples does not depend on the machine.

    Raises:
        ConfigError: (a ValueError) arguments that are unknown or make no sense.
        DataError: (a ValueError) files that are missing, damaged or of the wrong kind, with the remedy.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int,
        token_encoding_type: str = 'int64',
        streams: Sequence[Stream] | None = None,
        **streaming_arguments: Any,
    ) -> None:
        problems = stream_settings.unknown_key_problems(streaming_arguments, stream_settings.streaming_argument_names(), 'dataset')
        if isinstance(max_seq_len, bool) or not isinstance(max_seq_len, (int, float)) or max_seq_len != int(max_seq_len) or max_seq_len < 1:
            problems.append(ConfigProblem('dataset.max_seq_len', f'must be a whole number of tokens of at least 1, got {max_seq_len!r}'))
        if token_encoding_type not in SUPPORTED_MDS_ENCODING_TYPES:
            problems.append(ConfigProblem('dataset.token_encoding_type', f'must be one of {", ".join(SUPPORTED_MDS_ENCODING_TYPES)}, got {token_encoding_type!r}'))
        arguments = stream_settings.with_cache_folder(stream_settings.with_order_defaults(streaming_arguments))
        problems += stream_settings.order_problems(arguments)
        local, remote = arguments.get('local'), arguments.get('remote')
        if bool(streams) == bool(local or remote):
            problems.append(ConfigProblem('dataset', f'give either `streams` or `local`/`remote`, got {"both" if streams else "neither"}'))
        if problems:
            raise ConfigError(problems)

        self.tokenizer = tokenizer
        self.max_seq_len = int(max_seq_len)
        self.token_encoding_type = token_encoding_type
        self._vocab_size = num_token_ids(tokenizer)
        super().__init__(streams=streams, **arguments)
        columns = {shard_checks.check_columns(self.folder_of(s), shard_checks.read_index(self.folder_of(s)), self.max_seq_len) for s in self.streams}
        if 'text' in columns and tokenizer.pad_token_id is None:
            raise shard_checks.UnusableColumnsError(
                f'the samples are raw text, which is padded to max_seq_len {self.max_seq_len}, but the tokenizer has no pad token. '
                f"Set tokenizer.kwargs.pad_token: '{tokenizer.eos_token}', or prepare the data with --concat_tokens {self.max_seq_len}",
                file=self.folder_of(self.streams[0]),
            )

    def check_folder(self, folder: str, index: Mapping[str, Any]) -> None:
        """The samples must hold ``text``, or ``tokens`` of enough length."""
        shard_checks.check_columns(folder, index, self.max_seq_len)

    def decode(self, sample: dict[str, Any], path: str, position: int) -> dict[str, torch.Tensor]:
        """The sample as tensors."""
        return self._tokenize(sample['text']) if 'text' in sample else self._read_tokens(sample['tokens'], path, position)

    def idle_sample(self) -> Sample:
        """A row of which one token is read and none is trained."""
        mask = torch.zeros(self.max_seq_len, dtype=torch.int64)
        # One real position, since attention over a row that is padding alone is not defined for every model.
        mask[0] = 1
        return Sample({'input_ids': torch.zeros(self.max_seq_len, dtype=torch.int64), 'attention_mask': mask}, ())

    def _tokenize(self, text: str | bytes) -> dict[str, torch.Tensor]:
        text = text.decode('utf-8') if isinstance(text, bytes) else text
        encoded = self.tokenizer(text, truncation=True, padding='max_length', max_length=self.max_seq_len)
        return {key: torch.tensor(encoded[key], dtype=torch.int64) for key in ('input_ids', 'attention_mask')}

    def _read_tokens(self, tokens: bytes | np.ndarray, path: str, position: int) -> dict[str, torch.Tensor]:
        if isinstance(tokens, bytes):
            item_bytes = np.dtype(self.token_encoding_type).itemsize
            if len(tokens) % item_bytes:
                raise DataError(f'{len(tokens)} bytes are not whole {self.token_encoding_type} ids. Set token_encoding_type to the type that the data were written with', file=path, sample=position)
            tokens = np.frombuffer(tokens, dtype=self.token_encoding_type)
        if len(tokens) < self.max_seq_len:
            raise DataError(f'{len(tokens)} tokens, fewer than max_seq_len {self.max_seq_len}. Set max_seq_len to at most {len(tokens)}, or prepare the data with --concat_tokens {self.max_seq_len}', file=path, sample=position)
        ids = np.asarray(tokens[: self.max_seq_len]).astype(np.int64)
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= self._vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise DataError(
                f'token id {wrong} is outside the {self._vocab_size} ids of the tokenizer. Use the tokenizer that the data were prepared with'
                f'{"" if self.token_encoding_type == "int64" else ", and its token_encoding_type"}',
                file=path,
                sample=position,
            )
        return {'input_ids': torch.from_numpy(ids), 'attention_mask': torch.ones(self.max_seq_len, dtype=torch.int64)}


def check_separator_ids(dataset_cfg: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """The separators that a dataset names must be the tokenizer's.

    Raises:
        ConfigError: (a ValueError) they differ, or both are given. ``override_{eos,bos}_token_id_mismatch_error`` turns a difference into a warning.
    """
    problems = []
    given = {kind: dataset_cfg[f'{kind}_token_id'] for kind in ('eos', 'bos') if dataset_cfg.get(f'{kind}_token_id') is not None}
    if len(given) == 2:
        problems.append(ConfigProblem('dataset.bos_token_id', 'give only one of eos_token_id and bos_token_id, since one token separates documents'))
    for kind, dataset_id in given.items():
        tokenizer_id = getattr(tokenizer, f'{kind}_token_id', None)
        if dataset_id == tokenizer_id:
            continue
        text = f'{dataset_id} is not the {kind}_token_id of the tokenizer, {tokenizer_id}'
        override = f'override_{kind}_token_id_mismatch_error'
        if dataset_cfg.get(override):
            warnings.warn(f'dataset.{kind}_token_id: {text}; going on because {override} is true')
        else:
            problems.append(ConfigProblem(f'dataset.{kind}_token_id', f'{text}. Set it to {tokenizer_id}, or {override}: true if the data were prepared with another tokenizer'))
    if problems:
        raise ConfigError(problems)


def build_text_dataloader(
    tokenizer: PreTrainedTokenizerBase,
    device_batch_size: int | float,
    dataset: Mapping[str, Any],
    drop_last: bool,
    num_workers: int,
    pin_memory: bool = True,
    prefetch_factor: int | None = 2,
    persistent_workers: bool = True,
    timeout: float = 0,
) -> DataSpec:
    """Registry entry ``text``: the loader for pre-training text.

    Args:
        tokenizer: the tokenizer of the model.
        device_batch_size: samples per device and step.
        dataset: the `dataset` block: ``max_seq_len``, every argument of StreamingDataset, ``streams``, ``eos_token_id`` or ``bos_token_id``, ``mlm_probability``.
        drop_last: leave out a last batch that is not full.
        num_workers: loading processes per rank; 0 loads in the training process.
        pin_memory: put batches where copies to a GPU are fast.
        prefetch_factor: batches that each worker prepares ahead.
        persistent_workers: keep workers between epochs.
        timeout: seconds to wait for a batch, 0 for ever.

    Returns:
        A DataSpec whose batches hold ``input_ids``, ``labels`` (not shifted), ``attention_mask``, each int64 ``(batch, seq)``, ``sequence_id`` if a separator is given, and
        ``total_tokens`` and ``loss_generating_tokens``, lists of one int for each row, and ``sample_ids`` (see the module of that name).

    Raises:
        ConfigError: (a ValueError) keys or values that make no sense.
        DataError: (a ValueError) data that cannot be used.
        NotEnoughDatasetSamplesError: fewer samples than one global batch, with ``drop_last``.
    """
    if tokenizer is None:
        raise ConfigError([ConfigProblem('tokenizer', f'the text loader needs one: add tokenizer.name, for example llmfoundry://gpt2, or a Hugging Face name; got {tokenizer}')])
    problems = stream_settings.unknown_key_problems(dataset, dataset_keys(), 'dataset')
    if 'max_seq_len' not in dataset:
        problems.append(ConfigProblem('dataset.max_seq_len', 'is missing: the number of tokens per sample'))
    if problems:
        raise ConfigError(problems)
    check_separator_ids(dataset, tokenizer)

    validator = {'dataset_cfg': dataset, 'tokenizer': tokenizer, 'device_batch_size': device_batch_size}
    replication, dataset_batch_size = construct_from_registry('dataset_replication_validator', dataset_replication_validators, partial_function=False, kwargs=validator)
    collator = {'dataloader_cfg': {'dataset': dataset}, 'tokenizer': tokenizer, 'dataset_batch_size': dataset_batch_size}
    collate_fn, loader_batch_size = construct_from_registry('text_collator', collators, partial_function=False, kwargs=collator)
    arguments = {key: value for key, value in dataset.items() if key not in (*LOADER_DATASET_KEYS, 'streams', 'replication')}
    if dataset.get('streams') is not None:
        arguments['streams'] = stream_settings.build_streams(dataset['streams'])
    text_dataset = StreamingTextDataset(tokenizer=tokenizer, batch_size=dataset_batch_size, replication=replication if replication > 1 else None, **arguments)
    text_dataset.drop_last = drop_last
    _check_enough_samples(text_dataset, dataset, dataset_batch_size, drop_last)
    loader = TextDataLoader(
        text_dataset,
        collate_fn=collate_fn,
        batch_size=loader_batch_size,
        drop_last=drop_last,
        **loader_arguments(num_workers, pin_memory, prefetch_factor, persistent_workers, timeout),
    )
    return construct_from_registry('data_spec', data_specs, partial_function=False, kwargs={'dl': loader, 'dataset_cfg': dataset})


def _check_enough_samples(text_dataset: StreamingTextDataset, dataset_cfg: Mapping[str, Any], batch_size: int, drop_last: bool) -> None:
    world_size = dist.get_world_size()
    needed = world_size * batch_size
    if drop_last and text_dataset.epoch_size < needed:
        first = text_dataset.streams[0]
        raise NotEnoughDatasetSamplesError(
            dataset_name=str(first.remote or first.local),
            split=first.split or dataset_cfg.get('split'),
            dataloader_batch_size=batch_size,
            world_size=world_size,
            full_dataset_size=text_dataset.epoch_size,
            minimum_dataset_size=needed,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Prints five batches of a dataset; the command of the README."""
    parser = argparse.ArgumentParser(description='Print five batches of a dataset, to see that it can be read.')
    parser.add_argument('--tokenizer', default='EleutherAI/gpt-neox-20b', help='the tokenizer that the data were prepared with; llmfoundry://gpt2 is shipped (default: %(default)s)')
    parser.add_argument('--local_path', required=True, help='the folder that holds the splits, or where to keep what is streamed')
    parser.add_argument('--remote_path', default=None, help='where to stream from: a folder or an object store URI')
    parser.add_argument('--split', default='val', help='(default: %(default)s)')
    parser.add_argument('--max_seq_len', type=int, default=32, help='tokens per sample (default: %(default)s)')
    args = parser.parse_args(argv)
    batch_size = 2
    try:
        tokenizer = build_tokenizer(args.tokenizer, {'model_max_length': args.max_seq_len})
        # Only to look at raw text, which has to be padded to some length.
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        dataset = {'local': args.local_path, 'remote': args.remote_path, 'split': args.split, 'shuffle': False, 'max_seq_len': args.max_seq_len, 'keep_zip': True}
        spec = build_text_dataloader(tokenizer, batch_size, dataset, drop_last=False, num_workers=0, pin_memory=False)
        print_batches(spec.dataloader, tokenizer)
    except (ConfigError, DataError) as e:
        raise SystemExit(f'error: {e}') from None


if __name__ == '__main__':
    main()
