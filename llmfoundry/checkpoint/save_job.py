"""One save in the background, on every rank: each does its part in a thread, rank 0 completes it, and all learn how it ended.

The threads talk through the process group's key-value store, not through collectives: two threads that use one communicator in different orders hang, and a group of its own would have to
exist on every rank for every backend. The end is agreed on by a collective of the main threads, at a step's end, so that all ranks raise the same error at the same step.
"""

from __future__ import annotations

import itertools
import pickle
import threading
import time
from typing import Any, Callable

from llmfoundry import dist, phases
from llmfoundry.errors import CheckpointError

__all__ = ['SaveJob']

_numbers = itertools.count()
_LONGEST_PAUSE_S = 0.5


class SaveJob:
    """A save that has been started.

    Args:
        work: this rank's part; what it returns must pickle.
        complete: called on rank 0 with what the ranks returned, in their order, when every one has succeeded.
        abandon: called on rank 0 when one has failed, before the error is known to the others.
        patience_s: seconds without news from the other ranks, after its own part, before rank 0 gives the save up.
    """

    def __init__(self, work: Callable[[], Any], complete: Callable[[list[Any]], None], abandon: Callable[[], None], patience_s: float = 600.0) -> None:
        self._work, self._complete, self._abandon = work, complete, abandon
        self.patience_s = patience_s
        self.error: BaseException | None = None
        self._key = f'llmfoundry/save/{next(_numbers)}'
        self._store = dist.default_store()
        # Not a daemon: an interpreter that ends by an error elsewhere finishes the checkpoint first.
        self._thread = threading.Thread(target=self._run, name='checkpoint')
        self._thread.start()

    def wait(self) -> None:
        """Blocks until the save has ended on this rank."""
        while self._thread.is_alive():
            self._thread.join(1.0)
            phases.beat()

    def ended(self) -> bool:
        """Whether it has ended on every rank; each rank must ask at the same point of its program."""
        return bool(dist.all_reduce_min(int(not self._thread.is_alive())))

    def raise_if_failed(self) -> None:
        """Raises what made the save fail, on every rank; each rank must call it at the same point, after the end."""
        if dist.all_reduce_min(int(self.error is None)) == 1:
            return
        errors = [e for e in dist.all_gather_objects(None if self.error is None else _portable(self.error)) if e is not None]
        raise self.error or errors[0]

    def _run(self) -> None:
        report: tuple[Any, BaseException | None] = (None, None)
        try:
            report = (self._work(), None)
        except Exception as e:  # carried to the main thread of every rank and raised there
            report = (None, e)
        try:
            self.error = self._lead(report) if dist.get_global_rank() == 0 else self._follow(report)
        except Exception as e:  # the store is gone with the process that held it
            self.error = report[1] or CheckpointError(f'save_folder: a checkpoint could not be completed, since the other ranks cannot be reached: {type(e).__name__}: {e}')
        self._work = self._complete = self._abandon = _nothing  # frees the copy of the state

    def _lead(self, mine: tuple[Any, BaseException | None]) -> BaseException | None:
        reports = [mine]
        if self._store is not None:
            missing = self._collect(reports)
            if missing:
                reports.append((None, CheckpointError(
                    f'save_folder: a checkpoint could not be completed: rank(s) {", ".join(map(str, missing))} did not report within {self.patience_s:.0f} s that their part is written. '
                    'Look at the output of those ranks.',
                )))
        error = next((e for _, e in reports if e is not None), None)
        try:
            if error is None:
                self._complete([value for value, _ in reports])
            else:
                self._abandon()
        except Exception as e:  # as above
            error = error or e
        if self._store is not None:
            self._store.set(f'{self._key}/outcome', pickle.dumps(None if error is None else _portable(error)))
        return error

    def _collect(self, reports: list[tuple[Any, BaseException | None]]) -> list[int]:
        """Appends the other ranks' reports; returns the ranks that stayed silent."""
        waiting = list(range(1, dist.get_world_size()))
        news, pause_s = time.monotonic(), 0.01
        found: dict[int, tuple[Any, BaseException | None]] = {}
        while waiting and time.monotonic() - news < self.patience_s:
            arrived = [rank for rank in waiting if self._store.check([f'{self._key}/{rank}'])]
            for rank in arrived:
                found[rank] = pickle.loads(self._store.get(f'{self._key}/{rank}'))
                self._store.delete_key(f'{self._key}/{rank}')
                waiting.remove(rank)
            if arrived:
                news = time.monotonic()
            else:
                time.sleep(pause_s)
                pause_s = min(_LONGEST_PAUSE_S, pause_s * 1.5)
        reports += [found[rank] for rank in sorted(found)]
        return waiting

    def _follow(self, report: tuple[Any, BaseException | None]) -> BaseException | None:
        """Reports to rank 0 and waits for its word; without a limit, since rank 0 may be uploading, and its death takes the store along."""
        if self._store is None:
            return report[1]
        value, error = report
        self._store.set(f'{self._key}/{dist.get_global_rank()}', pickle.dumps((value, None if error is None else _portable(error))))
        pause_s = 0.01
        while not self._store.check([f'{self._key}/outcome']):
            time.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, pause_s * 1.5)
        return pickle.loads(self._store.get(f'{self._key}/outcome'))


def _nothing(*args: Any) -> None:
    del args


def _portable(error: BaseException) -> BaseException:
    """The error, or one with its text if it does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a foreign exception's pickling raises
        return RuntimeError(f'{type(error).__name__}: {error}')
    return error
