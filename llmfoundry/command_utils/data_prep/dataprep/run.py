"""The command: source -> rendered and tokenised rows -> packed rows -> writer.

Rows stream through in blocks and packed rows lie in an Arrow file until the writer takes them, so memory does not grow with the data. Rendering and
tokenising may run in several processes; blocks are packed in their order, so the result is the same for any number.
"""

from __future__ import annotations

import argparse
import collections
import logging
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, Iterator, Mapping, Sequence

import datasets
import pyarrow as pa

from llmfoundry.command_utils.data_prep.dataprep.config import Plan, base_of, make_plan
from llmfoundry.command_utils.data_prep.dataprep.packing import TokenisedRow, pack_rows
from llmfoundry.command_utils.data_prep.dataprep.rendering import Renderer, RowCounts
from llmfoundry.command_utils.data_prep.dataprep.sources import check_rows
from llmfoundry.command_utils.data_prep.dataprep.writers import TARGET_KEYS, WRITERS, check_target
from llmfoundry.command_utils.error_report import run_or_exit
from llmfoundry.data.prompts import default_format
from llmfoundry.errors import InvalidDatasetError
from llmfoundry.tokenizers.build import build_tokenizer

__all__ = ['DataprepSummary', 'dataprep', 'main']

log = logging.getLogger(__name__)

ROWS_PER_BLOCK = 1000
BLOCKS_AHEAD_PER_PROCESS = 2
PACKS_PER_WRITE = 256
_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema([('input_ids', _IDS), ('labels', _IDS), ('attention_mask', pa.list_(pa.int8())), ('sequence_id', _IDS), ('full_text', pa.string())])


@dataclass
class DataprepSummary:
    """What a run did.

    Attributes:
        counts: what became of the rows.
        packed_rows: rows written, of ``chunksize`` tokens each.
        tokens: tokens in them that are not padding.
        target_tokens: tokens that are trained.
        chunksize: tokens in a packed row.
        target: where they were written.
    """

    counts: RowCounts
    chunksize: int
    target: str
    packed_rows: int = 0
    tokens: int = 0
    target_tokens: int = 0

    def __str__(self) -> str:
        counts, room = self.counts, max(1, self.packed_rows * self.chunksize)
        dropped = [
            f'{number} {why}'
            for number, why in (
                (counts.too_long, f'longer than chunksize={self.chunksize} tokens (the longest has {counts.longest})'),
                (counts.without_response, 'without a response'),
            )
            if number
        ]
        return (
            f'dataprep: {counts.rows} rows read, {counts.kept} kept, {counts.rows - counts.kept} dropped'
            + (f': {", ".join(dropped)}' if dropped else '')
            + f'\ndataprep: {self.packed_rows} packed rows of {self.chunksize} tokens, {100 * self.tokens / room:.1f} % filled; '
            f'{self.tokens} tokens, {self.target_tokens} of them trained -> {self.target}'
        )


def dataprep(config: str | os.PathLike | Mapping[str, Any]) -> DataprepSummary:
    """Prepares a dataset.

    Args:
        config: path of the YAML, or its content.

    Returns:
        What was read, dropped and written; the same is printed.

    Raises:
        ConfigError: the config has problems (all are listed).
        DataError: a row or a source that cannot be used.
        InvalidDatasetError: no row is left.
        OutputFolderNotEmptyError: the target already holds something.
    """
    plan = make_plan(config)
    target = _check_target(plan)
    tokenizer = build_tokenizer(base_of(plan.config.base_model))
    _say_format(plan, tokenizer)
    dataset = plan.source(**plan.config.source_config.kwargs)
    name = _source_name(plan)
    check_rows(dataset, name)
    renderer = Renderer(plan.prompt, tokenizer, plan.config.chunksize, name)
    summary = DataprepSummary(RowCounts(), plan.config.chunksize, target)
    with tempfile.TemporaryDirectory(prefix='llmfoundry-dataprep-') as folder:
        path = os.path.join(folder, 'packed.arrow')
        _write_arrow(plan, _tokenised(dataset, renderer, plan.config.num_proc, summary.counts), path, summary)
        if not summary.packed_rows:
            raise InvalidDatasetError(name, f'no row is left. {summary}'.splitlines()[0])
        plan.writer(datasets.Dataset.from_file(path), **plan.config.dataset_writer_config.kwargs)
    print(summary)
    return summary


def _check_target(plan: Plan) -> str:
    """Where the rows will go, checked before hours of work."""
    block = plan.config.dataset_writer_config
    if block.method not in WRITERS:
        return block.method
    target = block.kwargs[TARGET_KEYS[block.method]]
    check_target(target, block.kwargs.get('storage_options'))
    return target


