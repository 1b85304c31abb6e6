"""The bundle that a rank leaves: one JSON file and its stacks, written whole or not at all.

``rank{N}.json`` is meant for programs and for ``llmfoundry incident``; ``rank{N}.stacks.txt`` for people.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Mapping

from llmfoundry import dist, phases
from llmfoundry._version import __version__
from llmfoundry.command_utils.incidents import procs, stacks
from llmfoundry.command_utils.incidents.faults import Fault
from llmfoundry.command_utils.incidents.record import RankState, incidents_root, write_whole

__all__ = ['Places', 'describe_error', 'places_for', 'read_bundles', 'set_older_aside', 'write_bundle', 'write_bundle_for']

FOLDER_VARIABLE = 'LLMFOUNDRY_INCIDENTS'
OLDER = 'older'
_PACKAGES = ('torch', 'mosaicml', 'mosaicml-streaming', 'transformers', 'peft')
_MESSAGE_CHARACTERS = 4000


@dataclass(frozen=True)
class Places:
    """Where bundles go: ``folder``, and ``fallback`` when that disk is full or may not be written to."""

    folder: Path
    fallback: Path

    def both(self) -> list[Path]:
        return list(dict.fromkeys([self.folder, self.fallback]))


def places_for(save_folder: str | None, run_name: str | None) -> Places:
    """The incident folder of a run: below a local save folder, else in the temp folder; the environment variable LLMFOUNDRY_INCIDENTS overrides both."""
    pid = os.getppid() if dist.get_world_size() > 1 else os.getpid()
    fallback = incidents_root() / (run_name or f'run-{pid}')
    if named := os.environ.get(FOLDER_VARIABLE):
        return Places(Path(named), fallback)
    if save_folder is None or '://' in save_folder or save_folder.startswith('dbfs:/'):
        return Places(fallback, fallback)
    # Below the part that all ranks share: '{rank}' in the folder must not scatter the bundles.
    shared = save_folder.replace('{run_name}', run_name or '').split('{')[0].rstrip('/')
    return Places(Path(shared or '.').absolute() / 'incidents' / (run_name or 'run'), fallback)


def set_older_aside(places: Places) -> None:
    """Moves this rank's bundle of an earlier start to ``older/``, so that what lies in the folder is of one start. Each rank moves its own, so none can hit another's."""
    for folder in places.both():
        for suffix in ('.json', '.stacks.txt'):
            path = folder / f'rank{dist.get_global_rank()}{suffix}'
            with contextlib.suppress(OSError):
                if path.exists():
                    (folder / OLDER).mkdir(exist_ok=True)
                    os.replace(path, folder / OLDER / path.name)


def describe_error(error: BaseException, explained: bool) -> dict[str, Any]:
    """Type, message, traceback, and the place in code that is not a library's, of an exception and its causes."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if 'site-packages' not in f.filename and '/lib/python' not in f.filename and not f.filename.startswith('<')]
    own = [f for f in frames if '/llmfoundry/' not in f.filename]
    place = (own or frames or [None])[-1]
    innermost = traceback.extract_tb(error.__traceback__)
    return {
        'type': type(error).__name__,
        'module': type(error).__module__,
        'bases': [c.__name__ for c in type(error).__mro__[1:-2]],
        'message': str(error)[:_MESSAGE_CHARACTERS],
        'chain': [{'type': type(e).__name__, 'module': type(e).__module__, 'message': str(e)[:_MESSAGE_CHARACTERS], 'errno': getattr(e, 'errno', None)} for e in chain],
        'explained': explained,
        'problems': [str(p) for p in getattr(error, 'problems', [])][:5],
        'rank': getattr(error, 'rank', None),
        'place': None if place is None else f'{place.filename}:{place.lineno} {place.name}',
        'in_user_code': bool(own),
        'innermost': f'{innermost[-1].filename}:{innermost[-1].lineno} {innermost[-1].name}' if innermost else None,
        'traceback': ''.join(traceback.format_exception(error)),
    }


