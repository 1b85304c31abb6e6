"""Who holds the others up: ranks of a node are asked what they wait for, and the one that waits for nobody is the one they all wait for.

A rank that sits in a collective looks the same whether its peer reads data, hangs in a callback, was stopped or is gone. So whoever notices that nothing moves asks; each rank's watchdog
answers with its main thread's stack. One that cannot even answer is named for that.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from llmfoundry import dist, phases
from llmfoundry.command_utils.incidents.faults import HANG_EXIT_CODE, Fault, fault_of_dead_rank, first_fault
from llmfoundry.command_utils.incidents.record import RankState, read_records, write_whole
from llmfoundry.command_utils.incidents.stacks import main_stack

__all__ = ['answer_if_asked', 'find_culprit', 'wait_for_end_of_leader']

_QUESTION = 'question'
_ANSWER_S = 1.0
_POLL_S = 0.05


def _answer_file(folder: Path, rank: int) -> Path:
    return folder / f'rank{rank}.answer'


def answer_if_asked(folder: Path) -> None:
    """Answers once, when somebody has asked; called often."""
    own = _answer_file(folder, dist.get_global_rank())
    if (folder / _QUESTION).exists() and not own.exists():
        write_whole(own, json.dumps({'waiting_in': main_stack().waiting_in, 'phase': phases.current()}))


def find_culprit(folder: Path, host: str, peers: list[dict[str, Any]]) -> Fault:
    """Asks, waits a second for the answers, and names the rank that the others wait for.

    Args:
        folder: the live folder of the node.
        host: this machine's name.
        peers: what the courier knows of the ranks of other nodes; those with ``lost`` have not been heard of.
    """
    with contextlib.suppress(OSError):
        (folder / _QUESTION).touch()
    answer_if_asked(folder)
    rank = dist.get_global_rank()
    states = read_records(folder)
    deadline = time.monotonic() + _ANSWER_S
    while time.monotonic() < deadline and not all(_answer_file(folder, s.rank).exists() or not s.alive for s in states):
        if (known := first_fault(folder)) is not None:
            return known
        time.sleep(_POLL_S)
    for state in states:
        if (fault := fault_of_dead_rank(state, rank)) is not None:
            return fault
    answers = {s.rank: _read(_answer_file(folder, s.rank)) for s in states}
    silent = [s for s in states if answers[s.rank] is None and s.alive]
    free = [s for s in states if (a := answers[s.rank]) is not None and not a['waiting_in']]
    if silent:
        return _hang(silent[0], rank, 'the process does not answer: it was stopped (SIGSTOP), or native code does not return')
    if free:
        return _hang(min(free, key=lambda s: (s.step, s.entered)), rank, '')
    if lost := [p for p in peers if p.get('lost')]:
        return Fault(lost[0]['rank'], lost[0]['host'], 'node lost', HANG_EXIT_CODE, time.time(), rank, f'nothing has been heard of it for {lost[0]["silent_s"]:.0f} s')
    return Fault(rank, host, 'hang', HANG_EXIT_CODE, time.time(), rank)


def wait_for_end_of_leader(folder: Path, seconds: float) -> None:
    """Waits until local rank 0 has ended or says that it is about to, so that what it prints is not cut off by the launcher's SIGTERM."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        leaders = [s for s in read_records(folder) if s.local_rank == 0]
        if leaders and (leaders[0].ended or not leaders[0].alive):
            return
        time.sleep(_POLL_S)


def _hang(state: RankState, detected_by: int, note: str) -> Fault:
    return Fault(state.rank, state.host, 'hang', HANG_EXIT_CODE, time.time(), detected_by, note)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
