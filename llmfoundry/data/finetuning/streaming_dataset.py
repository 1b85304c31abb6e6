"""Finetuning examples from MDS shards, tokenised before or read here.

The order is Streaming's, made independent of the machine as for pre-training text. A sample is one example whatever the packing: rows are made when a batch is collated, from the examples of that
batch alone, so that a position in the data is a number of examples and a resumed run reads on exactly there.
"""

from __future__ import annotations

import json
import logging
from typing import Any, Iterator, Mapping, Sequence

import numpy as np
import torch
from streaming import Stream
from transformers import PreTrainedTokenizerBase

from llmfoundry import dist
from llmfoundry.data import streams as stream_settings
from llmfoundry.data.dataloader import TextDataLoader
from llmfoundry.data.elastic_streaming import ElasticStreamingDataset
from llmfoundry.data.finetuning import preprocessing
from llmfoundry.data.finetuning.collator import PackedRow, with_idle_rows
from llmfoundry.data.finetuning.tokenization import tokenize_formatted_example
from llmfoundry.data.shard_checks import UnusableColumnsError
from llmfoundry.errors import ConfigError, ConfigProblem, DataError, DatasetTooSmallError, UserError
from llmfoundry.tokenizers.build import num_token_ids

__all__ = ['StreamingFinetuningDataset', 'StreamingFinetuningLoader', 'TOKEN_ENCODING_TYPES', 'streaming_keys']

log = logging.getLogger(__name__)

TOKEN_ENCODING_TYPES = ('int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64')
_TOKENISED_COLUMNS = ({'turns'}, {'input_ids', 'labels'})
_RAW_COLUMNS = ({'prompt', 'response'}, {'prompt', 'completion'}, {'messages'})
_IGNORE_INDEX = -100


def streaming_keys() -> tuple[str, ...]:
    """Arguments of the installed StreamingDataset."""
    return stream_settings.streaming_argument_names()


