"""Which part of a step this process is in: one module-wide word that a crash report, the watchdog and the other ranks read.

A hang leaves no traceback, so somebody has to have written down beforehand what the process was doing. That must cost nothing: setting a phase is two reads of the clock and three
assignments, without a lock. Only the main thread sets phases (an upload in the background does not change what training waits for); any thread may read them, and sees
at worst the word of one assignment ago.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Callable

__all__ = ['PHASES', 'beat', 'beats', 'current', 'enter', 'limits', 'phase', 'phase_of', 'progress', 'publish_to', 'report', 'seconds_in', 'spent']

PHASES = ('start', 'data', 'forward', 'backward', 'collective', 'optimizer', 'callback', 'eval', 'checkpoint', 'end')

_PHASE_OF_ERROR = '_llmfoundry_phase'
_phase = 'start'
_since = time.monotonic()
_beats = 0
_spent: dict[str, float] = {}
_main_thread = threading.main_thread
# Seconds that a phase may take without progress, where that differs from the watchdog's own rule.
limits: dict[str, float] = {}
_publish: Callable[[], None] | None = None


@dataclass
class Progress:
    """How far training has come: steps done, samples and tokens of all ranks, and the position of the loader. ``source`` says what the loader reads."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    epoch: int = 0
    batch_in_epoch: int = 0
    sample_in_epoch: int = 0
    source: str = ''


progress = Progress()


def report(**values: int | str) -> None:
    """Sets fields of ``progress``."""
    for name, value in values.items():
        setattr(progress, name, value)
    if _publish is not None:
        _publish()


def publish_to(publish: Callable[[], None] | None) -> None:
    """Has ``publish`` called, in the main thread, after every change; None ends that."""
    global _publish
    _publish = publish


def current() -> str:
    """The phase that this process is in, one of ``PHASES``."""
    return _phase


def seconds_in() -> float:
    """Seconds since the phase was entered or ``beat`` was called last."""
    return time.monotonic() - _since


def beats() -> int:
    """A number that grows whenever the process makes progress; one that stands still is what a watchdog looks for."""
    return _beats


def spent() -> dict[str, float]:
    """Phase -> seconds that it has taken so far; the running one is counted from when it was entered."""
    totals = dict(_spent)
    totals[_phase] = totals.get(_phase, 0.0) + seconds_in()
    return totals


def enter(name: str) -> str:
    """Sets the phase (one of ``PHASES``) and returns the one before; from another thread than the main one it does nothing."""
    global _phase, _since, _beats
    before = _phase
    if threading.current_thread() is not _main_thread():
        return before
    now = time.monotonic()
    _spent[before] = _spent.get(before, 0.0) + now - _since
    _beats += 1  # before the phase: who reads the phase and then the beats never takes a new phase for one that has lasted
    _phase, _since = name, now
    if _publish is not None:
        _publish()
    return before


def beat() -> None:
    """Progress within a long phase: one more file written, one more batch evaluated."""
    enter(_phase)


class phase:  # noqa: N801  (used as a function: ``with phases.phase('checkpoint'):``)
    """The phase within a ``with`` block; the one before is restored after it, also when the block raises.

    Args:
        name: one of ``PHASES``.

    Raises:
        ValueError: another name.
    """

    __slots__ = ('_before', '_name')

    def __init__(self, name: str) -> None:
        if name not in PHASES:
            raise ValueError(f'{name!r} is not a phase; phases are {", ".join(PHASES)}')
        self._name = name

    def __enter__(self) -> None:
        self._before = enter(self._name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # The innermost phase that an exception left is where it happened; by the time that it ends the run, the phase before is back.
        if error is not None and phase_of(error) is None:
            with contextlib.suppress(AttributeError):  # exceptions with slots
                setattr(error, _PHASE_OF_ERROR, self._name)
        enter(self._before)


def phase_of(error: BaseException | None) -> str | None:
    """The phase that was left by ``error``, or by the error that caused it; None where no ``with`` block saw it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if (name := getattr(error, _PHASE_OF_ERROR, None)) is not None:
            return name
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None
