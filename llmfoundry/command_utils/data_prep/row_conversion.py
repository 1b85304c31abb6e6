"""Rows that can be read at random -> MDS shards, in order, with checkpoints: the conversion of finetuning data sets.

The counterpart of ``engine`` for rows of any shape: there a block is text and leaves a leftover for the next one, here each row makes its own sample.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

from llmfoundry.command_utils.data_prep.engine import CHECKPOINT_SECONDS, say
from llmfoundry.command_utils.data_prep.finetuning_rows import COLUMNS, ENCODER, RowEncoder, RowSpec
from llmfoundry.command_utils.data_prep.journal import Journal, JournaledShards, journalled
from llmfoundry.command_utils.data_prep.mds_shards import SIZE_LIMIT_BYTES
from llmfoundry.command_utils.data_prep.pool import WorkerPool
from llmfoundry.command_utils.data_prep.progress import Progress, human_time
from llmfoundry.errors import InvalidDatasetError

__all__ = ['RowPlan', 'RowSummary', 'convert_rows']

_VERSION = 1
_ROWS_PER_BLOCK = 256


@dataclass(frozen=True)
class RowPlan:
    """How to convert one split. ``processes`` 0 works in this process; ``fingerprint`` must be equal for runs that must give the same shards."""

    name: str
    spec: RowSpec
    fingerprint: str
    compression: str | None = None
    processes: int = 0


@dataclass(frozen=True)
class RowSummary:
    """What came out. ``dropped`` counts the rows that were left out, by reason; ``tokens`` is 0 where texts were kept."""

    rows: int
    samples: int
    tokens: int
    dropped: Mapping[str, int]
    shards: int
    seconds: float
    resumed: bool


class _ThisProcess:
    """``WorkerPool`` without workers."""

    def __init__(self, spec: RowSpec) -> None:
        self._encoder = RowEncoder(spec)

    def map(self, blocks: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        for number, (key, block) in enumerate(blocks):
            yield key, self._encoder.encode(number, block)


def convert_rows(rows: Any, plan: RowPlan, output: Path) -> RowSummary:
    """Converts ``rows`` into the folder ``output``, going on where a killed run with the same arguments stopped. ``index.json`` comes last.

    Args:
        rows: a ``datasets.Dataset``, or whatever gives a dict of columns for a slice.
        plan: how to convert them.
        output: the folder, empty or absent but for the leftovers of a killed run.

    Raises:
        DataError: a row that cannot be used, or an output that cannot be written.
        InvalidDatasetError: no row is left.
    """
    with journalled(output) as journal:
        return _convert(rows, plan, journal)


def _convert(rows: Any, plan: RowPlan, journal: Journal) -> RowSummary:
    began = time.monotonic()
    columns = {name: (encoding, None) for name, encoding in COLUMNS[plan.spec.form].items()}
    shards = JournaledShards(columns, plan.compression, SIZE_LIMIT_BYTES, journal)
    resumed = _begin(shards, plan, journal)
    if not shards.state.finished:
        if plan.processes:
            with WorkerPool(plan.spec, plan.processes, ENCODER) as pool:
                pool.facts()
                _consume(rows, plan, pool, shards)
        else:
            _consume(rows, plan, _ThisProcess(plan.spec), shards)
        shards.end()
        if not shards.state.samples:
            reason = f'of {shards.state.documents:,} rows, {_in_words(shards.state.dropped) or "none is there"}, so nothing was written'
            shards.state.documents = 0
            shards.checkpoint()
            raise InvalidDatasetError(plan.spec.where, reason)
        shards.checkpoint()
    journal.publish(shards.state, {})
    state = shards.state
    summary = RowSummary(state.documents, state.samples, state.tokens, dict(state.dropped), state.num_shards, time.monotonic() - began, resumed)
    _report(summary, plan)
    return summary


def _begin(shards: JournaledShards, plan: RowPlan, journal: Journal) -> bool:
    """Loads the last checkpoint of the same conversion, or starts a new one."""
    fingerprint = hashlib.sha256(json.dumps([_VERSION, plan.fingerprint, plan.compression, plan.spec.form]).encode()).hexdigest()
    found = journal.load()
    if found is not None and found.fingerprint == fingerprint:
        shards.resume(found)
        say(f'{plan.name}: going on with an unfinished conversion: {found.documents:,} rows and {found.num_shards} shards are done.')
        return True
    if found is not None:
        say(f'{plan.name}: an unfinished conversion with other arguments or inputs lies in {journal.folder}; starting over.')
    shards.start(fingerprint, 'rows')
    return False


def _consume(rows: Any, plan: RowPlan, pool: Any, shards: JournaledShards) -> None:
    state, start, last = shards.state, shards.state.documents, time.monotonic()
    dropped = Counter(state.dropped)
    tokens = state.tokens
    # The progress line counts rows where others count bytes: its share and its time left come out right.
    progress = Progress(plan.name, len(rows), start)
    try:
        for end, encoded in pool.map(_blocks(rows, start)):
            shards.add(encoded.sizes, encoded.data)
            dropped.update(encoded.dropped)
            state.documents, state.dropped = end, dict(dropped)
            state.tokens += encoded.tokens
            progress.update(end, state.tokens - tokens, end - start)
            if shards.changed or time.monotonic() - last >= CHECKPOINT_SECONDS:
                shards.checkpoint()
                last = time.monotonic()
    finally:
        progress.close()


def _blocks(rows: Any, start: int) -> Iterator[tuple[int, tuple[int, Sequence[Mapping[str, Any]]]]]:
    """(end, (first, rows)) from row ``start`` on."""
    for first in range(start, len(rows), _ROWS_PER_BLOCK):
        columns = rows[first : first + _ROWS_PER_BLOCK]
        names = list(columns)
        block = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        yield first + len(block), (first, block)


def _in_words(dropped: Mapping[str, int]) -> str:
    return ', '.join(f'{count:,} {reason}' for reason, count in sorted(dropped.items()))


def _report(summary: RowSummary, plan: RowPlan) -> None:
    rate = f', {summary.tokens / max(summary.seconds, 1e-6):,.0f} tokens/s' if summary.tokens and not summary.resumed else ''
    tokens = f', {summary.tokens:,} tokens' if summary.tokens else ''
    say(
        f'{plan.name}: {summary.samples:,} of {summary.rows:,} rows{tokens} -> columns {", ".join(sorted(COLUMNS[plan.spec.form]))} '
        f'in {summary.shards} shards ({human_time(summary.seconds)}{rate})'
    )
    if summary.dropped:
        say(f'{plan.name}: warning: {summary.rows - summary.samples:,} rows were left out: {_in_words(summary.dropped)}')
