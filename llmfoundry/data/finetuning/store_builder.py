"""Builds a token store part by part: resumes what a killed build left, lets several builders of one folder share the work of one, and spreads parts
over processes.

Parts are the unit of work and of loss. A process takes whole parts, so no ids travel between processes; with one process the tokenizer's own
threads use the cores instead.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import multiprocessing
import os
import time
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Callable, Iterable, Iterator

from filelock import FileLock, Timeout

from llmfoundry.data.finetuning.store import (
    EncodedRow,
    StoreCounts,
    StorePlan,
    TokenStore,
    part_is_whole,
    read_plan,
    remove_leftovers,
    write_part,
    write_plan,
)

__all__ = ['Encode', 'build_store', 'default_num_proc']

log = logging.getLogger(__name__)

# First source row and the one after the last -> one encoded row for each, in order.
Encode = Callable[[int, int], Iterable[EncodedRow]]
_SPARED_CORES = 8
_REPORT_EVERY_S = 10.0

# What the forked workers of a build work on. Inherited instead of sent, since preprocessing functions may be closures.
_job: tuple[Path, StorePlan, Encode] | None = None


def default_num_proc() -> int:
    """Processes for tokenising: all cores but 8, at least 1, at most ``MAX_NUM_PROC`` of the environment."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    limit = os.environ.get('MAX_NUM_PROC')
    wanted = max(1, cores - _SPARED_CORES)
    return max(1, min(wanted, int(limit))) if limit else wanted


def build_store(folder: str | os.PathLike[str], plan: StorePlan, encode: Encode, num_proc: int = 1) -> TokenStore:
    """Opens the store of ``folder``, first making what is missing or damaged of it.

    Args:
        folder: holds one store; its name must change with everything that the ids depend on.
        plan: how the source is cut.
        encode: encodes a span of source rows. Must give the same for a row whatever the span.
        num_proc: processes; with 1 everything happens in this one.

    Raises:
        Exception: what ``encode`` raises; parts that are done stay.
        OSError: the folder cannot be written to, or is full.
        RuntimeError: a worker process was killed.
    """
    folder = Path(folder)
    try:
        return TokenStore(folder)
    except FileNotFoundError:
        pass
    with _named_folder(folder), _only_builder(folder, plan.source):
        found = read_plan(folder)
        if found is None or (found.rows, found.rows_per_part) != (plan.rows, plan.rows_per_part):
            remove_leftovers(folder, 'part-*')
            write_plan(folder, plan)
        remove_leftovers(folder, '*.tmp')
        missing = [part for part in range(plan.parts) if not part_is_whole(folder, part)]
        if len(missing) < plan.parts:
            log.info('%s: %d of %d parts are tokenised already', plan.source, plan.parts - len(missing), plan.parts)
        num_proc = min(num_proc, len(missing))
        progress = _Progress(plan, missing)
        if num_proc > 1:
            _in_processes(folder, plan, encode, missing, num_proc, progress)
        else:
            for part in missing:
                progress.add(write_part(folder, plan, part, encode(*plan.span(part))))
    return TokenStore(folder)


@contextlib.contextmanager
def _named_folder(folder: Path) -> Iterator[None]:
    """Makes the folder. Errors of its disk (no space, no permission) say what to set."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        text = f'token ids cannot be written to {folder}: {e.strerror}. Set LLMFOUNDRY_CACHE to a folder with space (4 bytes per token); parts that are done are kept'
        raise type(e)(e.errno, text) from e


@contextlib.contextmanager
def _only_builder(folder: Path, source: str) -> Iterator[None]:
    """Holds the folder's lock, which the kernel releases when the holder is killed."""
    lock = FileLock(folder / '.lock')
    try:
        lock.acquire(timeout=1)
    except Timeout:
        log.info('%s: another process is tokenising it; waiting for %s', source, folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class _Progress:
    """Logs how far a build is, at most every ten seconds."""

    def __init__(self, plan: StorePlan, missing: list[int]) -> None:
        self.source = plan.source
        self.total = sum(stop - start for start, stop in map(plan.span, missing))
        self.done = StoreCounts()
        self.start = self.last = time.monotonic()

    def add(self, counts: StoreCounts) -> None:
        self.done += counts
        now = time.monotonic()
        if now - self.last >= _REPORT_EVERY_S or (self.done.rows == self.total and now - self.start >= _REPORT_EVERY_S):
            self.last = now
            rate = self.done.tokens / (now - self.start)
            log.info('%s: tokenised %s of %s rows, %s tokens/s', self.source, f'{self.done.rows:,}', f'{self.total:,}', f'{rate:,.0f}')


def _run_part(part: int) -> StoreCounts:
    assert _job is not None, 'the worker was forked before the job was set'
    folder, plan, encode = _job
    return write_part(folder, plan, part, encode(*plan.span(part)))


def _in_processes(folder: Path, plan: StorePlan, encode: Encode, missing: list[int], num_proc: int, progress: _Progress) -> None:
    """Makes parts in forked processes. The first part that fails ends the build; the error is that of the lowest-numbered one that failed."""
    global _job
    _job = (folder, plan, encode)
    try:
        with ProcessPoolExecutor(num_proc, mp_context=multiprocessing.get_context('fork')) as pool:
            futures = [pool.submit(_run_part, part) for part in missing]
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=_REPORT_EVERY_S, return_when=FIRST_EXCEPTION)
                failed = [f for f in futures if f in done and not f.cancelled() and f.exception() is not None]
                if failed:
                    pool.shutdown(wait=True, cancel_futures=True)
                    error = next(f.exception() for f in futures if f.done() and not f.cancelled() and f.exception() is not None)
                    assert error is not None
                    raise error
                for future in done:
                    progress.add(future.result())
    except BrokenProcessPool as e:
        raise RuntimeError(
            f'{plan.source}: a tokenising process was killed, probably for lack of memory; parts that are done are kept. Start again, with a smaller MAX_NUM_PROC (now {num_proc} processes).'
        ) from e
    finally:
        _job = None