def _versions() -> dict[str, str]:
    found = {'llmfoundry': __version__, 'python': platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _device_memory() -> dict[str, int]:
    torch = sys.modules.get('torch')
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    return {'device_allocated': torch.cuda.memory_allocated(), 'device_reserved': torch.cuda.memory_reserved(), 'device_peak': torch.cuda.max_memory_allocated()}


def write_bundle(
    places: Places, *, fault: Fault, code: int, live: Path, error: BaseException | None = None, explained: bool = False, peers: list[dict[str, Any]] | None = None,
) -> Path | None:
    """Writes this rank's bundle.

    Args:
        places: where to.
        fault: what started the end: this rank's own fault, or another's.
        code: the exit code that this rank will have.
        live: the live folder, for the stacks of workers.
        error: the exception that ends this rank.
        explained: the exception names its own cause.
        peers: what is known of the other ranks at this moment.

    Returns:
        The file, or None when no disk took it.
    """
    rank = dist.get_global_rank()
    stack = stacks.main_stack()
    content = {
        'rank': rank, 'local_rank': dist.get_local_rank(), 'node_rank': dist.get_node_rank(), 'world_size': dist.get_world_size(), 'local_world_size': dist.get_local_world_size(),
        'host': socket.gethostname(), 'pid': os.getpid(), 'ticks': procs.start_ticks(os.getpid()), 'master': f'{os.environ.get("MASTER_ADDR", "")}:{os.environ.get("MASTER_PORT", "")}',
        'time': _utc(time.time()), 'written_by': f'rank {rank}', 'fault': asdict(fault), 'exit_code': code,
        'phase': phases.phase_of(error) or phases.current(), 'seconds_in_phase': round(phases.seconds_in(), 2), 'phase_seconds': {k: round(v, 2) for k, v in phases.spent().items()},
        'progress': asdict(phases.progress), 'waiting_in': stack.waiting_in, 'reading': stack.reading, 'main_stack': stack.frames,
        'error': None if error is None else describe_error(error, explained), 'memory': {**procs.own_memory(), **_device_memory()}, 'peers': peers or [], 'versions': _versions(),
    }  # fmt: skip
    text = '\n'.join([stacks.all_threads(), stacks.worker_stacks(live / f'rank{rank}.crash')])
    return _write(places, rank, content, text)


def write_bundle_for(places: Places, state: RankState, fault: Fault, code: int, crash_text: str, memory: Mapping[str, Any]) -> Path | None:
    """Writes the bundle of a rank that is dead and left none, from its live record; ``memory`` is what the watcher saw last."""
    content = {
        'rank': state.rank, 'local_rank': state.local_rank, 'node_rank': dist.get_node_rank(), 'world_size': state.world_size, 'local_world_size': dist.get_local_world_size(),
        'host': state.host, 'pid': state.pid, 'ticks': state.ticks, 'master': f'{os.environ.get("MASTER_ADDR", "")}:{os.environ.get("MASTER_PORT", "")}',
        'time': _utc(time.time()), 'written_by': 'the watcher of the node', 'fault': asdict(fault), 'exit_code': code,
        'phase': state.phase, 'seconds_in_phase': round(max(0.0, fault.time - state.entered), 2), 'phase_seconds': {},
        'progress': {
            'step': state.step, 'samples': state.samples, 'tokens': state.tokens, 'epoch': state.epoch, 'batch_in_epoch': state.batch_in_epoch, 'sample_in_epoch': state.sample_in_epoch,
            'source': '',
        },
        'waiting_in': stacks.waiting_in_crash(crash_text), 'reading': {}, 'main_stack': [], 'error': None, 'memory': dict(memory), 'peers': [], 'versions': {'llmfoundry': __version__, 'python': platform.python_version()},
    }  # fmt: skip
    return _write(places, state.rank, content, crash_text)


def _write(places: Places, rank: int, content: dict[str, Any], stacks_text: str) -> Path | None:
    text = json.dumps(content, indent=1, default=str)
    for folder in places.both():
        path = folder / f'rank{rank}.json'
        if write_whole(path, text):
            if stacks_text.strip():
                write_whole(folder / f'rank{rank}.stacks.txt', stacks_text)
            return path
    return None


def _utc(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec='milliseconds')


def read_bundles(folders: list[Path]) -> list[dict[str, Any]]:
    """Every bundle of the newest start in the folders, in the order of ranks; files that are no bundle are left out."""
    found: dict[int, dict[str, Any]] = {}
    for folder in folders:
        for path in folder.glob('rank*.json'):
            with contextlib.suppress(OSError, ValueError, KeyError):
                content = json.loads(path.read_text(encoding='utf-8'))
                content['file'] = str(path)
                if content['rank'] not in found or content['time'] > found[content['rank']]['time']:
                    found[content['rank']] = content
    if not found:
        return []
    newest = max(found.values(), key=lambda b: b['time'])
    same = [b for b in found.values() if (b['world_size'], b['master']) == (newest['world_size'], newest['master'])]
    return sorted(same, key=lambda b: b['rank'])
