"""The ``finetuning`` loader: from a ``dataset`` block to batches in which exactly the wanted tokens are trained.

Hugging Face datasets and local files are tokenised once into a memory-mapped store, and their rows planned for the whole data set (``packed_dataset``); MDS shards are streamed, and packed batch by
batch. Run as a script, it prints a few batches, context and trained tokens in different colours: ``python llmfoundry/data/finetuning/dataloader.py --hf_name json --data_files train.jsonl``.
"""

from __future__ import annotations

import argparse
import difflib
import logging
from itertools import islice
from typing import Any, Callable, Mapping, Sequence

from composer.core import DataSpec
from transformers import PreTrainedTokenizerBase

from llmfoundry import dist
from llmfoundry.data import streams as stream_settings
from llmfoundry.data.batch_stats import CROSS_ENTROPY_IGNORE_INDEX
from llmfoundry.data.dataloader import loader_arguments
from llmfoundry.data.finetuning import preprocessing
from llmfoundry.data.finetuning.collator import PackingCollator, Seq2SeqFinetuningCollator
from llmfoundry.data.finetuning.dataset_block import FinetuningDataBlock, asks_for_packing, normalise, problems, unknown_keys
from llmfoundry.data.finetuning.hf_dataset import build_token_store
from llmfoundry.data.finetuning.packed_dataset import GlobalBatchSampler, PackedDataset, PackedLoader, plan_rows
from llmfoundry.data.finetuning.streaming_dataset import StreamingFinetuningDataset, StreamingFinetuningLoader, streaming_keys
from llmfoundry.data.packing_profile import integer_ratio
from llmfoundry.errors import ConfigError, ConfigProblem, DataError, MissingHuggingFaceURLSplitError, NotEnoughDatasetSamplesError, UserError
from llmfoundry.registry import collators, construct_from_registry, data_specs, dataset_replication_validators
from llmfoundry.tokenizers.build import build_tokenizer

__all__ = ['build_collate_fn', 'build_finetuning_dataloader']

log = logging.getLogger(__name__)

_PROFILED_EXAMPLES = 2000
LoaderArguments = dict[str, Any]


def build_finetuning_dataloader(
    tokenizer: PreTrainedTokenizerBase | None,
    device_batch_size: int | float,
    dataset: Mapping[str, Any],
    num_workers: int,
    drop_last: bool = False,
    pin_memory: bool = True,
    prefetch_factor: int | None = 2,
    persistent_workers: bool = True,
    timeout: float = 0,
) -> DataSpec:
    """Registry entry ``finetuning``.

    Args:
        tokenizer: the tokenizer of the model. Without a pad token it gets its end token as one, since rows are padded by mask.
        device_batch_size: rows per device and step.
        dataset: the `dataset` block; see ``dataset_block``.
        num_workers: loading processes per rank; 0 loads in the training process.
        drop_last: leave out a last batch that is not full.
        pin_memory: put batches where copies to a GPU are fast.
        prefetch_factor: batches that each worker prepares ahead.
        persistent_workers: keep workers between epochs.
        timeout: seconds to wait for a batch, 0 for ever.

    Returns:
        A DataSpec whose batches are those of ``collator.assemble``.

    Raises:
        ConfigError: (a ValueError) keys or values that make no sense.
        MissingHuggingFaceURLSplitError: a Hugging Face source without ``split``, if nothing else is wrong.
        NotImplementedError: packed rows for an encoder-decoder model, or sequence parallelism.
        UserError, DataError: data that cannot be used.
        NotEnoughDatasetSamplesError: fewer rows than one global batch, with ``drop_last``.
    """
    tokenizer = _checked_tokenizer(tokenizer)
    _check_block(dataset)
    validator = {'dataset_cfg': dataset, 'tokenizer': tokenizer, 'device_batch_size': device_batch_size}
    replication, dataset_batch_size = construct_from_registry('dataset_replication_validator', dataset_replication_validators, partial_function=False, kwargs=validator)
    block = normalise(dataset, preprocessing.registered_names())
    if block.max_leftover_bins_to_keep is not None:
        log.debug('dataset.max_leftover_bins_to_keep: what does not fit into a batch is never dropped here, whatever this is')
    arguments = loader_arguments(num_workers, pin_memory, prefetch_factor, persistent_workers, timeout)
    _check_preprocessing_fn(block)
    if block.is_streaming:
        loader = _streaming_loader(tokenizer, dataset, block, dataset_batch_size, replication, {'drop_last': drop_last, **arguments})
    else:
        loader = _stored_loader(tokenizer, dataset, block, dataset_batch_size, drop_last, arguments)
    return construct_from_registry('data_spec', data_specs, partial_function=False, kwargs={'dl': loader, 'dataset_cfg': dataset})


