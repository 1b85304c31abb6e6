"""The process that outlives a node's ranks: it notes how each of them ended, and prints the one summary. Standard library only, some 12 MB.

A rank killed with ``kill -9`` cannot report itself, and when all are killed, with their launcher, nobody else is left. This process has a session of its own, sleeps until one of the ranks
ends (pidfd), and ends within a moment after the last one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import sys
import time
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmfoundry import dist
from llmfoundry.command_utils.incidents import bundle, faults, leftovers, procs
from llmfoundry.command_utils.incidents.faults import Fault, first_fault
from llmfoundry.command_utils.incidents.record import RankState, incidents_root, read_records, write_whole
from llmfoundry.command_utils.incidents.summary import summarize

__all__ = ['main']

_POLL_S = 0.5
_MEMORY_SAMPLES = 10
# Ranks start within seconds of each other; one that has not shown up by then died before it could.
_LATE_S = 20.0
# Composer's and torch's launchers send SIGKILL 30 s after SIGTERM; ranks that outlive that have lost their launcher.
_LAST_RESORT_S = 45.0
_STUCK_S = 5.0


class Watcher:
    """One node's watcher.

    Args:
        live: the live folder.
        places: where bundles go.
        launcher: process id of the launcher, or None.
    """

    def __init__(self, live: Path, places: bundle.Places, launcher: int | None) -> None:
        self.live, self.places = live, places
        self.launcher = (launcher, procs.start_ticks(launcher)) if launcher else None
        self.expected = dist.get_local_world_size()
        self.known: dict[int, RankState] = {}
        self.fds: dict[int, int] = {}
        self.ended: dict[int, Fault | None] = {}
        self.memory: deque[dict[str, Any]] = deque(maxlen=_MEMORY_SAMPLES)
        self.resident: dict[int, int] = {}
        self.oom_kills = procs.oom_kills()

    def run(self) -> None:
        """Watches until all ranks are gone, then reports."""
        started, first_seen = time.monotonic(), None
        poller = select.poll()
        while True:
            self.known.update({state.rank: state for state in read_records(self.live)})
            states = [self.known[rank] for rank in sorted(self.known)]
            for state in states:
                self._look(state, poller)
            self._sample(states)
            missing = self.expected - len(states)
            late = not self.live.exists() or time.monotonic() - started > _LATE_S or (self.launcher is not None and not procs.is_alive(*self.launcher))
            if len(self.ended) == len(states) and (missing <= 0 or late):
                break
            if first_seen is None and first_fault(self.live) is not None:
                first_seen = time.monotonic()
            if first_seen is not None:
                self._kill_late(states, time.monotonic() - first_seen)
            poller.poll(_POLL_S * 1000)
        self._report(states)

    def _kill_late(self, states: list[RankState], seconds: float) -> None:
        """Ends what does not end by itself: a hanging rank that is stopped or stuck in native code cannot."""
        fault = first_fault(self.live)
        for state in states:
            is_stuck = fault is not None and fault.kind == 'hang' and fault.rank == state.rank
            if seconds > (_STUCK_S if is_stuck else _LAST_RESORT_S):
                procs.kill_same(state.pid, state.ticks, signal.SIGKILL)

    def _look(self, state: RankState, poller: select.poll) -> None:
        if state.rank in self.ended:
            return
        if state.rank not in self.fds and state.alive:
            with contextlib.suppress(OSError):
                self.fds[state.rank] = os.pidfd_open(state.pid)
                poller.register(self.fds[state.rank], select.POLLIN)
        if not state.alive:
            fault = faults.fault_of_dead_rank(state, state.rank)
            self.ended[state.rank] = fault
            if fault is not None:
                faults.publish(self.live, fault)
            if (fd := self.fds.pop(state.rank, None)) is not None:
                poller.unregister(fd)
                os.close(fd)

    def _sample(self, states: list[RankState]) -> None:
        self.memory.append(procs.memory_facts())
        for state in states:
            if state.rank not in self.ended and (rss := procs.resident_bytes(state.pid)):
                self.resident[state.rank] = rss

    def _report(self, states: list[RankState]) -> None:
        fault = first_fault(self.live)
        if fault is not None:
            self._complete_bundles(states, fault)
            bundles = [{**b, 'fault': asdict(fault)} for b in bundle.read_bundles(self.places.both()) if self._is_of_this_start(b, states)]
            if bundles and not _said_already(bundles, states):
                text = summarize(bundles, procs.oom_kills() > self.oom_kills)
                with contextlib.suppress(OSError):
                    print(text, file=sys.stderr, flush=True)
                write_whole(Path(bundles[0]['file']).parent / 'summary.txt', text + '\n')
        shutil.rmtree(self.live, ignore_errors=True)
        if any(self.ended.values()):
            _let_go_of_stderr()
            leftovers.remove_of_dead_runs({s.pid for s in states})

    def _complete_bundles(self, states: list[RankState], fault: Fault) -> None:
        written = {(b['pid'], b['ticks']) for b in bundle.read_bundles(self.places.both())}
        for state in states:
            own = self.ended.get(state.rank)
            if own is not None and (state.pid, state.ticks) not in written and own.kind != 'exception':
                crash = self.live / f'rank{state.rank}.crash'
                text = crash.read_text(errors='replace') if crash.exists() else ''
                bundle.write_bundle_for(self.places, state, fault, own.code, text, {**self._worst_memory(), 'rss': self.resident.get(state.rank)})

    def _worst_memory(self) -> dict[str, Any]:
        """The sample of the last seconds with the least left: after the kill there is room again."""
        return min(self.memory, key=lambda m: m.get('machine_available') or 0, default={})

    def _is_of_this_start(self, found: dict[str, Any], states: list[RankState]) -> bool:
        """Bundles of this node's ranks are known by their processes; those of other nodes, in a folder that nodes share, by the rank."""
        own = {s.rank: (s.pid, s.ticks) for s in states}
        return found['rank'] not in own or own[found['rank']] == (found['pid'], found['ticks'])


def _let_go_of_stderr() -> None:
    """Whoever reads the run's output to its end shall not wait for the clearing up."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def _said_already(bundles: list[dict[str, Any]], states: list[RankState]) -> bool:
    """Whether local rank 0 has printed a block that says it all: an explained error before training began, the same on every rank that left a word."""
    errors = [b['error'] for b in bundles if b['error'] is not None]
    leaders = {s.rank for s in states if s.local_rank == 0}
    said = [b['error'] for b in bundles if b['rank'] in leaders and b['error'] is not None and b['error']['explained'] and (b['phase'] == 'start' or b['world_size'] == 1)]
    return bool(said) and all((e['type'], e['message']) == (said[0]['type'], said[0]['message']) or not e['explained'] for e in errors)


def main() -> None:
    """Runs the watcher: one JSON argument with ``live``, ``folder``, ``fallback`` and ``launcher``."""
    arguments = json.loads(sys.argv[1])
    if os.fork() > 0:
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its ranks, not before them
    leftovers.prune(incidents_root())
    Watcher(Path(arguments['live']), bundle.Places(Path(arguments['folder']), Path(arguments['fallback'])), arguments['launcher']).run()


if __name__ == '__main__':
    main()
