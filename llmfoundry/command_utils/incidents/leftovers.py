"""Removes the shared memory and run folders of runs that are dead, when nobody is left in whom an exit handler could do it.

The next start would clear them too (``data.shm_hygiene``, which wrote them down); but after a run that is never started again they would stay. Same rule, standard library only: a
folder whose ``owner.json`` nobody holds a lock on belongs to a dead run, and exactly the blocks that it names are its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from pathlib import Path

from llmfoundry.command_utils.incidents import procs
from llmfoundry.command_utils.incidents.record import read_records

__all__ = ['prune', 'remove_of_dead_runs']

# Loader workers notice within five seconds that their parent is dead, and hold its locks until then.
_WORKERS_END_S = 8.0
_POLL_S = 0.5
_KEPT_S = 14 * 24 * 3600.0
_BEING_MADE_S = 60.0
_SHARED_MEMORY = Path('/dev/shm')


def remove_of_dead_runs(pids: set[int]) -> None:
    """Clears the dead runs of this user, and waits a little for the workers of those with an owner in ``pids``."""
    deadline = time.monotonic() + _WORKERS_END_S
    while _clear() & pids and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _clear() -> set[int]:
    """One round; returns the owners of the runs that somebody still holds."""
    held: set[int] = set()
    for owner in sorted(Path(os.environ.get('TMPDIR') or '/tmp', f'llmfoundry-runs-{os.getuid()}').glob('run-*/owner.json')):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(owner, 'r+b') as f:
            record = json.loads(f.read())
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.add(int(record['pid']))
                continue
            for prefix in record['shm_prefixes']:
                for block in _SHARED_MEMORY.glob(f'{int(prefix):06d}_*'):
                    block.unlink(missing_ok=True)
            shutil.rmtree(owner.parent, ignore_errors=True)
    return held


def prune(root: Path) -> None:
    """Removes, from the folder of incidents in the temp folder, live folders whose launcher is gone and bundles of two weeks ago; a machine that lost its power left both."""
    for folder in root.glob('*-*'):
        with contextlib.suppress(OSError, ValueError):
            age_s = time.time() - folder.stat().st_mtime
            kind, *numbers = folder.name.split('-')
            is_dead = kind == 'live' and not procs.is_alive(int(numbers[0]), int(numbers[1])) and not any(r.alive for r in read_records(folder))
            if (is_dead and age_s > _BEING_MADE_S) or (kind == 'run' and age_s > _KEPT_S):
                shutil.rmtree(folder, ignore_errors=True)
