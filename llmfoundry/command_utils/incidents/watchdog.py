"""The thread of each rank that sees what the training thread cannot: signals while it waits in native code, no progress, a launcher that is gone, another rank's fault.

Python runs signal handlers in the main thread between two instructions, so one that waits in a collective never runs them. The interpreter's wake-up descriptor is written by the C handler
at once, and this thread reads it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Callable

from llmfoundry import dist, phases
from llmfoundry.command_utils.incidents import inquiry
from llmfoundry.command_utils.incidents.faults import Fault, first_fault

__all__ = ['ENDING_SIGNALS', 'Watchdog', 'limit_for']

ENDING_SIGNALS = (signal.SIGTERM,)
LAUNCHER_GONE_EXIT_CODE = 129  # as after SIGHUP, which is what a terminal that goes away sends
_POLL_S = 0.25
# Starting may take hours (a data set is tokenised, weights are fetched) and waits for nobody; what waits for it has a time limit of its own.
_UNLIMITED = ('start', 'end')
_CHECKPOINT_FACTOR = 3
# The training thread gets this long to end by itself, with its own exception and its own clean-up.
_GRACE_OF_FAULT_S = 5.0
_GRACE_OF_STOP_S = 10.0


def limit_for(timeout_s: float, phase: str) -> float:
    """Seconds without progress after which a rank counts as hanging; just less than the collectives' limit, whose errors do not name a cause."""
    if phase in phases.limits:
        return phases.limits[phase]
    if phase in _UNLIMITED:
        return float('inf')
    return (timeout_s - min(10.0, 0.1 * timeout_s)) * (_CHECKPOINT_FACTOR if phase == 'checkpoint' else 1)


class Watchdog(threading.Thread):
    """Looks four times a second.

    Args:
        folder: the live folder.
        timeout_s: ``dist_timeout``.
        wakeup: the socket that the interpreter writes signal numbers to.
        end: called in this thread to end the process for a fault; it does not return unless the training thread is ending the process already.
        find_culprit: names the rank that holds the others up.
        launcher: process id of the launcher, or None when there is none to watch.
    """

    def __init__(
        self, folder: Path, timeout_s: float, wakeup: socket.socket | None, end: Callable[[Fault], None], find_culprit: Callable[[], Fault], launcher: int | None,
    ) -> None:
        super().__init__(name='llmfoundry-watchdog', daemon=True)
        self.folder, self.timeout_s, self.wakeup, self.launcher = folder, timeout_s, wakeup, launcher
        self.end, self.find_culprit = end, find_culprit
        self.stopped_by: int | None = None
        self._due: list[tuple[float, Fault]] = []
        self._ending = threading.Event()

    def run(self) -> None:
        seen, since, last_look = phases.beats(), time.monotonic(), time.monotonic()
        while not self._ending.is_set():
            self._wait()
            now = time.monotonic()
            if now - last_look > 10 * _POLL_S:  # this process was stopped, or starved; so its lack of progress says nothing
                since = now
            last_look = now
            phase, beats = phases.current(), phases.beats()  # in this order
            if beats != seen:
                seen, since = beats, now
            inquiry.answer_if_asked(self.folder)
            self._look_at_others()
            if now - since > limit_for(self.timeout_s, phase):
                self.end(self.find_culprit())
                since = time.monotonic()  # only reached when the training thread ends the process already
            for fault in [f for due, f in self._due if now >= due]:
                self.end(fault)

    def close(self) -> None:
        """Ends the thread."""
        self._ending.set()

    def _wait(self) -> None:
        if self.wakeup is None:
            time.sleep(_POLL_S)
            return
        ready, _, _ = select.select([self.wakeup], [], [], _POLL_S)
        for number in self.wakeup.recv(64) if ready else b'':
            if number in ENDING_SIGNALS and self.stopped_by is None:
                self.stopped_by = number
                known = first_fault(self.folder)
                grace_s = _POLL_S if known is not None and known.rank != dist.get_global_rank() else _GRACE_OF_STOP_S
                self._later(grace_s, known or self._fault('stopped', 128 + number, f'{signal.Signals(number).name} from outside'))

    def _look_at_others(self) -> None:
        if self._due:
            if (known := first_fault(self.folder)) is not None and self.stopped_by is not None:
                self._due = [(min(due, time.monotonic() + 1.0), known) for due, _ in self._due]
            return
        known = first_fault(self.folder)
        if known is not None:
            self._later(0.0 if known.kind == 'hang' else _GRACE_OF_FAULT_S, known)
        elif self.launcher is not None and os.getppid() != self.launcher:
            self._later(0.0, self._fault('launcher gone', LAUNCHER_GONE_EXIT_CODE, f'the launcher (pid {self.launcher}) is gone; ranks do not train on without it'))

    def _later(self, seconds: float, fault: Fault) -> None:
        self._due.append((time.monotonic() + seconds, fault))

    def _fault(self, kind: str, code: int, note: str) -> Fault:
        rank = dist.get_global_rank()
        return Fault(rank, socket.gethostname(), kind, code, time.time(), rank, note)
