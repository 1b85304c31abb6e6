"""Rows of a Hugging Face data set to a token store: preprocess, tokenise, stitch, cut, filter, write, all in one pass and once per node.

``datasets.map`` is not used: it would write the strings and the lists of ids a second time, keeps no finished part of an interrupted pass, and has to
be run again by every rank. Rows are read a few megabytes at a time, and their ids go to disk as they come, so memory does not grow with the data.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Callable, Collection, Iterator, Mapping, Sequence

import datasets

from llmfoundry import dist
from llmfoundry.data.finetuning.cache_folder import cache_folder
from llmfoundry.data.finetuning.cache_key import code_fingerprint, function_fingerprint, tokenizer_fingerprint
from llmfoundry.data.finetuning.examples import mark_row
from llmfoundry.data.finetuning.preprocessing import PreprocessingFn, apply, function_name, resolve_preprocessing_fn
from llmfoundry.data.finetuning.pretokenized import labels_of_columns
from llmfoundry.data.finetuning.sources import describe_source, fingerprint, load_rows, place_of_row
from llmfoundry.data.finetuning.store import EMPTY_PROMPT, EMPTY_RESPONSE, NO_TARGET, EncodedRow, StoreCounts, StorePlan, TokenStore
from llmfoundry.data.finetuning.store_builder import build_store, default_num_proc
from llmfoundry.data.finetuning.targets import line_break_ids, stitch_example, truncate, validate_target_settings
from llmfoundry.data.finetuning.tokenization import tokenize_batch
from llmfoundry.errors import BaseContextualError, DataError, InvalidDatasetError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ['TokenSettings', 'TurnsDataset', 'build_hf_dataset', 'build_token_store', 'encode_rows']

log = logging.getLogger(__name__)

_BATCH_BYTES = 1 << 22
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class TokenSettings:
    """How turns become a row: see ``targets``.

    Attributes:
        max_seq_len: tokens after which a row is cut. Not used by encoder-decoder models, whose collator cuts context and target apart.
        target_prompts: ``none``, ``all`` or ``length>=N``.
        target_responses: ``last`` or ``all``.
        decoder_only_format: False for encoder-decoder models: the row is then context and target, uncut and without EOS.
    """

    max_seq_len: int = 2048
    target_prompts: str = 'none'
    target_responses: str = 'last'
    decoder_only_format: bool = True

    def __post_init__(self) -> None:
        validate_target_settings(self.target_prompts, self.target_responses, self.decoder_only_format)


def build_token_store(
    tokenizer: PreTrainedTokenizerBase,
    hf_name: str,
    split: str | None,
    max_seq_len: int = 2048,
    hf_kwargs: Mapping[str, Any] | None = None,
    preprocessing_fn: str | Mapping[str, str] | Callable[..., Any] | None = None,
    safe_load: bool = False,
    target_prompts: str = 'none',
    target_responses: str = 'last',
    decoder_only_format: bool = True,
) -> TokenStore:
    """Tokenises a data set, or opens what an earlier run made of it. To be called by every rank; local rank 0 works and the others wait.

    Args:
        tokenizer: its EOS ends the last response of decoder-only rows.
        hf_name, split, hf_kwargs, safe_load: see ``sources.load_rows``.
        max_seq_len: tokens per row at most.
        preprocessing_fn: registered name, ``module:function``, map of columns, function, or None for the one registered as ``hf_name``, if any.
        target_prompts, target_responses, decoder_only_format: see ``TokenSettings``.

    Returns:
        The store of the rows that train something. The number of the others is given in a warning.

    Raises:
        UserError: a row or the data set is not as it should be; the text names the source and the row. Every rank raises it.
        InvalidDatasetError: no row is left.
        DataError: nodes read different data.
    """
    settings = TokenSettings(max_seq_len, str(target_prompts).lower(), str(target_responses).lower(), decoder_only_format)

    def build() -> str:
        fn = resolve_preprocessing_fn(preprocessing_fn, hf_name)
        rows = load_rows(hf_name, split, hf_kwargs, safe_load)
        source = describe_source(hf_name, split, hf_kwargs)
        try:
            store = _build(rows, source, tokenizer, fn, settings)
        except (BaseContextualError, DataError) as e:
            raise _with_file(e, source, hf_name, str(split), hf_kwargs) from e
        _report(store.counts, source, settings)
        return str(store.folder)

    store = TokenStore(dist.on_local_rank_zero(build))
    if len(set(dist.all_gather_objects(store.digest))) > 1:
        raise DataError('the nodes of this run read different rows; give all of them the same files, or a shared LLMFOUNDRY_CACHE', file=store.source)
    return store


def _build(rows: datasets.Dataset, source: str, tokenizer: PreTrainedTokenizerBase, fn: PreprocessingFn | None, settings: TokenSettings) -> TokenStore:
    made_from = {
        'rows': fingerprint(rows),
        'tokenizer': tokenizer_fingerprint(tokenizer),
        'preprocessing_fn': [None if fn is None else function_name(fn), function_fingerprint(fn)],
        'settings': asdict(settings),
        'code': code_fingerprint(),
    }
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r'[^A-Za-z0-9.]+', '-', source).strip('-')[-60:]
    folder = cache_folder() / 'finetuning' / f'{name}-{key}'
    log.info('%s: %d rows, token ids in %s', source, len(rows), folder)

    def encode(start: int, stop: int) -> Iterator[EncodedRow]:
        return encode_rows(rows, source, tokenizer, fn, settings, start, stop)

    return build_store(folder, StorePlan.for_rows(len(rows), source, made_from), encode, default_num_proc())


def encode_rows(
    rows: datasets.Dataset,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    fn: PreprocessingFn | None,
    settings: TokenSettings,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[EncodedRow]:
    """Encodes rows ``start`` to ``stop``, in order, a few megabytes of text at a time.

    Raises:
        UserError, DataError: a row cannot be used; the text names source and row.
    """
    stop = len(rows) if stop is None else stop
    eos_token_id = tokenizer.eos_token_id if settings.decoder_only_format else None
    line_breaks = line_break_ids(tokenizer)
    bytes_per_row = max(1, rows.data.nbytes // max(1, rows.data.num_rows))
    step = max(1, min(_BATCH_ROWS, _BATCH_BYTES // bytes_per_row))
    for first in range(start, stop, step):
        for offset, turns in enumerate(_tokenized(rows, source, tokenizer, fn, range(first, min(stop, first + step)))):
            try:
                yield encode_turns(turns, settings, eos_token_id, line_breaks)
            except ValueError as e:
                raise _named(e, source, first + offset) from e


def _tokenized(
    rows: datasets.Dataset, source: str, tokenizer: PreTrainedTokenizerBase, fn: PreprocessingFn | None, span: range
) -> Iterator[list[Mapping[str, Any]]]:
    try:
        columns = rows[span.start : span.stop]
    except UnicodeDecodeError as e:
        raise _not_utf8(rows, source, span) from e
    names = list(columns)
    examples: list[Mapping[str, Any]] = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if fn is None:
        examples = [labels_of_columns(row) for row in examples]
    else:
        for offset, row in enumerate(examples):
            try:
                examples[offset] = apply(fn, row, tokenizer)
            except Exception as e:
                raise _named(e, source, span.start + offset) from e
    try:
        tokenized = tokenize_batch(examples, tokenizer)
    except Exception as e:
        raise _named(e, source, span.start + getattr(e, 'row', 0)) from e
    for example in tokenized:
        yield example['turns']


def _not_utf8(rows: datasets.Dataset, source: str, span: range) -> DataError:
    """Names the first row of ``span`` that is not UTF-8: Arrow's readers do not look, so it shows when the row is read."""
    for row in span:
        try:
            rows[row]
        except UnicodeDecodeError as e:
            return DataError(f'not UTF-8 (byte 0x{e.object[e.start]:02x} at byte {e.start} of a value). Re-encode the file', file=f'{source}, row {row}')
    return DataError(f'rows {span.start} to {span.stop - 1} hold text that is not UTF-8. Re-encode the file', file=source)


