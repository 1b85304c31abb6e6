"""Keeps Streaming's shared memory from outliving a run, and leftovers of dead runs from stopping the next one.

Each StreamingDataset owns blocks ``/dev/shm/NNNNNN_*`` and two lock files ``NNNNNN_*_filelock`` in the temp folder, under the first free number.
``kill -9`` of a job leaves the blocks, even a clean exit leaves the lock files, and Streaming's ``clean_stale_shared_memory`` stops at the first gap and may unlink what a live job uses.

Here every run gets a folder of its own, in which the number is written down *before* the blocks are made, and whose ``owner.json`` the owner holds an ``flock`` on. The kernel
drops that lock when the owner dies, however it dies: at each start the folders without a live owner are cleared, together with exactly the blocks that they name. Blocks that no folder of
ours names belong to someone else; they are left alone and their numbers are not used. The alternative, comparing process ids and start times, mistakes jobs in other
containers for dead ones; both are recorded all the same, for the reader.

Between the choice of a number and its blocks lies a collective, so a lock over both would stop two launchers of one job on one machine, each of which waits for the other. Instead
the number is reserved by a file of its own, ``NNNNNN_reserved``, beside the blocks: seen by all users and containers that share the numbers, and held by an ``flock`` as well.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import shared_memory
from pathlib import Path
from typing import Callable, Iterator

from streaming.base import distributed as streaming_dist
from streaming.base.constant import BARRIER_FILELOCK, SHM_TO_CLEAN

from llmfoundry.errors import DataError

__all__ = ['RunFolder', 'SharedFailure', 'clean_dead_runs', 'exclusive_start', 'prefixes_in_use', 'runs_folder']

log = logging.getLogger(__name__)

_SHM_ROOT = Path('/dev/shm')
_RESERVED = 'reserved'
_BLOCK = re.compile(rf'^(\d{{6}})_({"|".join((*SHM_TO_CLEAN, _RESERVED))})$')
_OWNER_FILE = 'owner.json'
_WORKER_EXIT_TIMEOUT_S = 5.0
# A folder without owner file is either being made, which takes milliseconds, or was left by a worker that outlived its parent.
_OWNERLESS_AGE_S = 600.0


@dataclass
class RunFolder:
    """The folder of this process's run; ``pid`` tells a forked child that it is not the owner."""

    path: str
    pid: int
    owner_fd: int | None = None
    prefixes: list[int] = field(default_factory=list)

    def record(self, prefix: int) -> None:
        """Writes down that this run owns the blocks of ``prefix``, by the owner only."""
        self.prefixes.append(prefix)
        if self.owner_fd is not None:
            _write_owner(self.owner_fd, self.prefixes)


_current: RunFolder | None = None


def runs_folder() -> Path:
    """Where this user's run folders are; kept apart per user, since only the owner may unlink."""
    return Path(os.environ.get('TMPDIR') or '/tmp', f'llmfoundry-runs-{os.getuid()}')


def prefixes_in_use() -> set[int]:
    """Numbers under which any shared-memory block of Streaming, or a reservation, exists on this machine (Linux; elsewhere nothing can be listed)."""
    with contextlib.suppress(OSError):
        return {int(match.group(1)) for name in os.listdir(_SHM_ROOT) if (match := _BLOCK.match(name))}
    return set()


