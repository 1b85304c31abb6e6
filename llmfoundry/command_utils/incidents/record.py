"""The live record: what a rank is doing now, in a small file mapped into memory, readable by other processes at any time and after its death.

A heartbeat that is written to disk is as old as its interval, and cannot be written to a full disk. A page of memory behind a file is exact, costs under a microsecond to update,
and outlives ``kill -9`` of its writer. All records of a launcher's ranks on a node lie in one folder, the *live folder*, named after the launcher. Standard library only.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import socket
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmfoundry import dist, phases, whole_files
from llmfoundry.command_utils.incidents import procs

__all__ = ['LiveRecord', 'RankState', 'incidents_root', 'live_folder', 'read_records', 'write_whole']

_SIZE = 4096
_IDENTITY_AT = 512
# beats, phase, entered, step, samples, tokens, epoch, batch in epoch, sample in epoch, ended, exit code
_FORMAT = struct.Struct('<qidqqqqqqii')
_PHASE_NUMBER = {name: i for i, name in enumerate(phases.PHASES)}


def incidents_root() -> Path:
    """Where this user's incident folders are when the save folder cannot hold them."""
    return Path(os.environ.get('TMPDIR') or tempfile.gettempdir(), f'llmfoundry-incidents-{os.getuid()}')


def live_folder() -> Path:
    """The folder that the ranks of one launcher on one node share, or that a process without launcher has for itself."""
    pid = os.getppid() if dist.get_world_size() > 1 else os.getpid()
    return incidents_root() / f'live-{pid}-{procs.start_ticks(pid)}'


def write_whole(path: Path, text: str) -> bool:
    """Writes a file whole or not at all; returns whether it is there. A full or read-only disk is no reason to fail while failing."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        whole_files.write_whole(path, text, path.with_name(f'.{path.name}.{os.getpid()}'))
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class RankState:
    """What was read from a live record. ``entered`` is the wall-clock time of the last progress; ``ended`` says that the rank itself has set ``exit_code``."""

    rank: int
    local_rank: int
    host: str
    pid: int
    ticks: int
    world_size: int
    started: float
    beats: int
    phase: str
    entered: float
    step: int
    samples: int
    tokens: int
    epoch: int
    batch_in_epoch: int
    sample_in_epoch: int
    ended: bool
    exit_code: int

    @property
    def alive(self) -> bool:
        """Whether the process runs; asks the kernel of this node."""
        return procs.is_alive(self.pid, self.ticks)

    def summary(self) -> dict[str, Any]:
        """What other ranks are told: small, and without what only this node can use."""
        return {
            'rank': self.rank, 'host': self.host, 'phase': self.phase, 'seconds_in_phase': round(time.time() - self.entered, 1), 'step': self.step, 'beats': self.beats,
            'alive': self.alive or self.ended, 'ended': self.ended, 'exit_code': self.exit_code if self.ended else None,
        }  # fmt: skip


class LiveRecord:
    """This process's record. Once made, every change of phase and every report of progress lands in it.

    Args:
        folder: the live folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._code: int | None = None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        rank = dist.get_global_rank()
        identity = {
            'rank': rank, 'local_rank': dist.get_local_rank(), 'host': socket.gethostname(), 'pid': os.getpid(), 'ticks': procs.start_ticks(os.getpid()),
            'world_size': dist.get_world_size(), 'started': time.time(),
        }  # fmt: skip
        data = bytearray(_SIZE)
        text = json.dumps(identity).encode()
        data[_IDENTITY_AT:_IDENTITY_AT + len(text)] = text
        path = folder / f'rank{rank}.live'
        temporary = folder / f'.rank{rank}.{os.getpid()}'
        temporary.write_bytes(data)
        fd = os.open(temporary, os.O_RDWR)
        try:
            self._page = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)
        self.update()
        os.replace(temporary, path)
        phases.publish_to(self.update)
        os.register_at_fork(after_in_child=lambda: phases.publish_to(None))  # a loader's worker shares the page

    def update(self) -> None:
        """Copies phase and progress into the page."""
        p = phases.progress
        ended = self._code is not None
        _FORMAT.pack_into(
            self._page, 0, phases.beats(), _PHASE_NUMBER.get(phases.current(), 0), time.time() - phases.seconds_in(), p.step, p.samples, p.tokens, p.epoch, p.batch_in_epoch,
            p.sample_in_epoch, int(ended), self._code or 0,
        )  # fmt: skip

    def end(self, code: int) -> None:
        """Says that this process ends by itself, with ``code``."""
        self._code = code
        self.update()

    def remove_if_last(self) -> None:
        """Removes the live folder when all of the node's ranks have ended; for runs that end before they have a watcher."""
        states = read_records(self.folder)
        if len(states) >= dist.get_local_world_size() and all(s.ended for s in states):
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Stops publishing; the file stays for the watcher."""
        phases.publish_to(None)


def read_records(folder: Path) -> list[RankState]:
    """Every record of a live folder, in the order of ranks."""
    found = []
    for path in folder.glob('rank*.live'):
        with contextlib.suppress(OSError, ValueError, struct.error):
            data = path.read_bytes()
            beats, phase, entered, step, samples, tokens, epoch, batch, sample, ended, code = _FORMAT.unpack_from(data)
            identity = json.loads(data[_IDENTITY_AT:].rstrip(b'\0'))
            found.append(RankState(
                **identity, beats=beats, phase=phases.PHASES[phase], entered=entered, step=step, samples=samples, tokens=tokens, epoch=epoch, batch_in_epoch=batch, sample_in_epoch=sample,
                ended=bool(ended), exit_code=code,
            ))  # fmt: skip
    return sorted(found, key=lambda r: r.rank)