def _named(error: Exception, source: str, row: int) -> Exception:
    """The error with source and row before its text: of the same type where it is one of ours, else a DataError."""
    where = f'{source}, row {row}'
    if not isinstance(error, BaseContextualError):
        return DataError(error.message if isinstance(error, DataError) and not error.file else f'{type(error).__name__}: {error}', file=where)
    mark_row(error, row)
    error.message = f'{where}: {error.message}'
    error.args = (error.message,)
    return error


def _with_file(error: BaseContextualError | DataError, source: str, hf_name: str, split: str, hf_kwargs: Mapping[str, Any] | None) -> Exception:
    """The error of a row with the file that holds the row, where the source has several files."""
    found = re.match(re.escape(source) + r', row (\d+)', str(error))
    place = place_of_row(hf_name, split, hf_kwargs, int(found.group(1))) if found else None
    if found is None or place is None:
        return error
    where = f'{place[0]}, row {place[1]} ({found.group().removeprefix(source + ", ")} of {source})'
    if isinstance(error, DataError):
        return DataError(error.message, file=where)
    error.message = where + error.message[found.end() :]
    error.args = (error.message,)
    return error


def encode_turns(turns: Sequence[Mapping[str, Any]], settings: TokenSettings, eos_token_id: int | None, line_breaks: Collection[int] = ()) -> EncodedRow:
    """Stitches and cuts one example, or says why it is dropped."""
    if any(len(turn['input_ids']) == 0 for turn in turns):
        return EncodedRow(None, None, EMPTY_PROMPT)
    if not turns or any(len(turn['labels']) == 0 for turn in turns):
        return EncodedRow(None, None, EMPTY_RESPONSE)
    whole_ids, whole_targets = stitch_example(turns, settings.target_prompts, settings.target_responses, eos_token_id, line_breaks)
    ids, targets = whole_ids, whole_targets
    if settings.decoder_only_format:
        ids, targets = truncate(whole_ids, whole_targets, settings.max_seq_len)
    if not targets.any():
        return EncodedRow(None, None, NO_TARGET)
    return EncodedRow(ids, targets, None, len(whole_ids) - len(ids))