def clean_dead_runs() -> list[int]:
    """Removes the folders of this user's runs whose owner is dead, with the shared memory that they name.

    Returns:
        The numbers that were freed.
    """
    for marker in _SHM_ROOT.glob(f'[0-9]*_{_RESERVED}'):
        _remove_if_dead(marker)
    freed: list[int] = []
    for owner_file in sorted(runs_folder().glob(f'run-*/{_OWNER_FILE}')):
        try:
            fd = os.open(owner_file, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            continue
        try:
            for prefix in _recorded_prefixes(fd):
                _unlink_blocks(prefix)
                freed.append(prefix)
            shutil.rmtree(owner_file.parent, ignore_errors=True)
        finally:
            os.close(fd)
    for folder in runs_folder().glob('run-*'):
        with contextlib.suppress(OSError):
            if not (folder / _OWNER_FILE).exists() and time.time() - folder.stat().st_mtime > _OWNERLESS_AGE_S:
                shutil.rmtree(folder, ignore_errors=True)
    if freed:
        log.info('Removed the shared memory of dead runs: %s', ', '.join(f'{p:06d}_*' for p in freed))
    return freed


class SharedFailure(threading.Event):
    """An event that is also set, within a moment, in every other process of the run's node: by a file, which holds the reason.

    Streaming sets a plain Event when a download thread fails. Other workers do not see it, and one that waits for the same shard waits for ever.
    """

    _CHECK_EVERY_S = 0.1

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._next_check = 0.0

    def is_set(self) -> bool:
        if super().is_set():
            return True
        if time.monotonic() >= self._next_check:
            if os.path.exists(self._path):
                super().set()
                return True
            self._next_check = time.monotonic() + self._CHECK_EVERY_S
        return False

    def publish(self, reason: str) -> None:
        """Sets the event everywhere; the first reason is kept."""
        # Written elsewhere and linked, so that no reader sees half of it.
        temporary = f'{self._path}.{os.getpid()}.{threading.get_ident()}'
        with contextlib.suppress(OSError):
            Path(temporary).write_text(reason, encoding='utf-8')
            with contextlib.suppress(FileExistsError):
                os.link(temporary, self._path)
            os.unlink(temporary)
        self.set()

    def reason(self) -> str:
        """What was published, or an empty string."""
        with contextlib.suppress(OSError):
            return Path(self._path).read_text(encoding='utf-8')
        return ''


@contextlib.contextmanager
def exclusive_start(check: Callable[[], None] | None = None) -> Iterator[None]:
    """Build a StreamingDataset inside this context, on all ranks at once.

    The node's first rank runs ``check``, clears dead runs, and reserves and writes down the number that Streaming is about to take. Every rank then sees the run's folder as the temp folder while the dataset is built. The environment is not changed, so caches of other libraries stay where they are.

    Args:
        check: looks at local files, once per node; a DataError that it raises is raised on every rank, instead of leaving the others at a barrier.
    """
    started_dist = streaming_dist.maybe_init_dist()
    saved_tempdir = tempfile.tempdir
    try:
        with contextlib.ExitStack() as stack:
            is_leader = streaming_dist.get_local_rank() == 0
            outcome = _lead_start(stack, check) if is_leader else (None, None)
            path = _agree(outcome)
            run = _run_folder(path)
            tempfile.tempdir = run.path
            yield
    finally:
        tempfile.tempdir = saved_tempdir
        if started_dist:
            import torch.distributed

            torch.distributed.destroy_process_group()


def _lead_start(stack: contextlib.ExitStack, check: Callable[[], None] | None) -> tuple[str | None, DataError | None]:
    """The leader's part: returns the run folder's path, or the error that every rank shall raise."""
    try:
        if check is not None:
            check()
        clean_dead_runs()
        run = _run_folder(None)
        run.record(stack.enter_context(_next_prefix(run)))
    except DataError as e:
        return None, e
    except OSError as e:
        return None, DataError(f'cannot write to the temp folder: {e}. Set TMPDIR to a folder on a local disk with free space', file=str(runs_folder()))
    return run.path, None


def _agree(outcome: tuple[str | None, DataError | None]) -> str:
    """Every rank learns its node's folder, or raises the first error."""
    world_size, local_rank = streaming_dist.get_world_size(), streaming_dist.get_local_rank()
    outcomes = streaming_dist.all_gather_object(outcome) if world_size > 1 else [outcome]
    for _, error in outcomes:
        if error is not None:
            raise error
    path = outcomes[streaming_dist.get_rank() - local_rank if world_size > 1 else 0][0]
    assert path is not None
    return path


def _run_folder(path: str | None) -> RunFolder:
    """This process's run folder; ``path`` for a rank that follows its leader, None for the leader, who makes one."""
    global _current
    if _current is not None and _current.pid == os.getpid() and path in (None, _current.path):
        return _current
    if path is not None:
        _current = RunFolder(path, os.getpid())
        return _current
    base = runs_folder()
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    if base.stat().st_uid != os.getuid():
        raise PermissionError(f'{base} belongs to another user')
    path = tempfile.mkdtemp(prefix='run-', dir=base)
    # Locked under another name first: a job that starts now must not see an owner file that nobody holds yet.
    unlocked = os.path.join(path, f'{_OWNER_FILE}.new')
    fd = os.open(unlocked, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    _write_owner(fd, [])
    os.rename(unlocked, os.path.join(path, _OWNER_FILE))
    _current = RunFolder(path, os.getpid(), fd)
    atexit.register(_remove_at_exit, _current)
    return _current


def _remove_at_exit(run: RunFolder) -> None:
    # Runs after Streaming's own exit handlers, which were registered later and have unlinked the blocks by now.
    if run.pid != os.getpid():
        return
    # Loader workers end after this handler otherwise, and one that takes a file lock then makes the folder anew.
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(_WORKER_EXIT_TIMEOUT_S)
    shutil.rmtree(run.path, ignore_errors=True)


@contextlib.contextmanager
def _next_prefix(run: RunFolder) -> Iterator[int]:
    """Makes Streaming take a number that nobody uses, and reserves it until the context ends, when the blocks are there.

    Streaming takes the first number with neither blocks nor lock files, and stops with "Reused local directory" where foreign blocks name the same folder. A lock file makes it
    skip a number unseen, so leftovers that are not ours to remove cannot stop it.
    """
    own = {int(p.name[:6]) for p in Path(run.path).glob('[0-9]*_*filelock')}
    busy = prefixes_in_use()
    for prefix in count():
        if prefix in own:
            continue
        if prefix not in busy and (marker := _reserve(prefix)) is not None:
            break
        Path(run.path, f'{prefix:06d}_{BARRIER_FILELOCK}').touch()
    try:
        yield prefix
    finally:
        marker.release()


@dataclass
class _Marker:
    """A reservation; without a file where there is no folder of shared memory to see."""

    path: Path
    fd: int | None

    def release(self) -> None:
        if self.fd is not None:
            self.path.unlink(missing_ok=True)
            os.close(self.fd)


def _reserve(prefix: int) -> _Marker | None:
    """The reservation of ``prefix``, None if somebody else has it or has made its blocks."""
    path = _SHM_ROOT / f'{prefix:06d}_{_RESERVED}'
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return None
    except OSError as e:
        log.debug('Numbers of shared memory cannot be reserved (%s); two jobs that start in the same moment may collide', e)
        return _Marker(path, None)
    marker = _Marker(path, fd)
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A start that cleans may have taken the file for a dead one's before it was locked. Blocks may have appeared since the numbers in use were listed, made by one whose reservation has ended.
        if os.fstat(fd).st_nlink and not any((_SHM_ROOT / f'{prefix:06d}_{name}').exists() for name in SHM_TO_CLEAN):
            return marker
        if os.fstat(fd).st_nlink:
            path.unlink(missing_ok=True)
    os.close(fd)
    return None


def _remove_if_dead(marker: Path) -> None:
    """Removes a reservation that nobody holds."""
    with contextlib.suppress(OSError):
        fd = os.open(marker, os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:
                marker.unlink()
        finally:
            os.close(fd)


def _unlink_blocks(prefix: int) -> None:
    for name in SHM_TO_CLEAN:
        with contextlib.suppress(OSError):
            if _SHM_ROOT.is_dir():
                os.unlink(_SHM_ROOT / f'{prefix:06d}_{name}')
            else:
                shared_memory.SharedMemory(f'{prefix:06d}_{name}').unlink()


def _write_owner(fd: int, prefixes: list[int]) -> None:
    record = {'pid': os.getpid(), 'host': socket.gethostname(), 'started': time.strftime('%Y-%m-%dT%H:%M:%S'), 'shm_prefixes': prefixes}
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(record).encode(), 0)


def _recorded_prefixes(fd: int) -> list[int]:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return [int(p) for p in json.loads(os.pread(fd, 1 << 20, 0))['shm_prefixes']]
    return []
