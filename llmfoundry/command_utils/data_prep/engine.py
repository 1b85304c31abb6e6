"""The conversion itself: blocks of input -> tokens (workers, in parallel) -> samples -> shards (here, in order), with checkpoints.

What decides the shards is the order of the documents and the leftover of the last cut, both kept by this one process; workers only encode. So the
shards are the same for any number of workers, and after any number of kills. The alternative, one shard folder per process merged at the end, loses
both.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Iterator, Mapping, Protocol

import numpy as np

from llmfoundry.command_utils.data_prep.journal import Journal, JournaledShards, State, journalled
from llmfoundry.command_utils.data_prep.mds_shards import SIZE_LIMIT_BYTES
from llmfoundry.command_utils.data_prep.pool import WorkerPool
from llmfoundry.command_utils.data_prep.progress import Progress, human_time
from llmfoundry.command_utils.data_prep.readers import Block
from llmfoundry.command_utils.data_prep.rows import BadRow
from llmfoundry.command_utils.data_prep.tokenizer_spec import TokenizerSpec
from llmfoundry.command_utils.data_prep.worker import Encoded, EncoderFacts, EncoderSpec
from llmfoundry.data.token_concat import TOKEN_DTYPE, cut_unwrapped, cut_wrapped, separator_warnings
from llmfoundry.errors import CannotUnicodeDecodeFile, DataError, DatasetTooSmallError

__all__ = ['ConversionPlan', 'ConversionSummary', 'Source', 'convert', 'report', 'say']

CHECKPOINT_SECONDS = 2.0
"""Between checkpoints: what a kill costs at most, against one fsync of a few MB."""
_VERSION = 1
_SHOWN_BAD_ROWS = 20


class Source(Protocol):
    """Where the documents come from; see ``readers.FileSource``."""

    total_bytes: int | None

    def fingerprint(self) -> Any:
        """What must be equal for a resumed run to read the same text."""

    def blocks(self, position: dict[str, int]) -> Iterator[Block]:
        """Blocks from ``position`` on."""


@dataclass(frozen=True)
class ConversionPlan:
    """How to convert.

    ``concat_tokens`` None keeps the text as a ``str`` column; ``require_separator`` refuses a run in which nothing marks the end of a document.
    """

    name: str
    tokenizer: TokenizerSpec | None = None
    concat_tokens: int | None = None
    bos_text: str = ''
    eos_text: str = ''
    no_wrap: bool = False
    compression: str | None = None
    processes: int = 1
    on_bad_row: str = 'stop'
    require_separator: bool = False
    use_tiktoken: bool = True

    def __post_init__(self) -> None:
        if self.concat_tokens is not None and self.concat_tokens < 1:
            raise ValueError(f'concat_tokens must be a positive number of tokens, got {self.concat_tokens}')
        if self.processes < 1:
            raise ValueError(f'the number of processes must be at least 1, got {self.processes}')
        if self.on_bad_row not in ('stop', 'skip'):
            raise ValueError(f"on_bad_row must be 'stop' or 'skip', got {self.on_bad_row!r}")

    def fingerprint(self, source: Source) -> str:
        """Equal for runs that must give the same shards: everything but the number of processes, the engine, and what happens to bad rows."""
        backend = self.tokenizer and (json.loads(self.tokenizer.backend) if self.tokenizer.backend else [self.tokenizer.name, self.tokenizer.kwargs])
        parts = [_VERSION, backend, self.concat_tokens, self.bos_text, self.eos_text, self.no_wrap, self.compression, source.fingerprint()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class ConversionSummary:
    """What came out. ``seconds`` is the wall time of this run, without the parts that an earlier, killed run had done (``resumed``)."""

    samples: int
    tokens: int
    documents: int
    bad_rows: int
    shards: int
    seconds: float
    engine: str
    resumed: bool


class _EngineDiffers(Exception):
    """tiktoken and the tokenizer gave different ids for a piece of the text."""


def say(message: str) -> None:
    """Prints a line for the user."""
    print(message, flush=True)


def convert(source: Source, plan: ConversionPlan, output: Path, extra_files: Mapping[str, str] | None = None) -> ConversionSummary:
    """Converts ``source`` into the folder ``output``, going on where a killed run with the same arguments stopped.

    Args:
        source: the documents.
        plan: how to convert them.
        output: the folder, empty or absent but for the leftovers of a killed run.
        extra_files: name -> text of small files that belong beside the shards.

    Raises:
        DataError: an unusable row (file and line), a damaged file, or an output that cannot be written.
        DatasetTooSmallError: the documents do not fill one sample.
        ValueError: arguments that do not fit the tokenizer.
    """
    with journalled(output) as journal:
        try:
            return _Conversion(source, plan, journal).run(extra_files or {})
        except _EngineDiffers as e:
            say(f'{plan.name}: tiktoken and the tokenizer differ on {e}; starting over with the tokenizers library, which is slower.')
            journal.discard(remove_output=False)
            return _Conversion(source, replace(plan, use_tiktoken=False), journal).run(extra_files or {})


class _Conversion:
    """One run of ``convert``."""

    def __init__(self, source: Source, plan: ConversionPlan, journal: Journal) -> None:
        self.source, self.plan, self.journal = source, plan, journal
        length = plan.concat_tokens
        columns = {'text': ('str', None)} if length is None else {'tokens': (f'ndarray:int32:{length}', length * TOKEN_DTYPE.itemsize)}
        self.shards = JournaledShards(columns, plan.compression, SIZE_LIMIT_BYTES, journal)

    @property
    def state(self) -> State:
        """How far the conversion is."""
        return self.shards.state

    def run(self, extra_files: Mapping[str, str]) -> ConversionSummary:
        """Converts what is not done yet and publishes."""
        began = time.monotonic()
        resumed = self._begin()
        engine = 'none'
        if not self.state.finished:
            self.leftover = self.state.leftover_tokens()
            tokenizer = self.plan.tokenizer if self.plan.concat_tokens is not None else None
            spec = EncoderSpec(tokenizer, self.plan.bos_text, self.plan.eos_text, self.plan.use_tiktoken and self.state.engine == 'auto')
            with WorkerPool(spec, self.plan.processes) as pool:
                facts = pool.facts()
                self._check_facts(facts)
                engine = facts.engine
                self._consume(pool)
            self._finish()
        self.journal.publish(self.state, extra_files)
        state = self.state
        return ConversionSummary(
            state.samples, state.tokens, state.documents, state.bad_rows, state.num_shards, time.monotonic() - began, engine, resumed
        )

    def _begin(self) -> bool:
        """Loads the last checkpoint of the same conversion, or starts a new one."""
        fingerprint = self.plan.fingerprint(self.source)
        engine = 'auto' if self.plan.use_tiktoken else 'tokenizers'
        found = self.journal.load()
        if found is not None and found.fingerprint == fingerprint and not (found.engine == 'auto' and engine != 'auto'):
            self.shards.resume(found)
            say(f'{self.plan.name}: going on with an unfinished conversion: {found.documents:,} documents and {found.num_shards} shards are done.')
            return True
        if found is not None:
            say(f'{self.plan.name}: an unfinished conversion with other arguments or inputs lies in {self.journal.folder}; starting over.')
        self.shards.start(fingerprint, engine)
        return False

    def _check_facts(self, facts: EncoderFacts) -> None:
        plan = self.plan
        if facts.engine == 'none':
            return
        if plan.use_tiktoken and self.state.engine == 'auto' and facts.engine != 'tiktoken':
            say(f'{plan.name}: tokenising with {facts.engine}, not with the faster tiktoken: {facts.reason}.')
        if plan.require_separator and not (plan.bos_text or plan.eos_text or facts.adds_bos or facts.adds_eos):
            raise ValueError(
                'the tokenizer adds neither a BOS nor an EOS token, and bos_text and eos_text are both empty, so nothing would separate the documents. '
                "Pass --eos_text (for example '<|endoftext|>') or --bos_text."
            )
        for message in separator_warnings(plan.bos_text, plan.eos_text, facts.bos_tokens, facts.eos_tokens, facts.adds_bos, facts.adds_eos):
            say(f'{plan.name}: note: {message}')

    def _consume(self, pool: WorkerPool) -> None:
        state = self.state
        documents, tokens = state.documents, state.tokens
        progress = Progress(self.plan.name, self.source.total_bytes, state.input_bytes)
        last = time.monotonic()
        try:
            blocks = ((block, block.segments) for block in _readable(self.source.blocks(state.position)))
            for block, encoded in pool.map(blocks):
                self._take(encoded)
                state.position, state.input_bytes = vars(block.after).copy(), block.bytes_read
                progress.update(block.bytes_read, state.tokens - tokens, state.documents - documents)
                if self.shards.changed or time.monotonic() - last >= CHECKPOINT_SECONDS:
                    self._checkpoint()
                    last = time.monotonic()
        finally:
            progress.close()

    def _take(self, encoded: Encoded) -> None:
        """Adds the documents of one block."""
        if encoded.differs is not None:
            raise _EngineDiffers(repr(encoded.differs))
        for row in encoded.bad:
            self._bad_row(row)
        self.state.documents += len(encoded.lengths)
        length = self.plan.concat_tokens
        if length is None:
            sizes, payload = _as_text_samples(encoded)
        else:
            tokens = np.frombuffer(encoded.data, dtype=TOKEN_DTYPE)
            self.state.tokens += len(tokens)
            if self.plan.no_wrap:
                samples, self.leftover = cut_unwrapped(self.leftover, tokens, encoded.lengths, length)
            else:
                samples, self.leftover = cut_wrapped(self.leftover, tokens, length)
            sizes, payload = np.full(len(samples), length * TOKEN_DTYPE.itemsize, dtype=np.int64), samples.tobytes()
        self.shards.add(sizes, payload)

    def _bad_row(self, row: BadRow) -> None:
        if self.plan.on_bad_row == 'stop':
            if row.line is None:
                raise CannotUnicodeDecodeFile(row.file)
            raise DataError(f'{row.message}. Repair the row, or pass --on_bad_row skip to leave such rows out.', file=row.file, line=row.line)
        self.state.bad_rows += 1
        self.journal.add_bad_row(row._asdict())
        if self.state.bad_rows <= _SHOWN_BAD_ROWS:
            say(f'{self.plan.name}: skipped {row.file}{"" if row.line is None else f":{row.line}"}: {row.message}')

    def _checkpoint(self) -> None:
        if self.plan.concat_tokens is not None:
            self.state.set_leftover(self.leftover)
        self.shards.checkpoint()

    def _finish(self) -> None:
        self.shards.end()
        if not self.state.samples:
            documents = self.state.documents
            unit = '' if self.plan.concat_tokens is None else f' ({self.state.tokens:,} tokens, one sample needs {self.plan.concat_tokens:,})'
            self.state.documents = 0
            self._checkpoint()
            raise DatasetTooSmallError(f'{documents:,} documents{unit} make no sample, so nothing was written.')
        self._checkpoint()


def _readable(blocks: Iterator[Block]) -> Iterator[Block]:
    """``blocks``, with failures of the input told apart from failures of the output."""
    try:
        yield from blocks
    except OSError as e:
        raise DataError(f'the input cannot be read any further: {e}. What was converted is kept: run the same command again to go on.') from e


def _as_text_samples(encoded: Encoded) -> tuple[np.ndarray, bytes]:
    """MDS samples of a ``str`` column: uint32 size, then the bytes."""
    view, start, parts = memoryview(encoded.data), 0, []
    for size in encoded.lengths.tolist():
        parts += (size.to_bytes(4, 'little'), view[start : start + size])
        start += size
    return encoded.lengths + 4, b''.join(parts)


def report(summary: ConversionSummary, plan: ConversionPlan, where: str) -> None:
    """Says what a conversion made."""
    rate = f', {summary.tokens / max(summary.seconds, 1e-6):,.0f} tokens/s' if summary.tokens and not summary.resumed else ''
    tokens = f', {summary.tokens:,} tokens' if summary.tokens else ''
    engine = f' by {summary.engine}' if summary.engine != 'none' else ''
    say(
        f'{plan.name}: {summary.documents:,} documents{tokens} -> {summary.samples:,} samples in {summary.shards} shards at {where} '
        f'({human_time(summary.seconds)}{rate}{engine})'
    )
    if summary.bad_rows:
        say(f'{plan.name}: {summary.bad_rows:,} bad rows were left out; they are listed in {where}/bad_rows.jsonl')