def _source_name(plan: Plan) -> str:
    kwargs = plan.config.source_config.kwargs
    return str(kwargs.get('dataset_path') or kwargs.get('path') or plan.config.source_config.method)


def _say_format(plan: Plan, tokenizer: Any) -> None:
    """Says which format is used and warns where its markers mean nothing to the tokenizer."""
    config, style = plan.config, getattr(plan.prompt, 'format', None)
    if style is None:
        return
    if config.prompt_format_config is None:
        known = default_format(base_of(config.base_model)) is not None
        print(f'dataprep: prompt format {type(style).__name__}' + ('' if known else f', without markers: the family of {config.base_model!r} is not known'))
    for name in ('BOS', 'EOS'):
        text = getattr(style, name, '')
        if text and len(tokenizer(text, add_special_tokens=False)['input_ids']) != 1:
            log.warning(
                f'prompt_format_config: {name} {text!r} is no token of the tokenizer of {config.base_model!r}, so it is written as ordinary characters. '
                f"Take the format of the model's family, or set prompt_format_config.kwargs.{name}: ''"
            )
    if config.ignore_index != -100:
        log.warning(f'ignore_index is {config.ignore_index}, but losses and loaders ignore -100: train with code of your own, or leave it out')


def _tokenised(dataset: Any, renderer: Renderer, num_proc: int, counts: RowCounts) -> Iterator[TokenisedRow]:
    """All rows in order; adds to ``counts`` as it goes."""
    dataset = dataset.select_columns([c for c in ('input', 'response', 'contexts') if c in dataset.column_names])
    starts = range(0, len(dataset), ROWS_PER_BLOCK)
    if num_proc == 1:
        answers = (renderer(dataset[start : start + ROWS_PER_BLOCK], start) for start in starts)
        yield from _collect(answers, counts)
        return
    # Started afresh rather than forked: Arrow and the tokenizer have threads, and a fork of those may hang.
    with ProcessPoolExecutor(num_proc, mp_context=multiprocessing.get_context('spawn'), initializer=_start_worker, initargs=(renderer,)) as pool:
        blocks = ((dataset[start : start + ROWS_PER_BLOCK], start) for start in starts)
        yield from _collect(_in_order(pool, blocks, num_proc * BLOCKS_AHEAD_PER_PROCESS), counts)


def _collect(answers: Iterator[tuple[list[TokenisedRow], RowCounts]], counts: RowCounts) -> Iterator[TokenisedRow]:
    for rows, more in answers:
        counts.add(more)
        yield from rows


def _in_order(pool: ProcessPoolExecutor, blocks: Iterator[tuple[Any, int]], ahead: int) -> Iterator[tuple[list[TokenisedRow], RowCounts]]:
    """Answers in the order of the blocks, with at most ``ahead`` under way."""
    waiting: collections.deque[Future] = collections.deque()
    try:
        for block in blocks:
            waiting.append(pool.submit(_work, *block))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


_RENDERER: list[Renderer] = []


def _start_worker(renderer: Renderer) -> None:
    _RENDERER[:] = [renderer]


def _work(columns: Mapping[str, Sequence[Any]], first_row: int) -> tuple[list[TokenisedRow], RowCounts]:
    return _RENDERER[0](columns, first_row)


def _write_arrow(plan: Plan, rows: Iterator[TokenisedRow], path: str, summary: DataprepSummary) -> None:
    """Packs the rows into an Arrow stream file."""
    ignore = plan.config.ignore_index
    with pa.OSFile(path, 'wb') as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        block: list[dict[str, Any]] = []
        for packed in pack_rows(rows, plan.config.chunksize, ignore):
            block.append(packed)
            summary.packed_rows += 1
            summary.tokens += sum(packed['attention_mask'])
            summary.target_tokens += sum(label != ignore for label in packed['labels'])
            if len(block) == PACKS_PER_WRITE:
                writer.write_batch(pa.RecordBatch.from_pylist(block, SCHEMA))
                block = []
        if block:
            writer.write_batch(pa.RecordBatch.from_pylist(block, SCHEMA))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of scripts/data_prep/dataprep.py."""
    parser = argparse.ArgumentParser(description='Render, tokenise and pack rows of input, contexts and response.')
    parser.add_argument('config', help='YAML with source_config, dataset_writer_config, base_model, ...')
    args = parser.parse_args(argv)
    level = os.environ.get('LOG_LEVEL', 'INFO').upper()
    logging.basicConfig(level=level if isinstance(logging.getLevelName(level), int) else 'INFO', format='%(levelname)s: %(message)s', stream=sys.stderr)
    run_or_exit(lambda: dataprep(args.config))