def _checked_tokenizer(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ConfigError([ConfigProblem('tokenizer', 'the finetuning loader needs one: add tokenizer.name, for example llmfoundry://gpt2, or a Hugging Face name; got None')])
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ConfigError([ConfigProblem('tokenizer', 'has neither a pad token nor an end token to fill rows with. Set tokenizer.kwargs.pad_token')])
        log.info('The tokenizer has no pad token; rows are filled up with its end token %r, which the attention mask hides', tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _check_block(dataset: Mapping[str, Any]) -> None:
    """Raises what is wrong with the block."""
    found = problems(dataset, streaming_keys())
    if [key for key, _ in found] == ['split']:
        raise MissingHuggingFaceURLSplitError()
    if found and {key for key, _ in found} <= {'packing', 'packing_ratio'} and asks_for_packing(dataset) and dataset.get('decoder_only_format') is False:
        raise NotImplementedError(f'dataset.{found[0][0]}: {found[0][1]}')
    found += _unregistered_name(dataset)
    if found:
        raise ConfigError([ConfigProblem(f'dataset.{key}'.rstrip('.'), text) for key, text in found])
    others = unknown_keys(dataset, streaming_keys())[1]
    if others:
        log.warning('dataset: unknown keys that have no effect: %s', ', '.join(others))


def _unregistered_name(dataset: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Document 000's ``name`` of rows that are not streamed says how they are read, so there must be a function of that name."""
    name, names = dataset.get('name'), preprocessing.registered_names()
    if name is None or name in names or ':' in str(name) or any(dataset.get(key) for key in ('hf_name', 'local', 'remote', 'streams')):
        return []
    near = difflib.get_close_matches(str(name), names, 1)
    hint = f' (did you mean {near[0]!r}?)' if near else ''
    return [('name', f'no preprocessing function is registered as {name!r}{hint}. Register one, or if the rows hold prompt and response already, use `hf_name`. Registered: {", ".join(names)}')]


def _check_preprocessing_fn(block: FinetuningDataBlock) -> None:
    """A function that cannot be found is a mistake in the config; only its text is looked up here, nothing is called."""
    if block.is_streaming or block.preprocessing_fn is None:
        return
    try:
        preprocessing.resolve_preprocessing_fn(block.preprocessing_fn, block.hf_name)
    except ValueError as e:
        raise ConfigError([ConfigProblem('dataset.preprocessing_fn', str(e))]) from e


def build_collate_fn(dataloader_cfg: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, dataset_batch_size: int) -> tuple[Callable[[Sequence[Any]], dict[str, Any]], int]:
    """Registry entry ``finetuning_collator``.

    Args:
        dataloader_cfg: the loader block; its ``dataset`` is read. A ``packing_ratio`` of streaming data must be a number by now.
        tokenizer: the tokenizer.
        dataset_batch_size: rows of a batch.

    Returns:
        The collate function and the number of items that it takes: examples where it packs, else rows.
    """
    block = normalise(dataloader_cfg['dataset'], preprocessing.registered_names())
    collator = Seq2SeqFinetuningCollator(
        tokenizer,
        block.max_seq_len,
        block.decoder_only_format,
        target_responses=block.target_responses,
        target_prompts=block.target_prompts,
        allow_pad_trimming=block.allow_pad_trimming,
        pad_to_longest=block.pad_to_longest,
        allow_no_target=block.is_streaming,
    )
    if not block.is_streaming or block.packing is None:
        return collator, dataset_batch_size
    return PackingCollator(collator), int(dataset_batch_size * float(block.packing))


def _collate_fn(dataset: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, batch_size: int) -> tuple[Callable[[Sequence[Any]], dict[str, Any]], int]:
    kwargs = {'dataloader_cfg': {'name': 'finetuning', 'dataset': dataset}, 'tokenizer': tokenizer, 'dataset_batch_size': batch_size}
    return construct_from_registry('finetuning_collator', collators, partial_function=False, kwargs=kwargs)


def _stored_loader(
    tokenizer: PreTrainedTokenizerBase, dataset: Mapping[str, Any], block: FinetuningDataBlock, device_rows: int, drop_last: bool, arguments: LoaderArguments
) -> PackedLoader:  # fmt: skip
    """The loader over a token store."""
    assert block.hf_name is not None
    collate_fn, device_rows = _collate_fn(dataset, tokenizer, device_rows)
    store = build_token_store(
        tokenizer,
        block.hf_name,
        block.split,
        max_seq_len=block.max_seq_len,
        hf_kwargs=block.hf_kwargs,
        preprocessing_fn=block.preprocessing_fn,
        safe_load=block.safe_load,
        target_prompts=block.target_prompts,
        target_responses=block.target_responses,
        decoder_only_format=block.decoder_only_format,
    )
    global_rows = device_rows * dist.get_world_size()
    bins = plan_rows(store.lengths, block.max_seq_len, block.packing, global_rows, block.shuffle, block.shuffle_seed)
    rows = PackedDataset(store, bins, block.max_seq_len, as_examples=not isinstance(collate_fn, Seq2SeqFinetuningCollator))
    sampler = GlobalBatchSampler(rows, device_rows, block.shuffle, block.shuffle_seed, drop_last)
    if drop_last and len(rows) < global_rows:
        raise NotEnoughDatasetSamplesError(
            dataset_name=block.hf_name if block.packing is None else f'{block.hf_name}, {len(store)} examples packed into rows',
            split=block.split,
            dataloader_batch_size=device_rows,
            world_size=dist.get_world_size(),
            full_dataset_size=len(rows),
            minimum_dataset_size=global_rows,
        )
    if block.packing is not None:
        log.info('%s: %d examples in %d rows of %d tokens, %.1f %% of them filled; %d batches per epoch', store.source, len(store), len(rows), block.max_seq_len, 100 * rows.fill, len(sampler))
    return PackedLoader(rows, collate_fn=collate_fn, **arguments)


def _streaming_loader(
    tokenizer: PreTrainedTokenizerBase, dataset: Mapping[str, Any], block: FinetuningDataBlock, device_rows: int, replication: int, arguments: LoaderArguments
) -> StreamingFinetuningLoader:  # fmt: skip
    """The loader over MDS shards."""
    streams = stream_settings.build_streams(block.streams) if block.streams is not None else None
    examples = StreamingFinetuningDataset(
        tokenizer,
        max_seq_len=block.max_seq_len,
        streams=streams,
        preprocessing_fn=_streaming_preprocessing_fn(block),
        batch_size=device_rows,
        replication=replication if replication > 1 else None,
        **{key: value for key, value in block.streaming.items() if key in (*streaming_keys(), 'token_encoding_type')},
    )
    if block.packing is not None:
        ratio = _streaming_ratio(examples, block, tokenizer, examples.samples_per_step)
        dataset = {**{key: value for key, value in dataset.items() if key != 'packing'}, 'packing_ratio': ratio}
    global_rows = examples.samples_per_step
    collate_fn, examples_per_batch = _collate_fn(dataset, tokenizer, device_rows)
    if isinstance(collate_fn, PackingCollator):
        # From the global batch, so that a ratio with a fraction makes steps of the same examples for any number of ranks; these may get one more or less of them.
        examples.global_batch = int(global_rows * ratio)
        examples_per_batch = -(-examples.global_batch * device_rows // global_rows)
    examples.batch_size, examples.drop_last = examples_per_batch, bool(arguments['drop_last'])
    return StreamingFinetuningLoader(examples, is_packed=block.packing is not None, collate_fn=collate_fn, batch_size=examples_per_batch, **arguments)


def _streaming_preprocessing_fn(block: FinetuningDataBlock) -> preprocessing.PreprocessingFn | None:
    """Document 000's ``name``; only rows that are no examples yet are put through it."""
    name = block.preprocessing_fn
    if name is None or (name not in preprocessing.registered_names() and ':' not in name):
        if name is not None:
            log.info('dataset.name: no preprocessing function is registered as %r, so the shards must hold finished examples', name)
        return None
    return preprocessing.resolve_preprocessing_fn(name, None)


def _streaming_ratio(examples: StreamingFinetuningDataset, block: FinetuningDataBlock, tokenizer: PreTrainedTokenizerBase, global_rows: int) -> float:
    """The packing ratio of streaming data: the user's, or the most whole examples per row that fit, from the first samples.

    It is made for the rows of all ranks together, so that each global batch holds the same examples for any number of ranks.
    """
    if isinstance(block.packing, (int, float)):
        effective = int(global_rows * block.packing) / global_rows
        if effective != block.packing:
            log.warning('dataset.packing_ratio: %g examples per row make no whole number for %d rows per batch; %g it is', block.packing, global_rows, effective)
        return float(block.packing)
    reader = Seq2SeqFinetuningCollator(tokenizer, block.max_seq_len, True, block.target_responses, block.target_prompts, allow_no_target=True)
    lengths = [len(reader.document(examples[i]).ids) for i in range(min(_PROFILED_EXAMPLES, examples.num_samples))]
    ratio = dist.all_reduce_min(integer_ratio(lengths, global_rows, block.max_seq_len))
    log.info('Packing: %d examples per row, from the lengths of %d examples (%.0f tokens on average)', ratio, len(lengths), sum(lengths) / max(1, len(lengths)))
    return ratio


_CONTEXT, _TARGET, _END = '\033[36m', '\033[1;32m', '\033[0m'


def _coloured_rows(batch: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each row without padding: what is only read in cyan, what is trained in bold green."""
    rows = []
    for ids, labels, mask in zip(batch['input_ids'], batch['labels'], batch['attention_mask'], strict=True):
        pieces, start, trained = [], 0, (labels != CROSS_ENTROPY_IGNORE_INDEX).tolist()
        ids, trained = ids[mask.bool()].tolist(), [t for t, m in zip(trained, mask.tolist(), strict=True) if m]
        for end in range(1, len(ids) + 1):
            if end == len(ids) or trained[end] != trained[start]:
                pieces.append(f'{_TARGET if trained[start] else _CONTEXT}{tokenizer.decode(ids[start:end])}{_END}')
                start = end
        rows.append(''.join(pieces))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Prints five batches of a dataset."""
    parser = argparse.ArgumentParser(description='Print five batches of a finetuning dataset: what is only read in cyan, what is trained in bold green.')
    parser.add_argument('--tokenizer', default='llmfoundry://gpt2', help='(default: %(default)s)')
    parser.add_argument('--hf_name', default=None, help='Hugging Face dataset, local folder, or json, csv or parquet with --data_files')
    parser.add_argument('--data_files', nargs='+', default=None, help='local files or URIs')
    parser.add_argument('--local_path', default=None, help='folder of MDS shards, or where to keep what is streamed from --remote_path')
    parser.add_argument('--remote_path', default=None)
    parser.add_argument('--split', default='train', help='(default: %(default)s)')
    parser.add_argument('--preprocessing_fn', default=None, help='registered name or module:function')
    parser.add_argument('--max_seq_len', type=int, default=2048, help='tokens per row (default: %(default)s)')
    parser.add_argument('--packing', action='store_true', help='several examples in each row')
    args = parser.parse_args(argv)
    given = {'hf_name': args.hf_name, 'hf_kwargs': {'data_files': args.data_files} if args.data_files else None, 'preprocessing_fn': args.preprocessing_fn, 'local': args.local_path, 'remote': args.remote_path}
    dataset = {key: value for key, value in given.items() if value is not None}
    dataset |= {'split': args.split, 'max_seq_len': args.max_seq_len, 'decoder_only_format': True, 'shuffle': False}
    if args.packing:
        dataset['packing_ratio'] = 'auto'
    try:
        tokenizer = build_tokenizer(args.tokenizer, {'model_max_length': args.max_seq_len})
        spec = build_finetuning_dataloader(tokenizer, 2, dataset, num_workers=0, pin_memory=False)
        for number, batch in enumerate(islice(spec.dataloader, 5)):
            print(f'{"#" * 20} Batch {number}: {tuple(batch["input_ids"].shape)}, {sum(batch["total_tokens"])} tokens, {sum(batch["loss_generating_tokens"])} of them trained {"#" * 20}')
            for row, text in enumerate(_coloured_rows(batch, tokenizer)):
                print(f'{"-" * 20} Row {row} {"-" * 20}\n{text}')
    except (ConfigError, DataError, UserError) as e:
        raise SystemExit(f'error: {e}') from None


if __name__ == '__main__':
    main()