class StreamingFinetuningDataset(ElasticStreamingDataset):
    """Examples ``{'turns': [{'input_ids', 'labels'}, ...]}`` from MDS shards.

    The columns are ``turns``, or ``input_ids`` and ``labels`` (an ndarray, a list, or bytes of ``token_encoding_type``), or text: ``prompt`` and ``response``, or ``messages``, which are tokenised here.
    With a preprocessing function the columns may be any, unless they are one of these.

    Args:
        tokenizer: tokenises text, and bounds the ids of tokens.
        token_encoding_type: type of the ids where they are stored as bytes.
        max_seq_len: tokens of a row; here only what Composer asks a dataset for. Longer examples are cut when they are collated.
        streams: several sources, mixed by proportion, repeat or choose.
        packing_ratio: examples per row, for loaders other than ours, which count rows; ours counts examples.
        preprocessing_fn: makes a formatted example of a row.
        **streaming_arguments: every other argument of StreamingDataset, under its own name.

    Raises:
        ConfigError: (a ValueError) arguments that are unknown or make no sense.
        DataError: (a ValueError) files that are missing, damaged or of the wrong kind.
        DatasetTooSmallError: fewer samples than nodes or canonical nodes.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        token_encoding_type: str = 'int64',
        max_seq_len: int = 2048,
        streams: Sequence[Stream] | None = None,
        packing_ratio: float | None = None,
        preprocessing_fn: preprocessing.PreprocessingFn | None = None,
        **streaming_arguments: Any,
    ) -> None:
        problems = stream_settings.unknown_key_problems(streaming_arguments, streaming_keys(), 'dataset')
        if token_encoding_type not in TOKEN_ENCODING_TYPES:
            problems.append(ConfigProblem('dataset.token_encoding_type', f'must be one of {", ".join(TOKEN_ENCODING_TYPES)}, got {token_encoding_type!r}'))
        if streaming_arguments.get('remote') and not streaming_arguments.get('local'):
            problems.append(ConfigProblem('dataset.remote', f'needs `local` too: the folder where the shards of {streaming_arguments["remote"]} are kept'))
        arguments = stream_settings.with_order_defaults(streaming_arguments)
        problems += stream_settings.order_problems(arguments)
        if bool(streams) == bool(arguments.get('local') or arguments.get('remote')):
            problems.append(ConfigProblem('dataset', f'give either `streams` or `local`/`remote`, got {"both" if streams else "neither"}'))
        if problems:
            raise ConfigError(problems)
        self.tokenizer = tokenizer
        self.token_encoding_type = token_encoding_type
        self.max_seq_len = int(max_seq_len)
        self.packing_ratio = packing_ratio
        self.preprocessing_fn = preprocessing_fn
        self._num_ids = num_token_ids(tokenizer)
        # Examples that our loader has handed out in the present iteration, over all ranks.
        self.examples_out: int | None = None
        super().__init__(streams=streams, **arguments)
        self._check_size()

    def _check_size(self) -> None:
        nodes = max(1, dist.get_world_size() // dist.get_local_world_size())
        samples = sum(self.samples_per_stream) if hasattr(self, 'samples_per_stream') else self.num_samples
        for count, what in ((nodes, 'nodes'), (self.num_canonical_nodes or 1, 'num_canonical_nodes')):
            if samples < count:
                raise DatasetTooSmallError(f'it has {samples} samples, fewer than {count} {what}. Add data, or lower {what}')

    def check_folder(self, folder: str, index: Mapping[str, Any]) -> None:
        """The columns must hold examples, tokenised or as text."""
        known = (*_TOKENISED_COLUMNS, *_RAW_COLUMNS)
        for shard in index['shards']:
            columns = set(shard.get('column_names', ()))
            if self.preprocessing_fn is None and not any(form <= columns for form in known):
                raise UnusableColumnsError(
                    f'the columns are {", ".join(sorted(columns)) or "none"}, but a finetuning dataset needs `turns`, `input_ids` and `labels`, `prompt` and `response`, or `messages`. '
                    'Convert the data with a preprocessor that returns one of these',
                    file=f'{folder}/index.json',
                )

    def decode(self, sample: dict[str, Any], path: str, position: int) -> dict[str, Any]:
        """The sample as ``{'turns': [...]}``."""
        columns = set(sample)
        if 'turns' in columns:
            turns = _from_json(sample['turns'], 'turns', path, position)
            if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) and {'input_ids', 'labels'} <= set(turn) for turn in turns):
                raise DataError(f'turns: expected a list of turns with input_ids and labels, got {str(turns)[:80]}', file=path, sample=position)
            return {'turns': [self._turn(turn, path, position) for turn in turns]}
        if {'input_ids', 'labels'} <= columns:
            return {'turns': [self._turn(sample, path, position)]}
        try:
            return tokenize_formatted_example(self._formatted(sample, path, position), self.tokenizer)
        except UserError as e:
            e.message = f'{path} (sample {position}): {e.message}'
            e.args = (e.message,)
            raise

    def _formatted(self, sample: Mapping[str, Any], path: str, position: int) -> Mapping[str, Any]:
        """The prompt/response or chat example in a sample; columns beside those are left out."""
        for form in _RAW_COLUMNS:
            if form <= set(sample):
                example = {key: sample[key] for key in sample if key in form}
                if 'messages' in example:
                    example['messages'] = _from_json(example['messages'], 'messages', path, position)
                return example
        assert self.preprocessing_fn is not None
        return preprocessing.apply(self.preprocessing_fn, sample, self.tokenizer)

    def _turn(self, turn: Mapping[str, Any], path: str, position: int) -> dict[str, np.ndarray]:
        return {key: self._ids(turn[key], key, path, position) for key in ('input_ids', 'labels')}

    def _ids(self, value: Any, column: str, path: str, position: int) -> np.ndarray:
        """Ids as int64, checked to be the tokenizer's (labels may be -100)."""
        if isinstance(value, (bytes, bytearray)):
            item_bytes = np.dtype(self.token_encoding_type).itemsize
            if len(value) % item_bytes:
                problem = f'{column}: {len(value)} bytes are not whole {self.token_encoding_type} ids. Set token_encoding_type to the type that the data were written with'
                raise DataError(problem, file=path, sample=position)
            value = np.frombuffer(value, dtype=self.token_encoding_type)
        elif not isinstance(value, (np.ndarray, list, tuple)):
            raise DataError(f'{column}: expected ids as bytes, ndarray or list, got {type(value).__name__}', file=path, sample=position)
        ids = np.asarray(value)
        if ids.ndim != 1 or (len(ids) and not np.issubdtype(ids.dtype, np.integer)):
            raise DataError(f'{column}: expected one list of whole numbers, got shape {ids.shape} of {ids.dtype}', file=path, sample=position)
        ids = ids.astype(np.int64)
        wrong = ids[(ids >= self._num_ids) | ((ids < 0) & ((ids != _IGNORE_INDEX) | (column != 'labels')))]
        if len(wrong):
            hint = '' if self.token_encoding_type == 'int64' else ', and its token_encoding_type'
            raise DataError(f'{column}: token id {wrong[0]} is outside the {self._num_ids} ids of the tokenizer. Use the tokenizer that the data were prepared with{hint}', file=path, sample=position)
        return ids

    def idle_sample(self) -> PackedRow:
        """A row without documents."""
        return PackedRow(())

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """As its base's; Composer counts rows, but the position is a number of examples."""
        if num_samples == 0 and from_beginning:
            return super().state_dict(0, True)
        if self.examples_out is not None:
            state = super().state_dict(self.examples_out, False)
            # A last batch that is not full is counted as if it were.
            return {**state, 'sample_in_epoch': min(state['sample_in_epoch'], self.epoch_size)}
        return super().state_dict(int(num_samples * (self.packing_ratio or 1)), from_beginning)


def _from_json(value: Any, column: str, path: str, position: int) -> Any:
    """``value``, decoded where the column was written as text."""
    try:
        return json.loads(value) if isinstance(value, (str, bytes)) else value
    except ValueError as e:
        raise DataError(f'{column}: not JSON ({e}): {str(value)[:80]}', file=path, sample=position) from e


class StreamingFinetuningLoader(TextDataLoader):
    """Counts the examples behind the batches that it hands out, since packed batches have fewer rows than that, and gives all ranks as many rows.

    Ranks that have as many rows have as many microbatches; otherwise sharded models would wait for each other for ever.

    Args:
        dataset: the examples.
        is_packed: whether the rows of a batch depend on its examples.
        **arguments: every other argument of a DataLoader; ``batch_size`` is in examples.
    """

    def __init__(self, dataset: StreamingFinetuningDataset, is_packed: bool = False, **arguments: Any) -> None:
        super().__init__(dataset, **arguments)
        self._is_packed = is_packed

    def _get_batch_size(self, batch: Any) -> int:
        return int(self.batch_size or 0)

    def __iter__(self) -> Iterator[Any]:
        self.dataset.examples_out = 0
        for batch in super().__iter__():
            self.dataset.examples_out += self.dataset.samples_per_step
            yield self._with_as_many_rows(batch) if self._is_packed else batch

    def _with_as_many_rows(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows = len(batch['input_ids'])
        most = -dist.all_reduce_min(-rows)
        return batch if rows == most else with_idle_rows(batch, most - rows, self.dataset.tokenizer.pad_token_id)
