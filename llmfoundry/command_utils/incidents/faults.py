"""Which rank failed first: one file per run and node, written once, that every other rank reads before it chooses its own exit code."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from llmfoundry.command_utils.incidents import procs
from llmfoundry.command_utils.incidents.record import RankState, read_records

__all__ = ['HANG_EXIT_CODE', 'Fault', 'fault_of_dead_rank', 'first_fault', 'publish', 'wait_for_fault_of_another']

# As coreutils' timeout says it.
HANG_EXIT_CODE = 124
_FILE = 'fault.json'
_POLL_S = 0.05


@dataclass(frozen=True)
class Fault:
    """The first thing that went wrong.

    ``kind`` is one of: exception, hang, killed (a signal that nobody can catch), crashed (a signal of the process's own making), stopped (SIGTERM, SIGINT), launcher gone, node lost.
    ``rank`` is the one whose fault it is, ``detected_by`` the one that says so. ``cause`` is the class of an exception, for nodes that cannot read its bundle; ``note`` what was seen.
    """

    rank: int
    host: str
    kind: str
    code: int
    time: float
    detected_by: int
    note: str = ''
    cause: str = ''


def publish(folder: Path, fault: Fault) -> Fault:
    """Writes the fault unless there is one; returns the one that stands."""
    temporary = folder / f'.fault.{os.getpid()}.{threading.get_ident()}'
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(asdict(fault)), encoding='utf-8')
        with contextlib.suppress(FileExistsError):
            os.link(temporary, folder / _FILE)
        temporary.unlink()
    return first_fault(folder) or fault


def first_fault(folder: Path) -> Fault | None:
    """The fault that stands, if there is one."""
    try:
        return Fault(**json.loads((folder / _FILE).read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError):
        return None


def fault_of_dead_rank(state: RankState, detected_by: int) -> Fault | None:
    """The fault of a rank that is not alive: what it said itself, else what the kernel says. None for one that lives, and for one that ended well."""
    if state.alive:
        return None
    if state.ended:
        return None if state.exit_code == 0 else Fault(state.rank, state.host, 'exception', state.exit_code, state.entered, detected_by)
    status = procs.exit_status(state.pid, state.ticks)
    if status is None:  # its parent has asked already; a process that could not say a word was killed, in nearly all cases
        return Fault(state.rank, state.host, 'killed', 137, time.time(), detected_by, 'its exit code was not seen')
    code = procs.code_of_status(status)
    if code == 0:
        return None
    kind = 'exception' if code < 128 else 'killed' if procs.signal_name(code) == 'SIGKILL' else 'stopped' if procs.signal_name(code) in ('SIGTERM', 'SIGINT', 'SIGHUP') else 'crashed'
    return Fault(state.rank, state.host, kind, code, time.time(), detected_by)


def wait_for_fault_of_another(folder: Path, rank: int, seconds: float) -> Fault | None:
    """The fault of another rank, waited for: a broken connection is often noticed before the one who broke it has said so."""
    deadline = time.monotonic() + seconds
    while True:
        fault = first_fault(folder)
        if fault is None:
            dead = [f for state in read_records(folder) if state.rank != rank and (f := fault_of_dead_rank(state, rank)) is not None]
            fault = publish(folder, min(dead, key=lambda f: f.time)) if dead else None
        if fault is not None:
            return fault if fault.rank != rank or fault.detected_by != rank else None
        if time.monotonic() >= deadline:
            return None
        time.sleep(_POLL_S)