def _report(counts: StoreCounts, source: str, settings: TokenSettings) -> None:
    """Warns of rows that are dropped or cut.

    Raises:
        InvalidDatasetError: no row is left.
    """
    reasons = [
        f'{counts.empty_prompt} with an empty prompt' if counts.empty_prompt else '',
        f'{counts.empty_response} with an empty response' if counts.empty_response else '',
        f'{counts.no_target} without a token to train in the first {settings.max_seq_len}' if counts.no_target else '',
    ]
    listed = ', '.join(filter(None, reasons))
    if counts.kept == 0:
        raise InvalidDatasetError(source, f'all {counts.rows} rows were dropped: {listed}' if counts.rows else 'it has no rows')
    if counts.dropped:
        warnings.warn(f'{source}: dropped {counts.dropped} of {counts.rows} examples: {listed}.', stacklevel=2)
    if counts.truncated:
        share = counts.truncated_tokens / (counts.tokens + counts.truncated_tokens)
        log.warning(
            '%s: %d of %d examples were cut at max_seq_len %d and lost %d tokens, %.2f %% of all',
            source, counts.truncated, counts.kept, settings.max_seq_len, counts.truncated_tokens, 100 * share,
        )


class TurnsDataset:
    """Tokenised examples ``{'turns': ...}`` of the rows that train something, tokenised when they are asked for. For code that collates by itself."""

    def __init__(self, rows: datasets.Dataset, store: TokenStore, tokenizer: PreTrainedTokenizerBase, fn: PreprocessingFn | None) -> None:
        self.rows, self.store, self.tokenizer, self.preprocessing_fn = rows, store, tokenizer, fn

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f'example {index} of {len(self)}')
        row = int(self.store.row_ids[index])
        return {'turns': next(_tokenized(self.rows, self.store.source, self.tokenizer, self.preprocessing_fn, range(row, row + 1)))}


def build_hf_dataset(
    dataset_name: str,
    split: str | None,
    safe_load: bool = False,
    max_seq_len: int = 2048,
    preprocessing_fn: str | Mapping[str, str] | Callable[..., Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    target_prompts: str = 'none',
    target_responses: str = 'last',
    decoder_only_format: bool = True,
    hf_kwargs: Mapping[str, Any] | None = None,
) -> TurnsDataset:
    """What ``dataset_constructor.build_from_hf`` returns: the tokenised examples of a data set, without those that train nothing.

    Raises:
        ValueError: no tokenizer.
        UserError: see ``build_token_store``.
    """
    if tokenizer is None:
        raise ValueError('A tokenizer is required to build a finetuning data set')
    store = build_token_store(
        tokenizer, dataset_name, split, max_seq_len, hf_kwargs, preprocessing_fn, safe_load, target_prompts, target_responses, decoder_only_format
    )
    # Local rank 0 has filled the cache of `datasets` by now.
    rows = load_rows(dataset_name, split, hf_kwargs, safe_load)
    return TurnsDataset(rows, store, tokenizer, resolve_preprocessing_fn(preprocessing_fn, dataset_name))
