"""Checkpoints on an object store as the start of a run: found, fetched, checked, and forgotten after loading.

A remote checkpoint may be half uploaded, or arrive damaged. So it is fetched to each node's disk and compared with its checksums before anything is built; what did not arrive whole is fetched
once more, then the next older one is tried. Remote ones are never renamed or removed. Sharded checkpoints of several nodes are the exception: each node needs a part only, which
the loader fetches and checks itself (``composer_loading``).
"""

from __future__ import annotations

import atexit
import posixpath
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llmfoundry import dist
from llmfoundry.checkpoint.integrity import damage
from llmfoundry.checkpoint.local_path import fill_ranks
from llmfoundry.checkpoint.metadata_file import METADATA_FILE, read_metadata
from llmfoundry.checkpoint.remote_store import RemoteStore
from llmfoundry.command_utils.save_folder import SHARDED_FOLDER, SaveNames, batch_of
from llmfoundry.errors import CheckpointError, ConfigError, ConfigProblem, UnsafeCheckpointError

__all__ = ['fetch_named', 'forget_downloads', 'is_remote', 'newest_remote']

_ATTEMPTS = 2
_PARALLEL_DOWNLOADS = 8
_downloads: list[str] = []


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URI."""
    return '://' in path or path.startswith('dbfs:/')


def forget_downloads() -> None:
    """Removes what was fetched, after it was loaded."""
    while _downloads:
        shutil.rmtree(_downloads.pop(), ignore_errors=True)


atexit.register(forget_downloads)


def newest_remote(save_folder: str, run_name: str | None, names: SaveNames) -> tuple[str | None, list[str]]:
    """The newest checkpoint below the URI ``save_folder`` that arrives whole on every node: its local copy (or its URI, see above), and notes; a collective call.

    Raises:
        RemoteStoreError: the store refuses, or cannot be reached.
        UnsafeCheckpointError: a checkpoint would have to run code to be read.
    """
    uri = save_folder.replace('{run_name}', run_name or '')
    objects = dist.on_rank_zero(lambda: RemoteStore(uri).list())
    notes: list[str] = []
    candidates = _candidates(objects, names)
    for name in candidates:
        found, reason = _fetch(RemoteStore(uri), uri, name, objects)
        if reason is None:
            return found, [*notes, f'autoresume: continues from {uri}/{name}, the newest whole checkpoint']
        notes.append(f'autoresume: {uri}/{name} is left out: {reason}')
    if candidates:
        notes.append(f'autoresume: none of the {len(candidates)} checkpoints in {uri} is whole; the run starts from the beginning')
    return None, notes


def fetch_named(uri: str, names: SaveNames) -> tuple[str, list[str]]:
    """What to load for a remote ``load_path``; a collective call. Links to web pages are left to Composer.

    Raises:
        ConfigError: there is no such object.
        CheckpointError: it did not arrive whole.
    """
    if uri.startswith(('http://', 'https://')):
        return uri, []
    uri = fill_ranks(uri)
    folder, _, name = uri.rstrip('/').rpartition('/')
    store = RemoteStore(folder, setting='load_path')
    objects = dist.on_rank_zero(lambda: store.list(name))
    if name not in objects and (f'{name}.symlink' in objects or name.endswith('.symlink')):
        note = name if name.endswith('.symlink') else f'{name}.symlink'
        name = posixpath.basename(dist.on_rank_zero(lambda: store.read_text(note)).strip().rstrip('/'))
        objects = dist.on_rank_zero(lambda: store.list(name))
    if name not in objects and f'{name}/{METADATA_FILE}' not in objects:
        raise ConfigError([ConfigProblem('load_path', f'there is no checkpoint {uri!r}: neither a file of that name nor a folder with {METADATA_FILE}. Correct the name.')])
    found, reason = _fetch(store, folder, name, objects, names.sharded)
    if found is None:
        raise CheckpointError(f'load_path: {uri!r} is not whole: {reason}. Name an older checkpoint.')
    return found, []


def _candidates(objects: list[str], names: SaveNames) -> list[str]:
    """Names of files and of sharded folders, newest first."""
    folders = {posixpath.dirname(name) for name in objects} - {''}
    found = [(batch_of(name, names.filename), name) for name in objects] + [(batch_of(name, SHARDED_FOLDER), name) for name in folders]
    return [name for batch, name in sorted((b, n) for b, n in found if b is not None)][::-1]


def _fetch(store: RemoteStore, uri: str, name: str, objects: list[str], sharded_run: bool = True) -> tuple[str | None, str | None]:
    """Local copy on each node, or the cause why there is none. Large sharded checkpoints on several nodes stay where they are if the run can read them there."""
    is_folder = name not in objects
    parts = [n for n in objects if n.startswith(f'{name}/')] if is_folder else [name]
    if is_folder:
        reason = dist.on_rank_zero(lambda: _lacking(store, name, parts))
        if reason is not None:
            return None, reason
        nodes = dist.get_world_size() // max(1, dist.get_local_world_size())
        if nodes > 1 and sharded_run and uri.partition('://')[0] in ('s3', 'gs', 'oci', 'azure'):
            return f'{uri}/{name}', None
    outcome = dist.on_local_rank_zero(lambda: _download_whole(store, name, parts))
    outcomes = dist.all_gather_objects(outcome)
    reason = next((r for _, r in outcomes if r is not None), None)
    return (None, reason) if reason is not None else (outcome[0], None)


def _lacking(store: RemoteStore, name: str, parts: list[str]) -> str | None:
    """Whether a sharded checkpoint lacks files that its metadata names, as one does whose upload was cut off."""
    if f'{name}/{METADATA_FILE}' not in parts:
        return f'it has no {METADATA_FILE}: its upload did not end'
    with tempfile.TemporaryDirectory(prefix='llmfoundry-') as folder:
        store.download(f'{name}/{METADATA_FILE}', Path(folder) / METADATA_FILE)
        try:
            needed = {info.relative_path for info in read_metadata(folder).storage_data.values()}
        except UnsafeCheckpointError:
            raise
        except CheckpointError as e:
            return str(e)
    missing = sorted(n for n in needed if f'{name}/{n}' not in parts)
    return f'it lacks {len(missing)} of {len(needed)} files, {missing[0]} first' if missing else None


def _download_whole(store: RemoteStore, name: str, parts: list[str]) -> tuple[str, str | None]:
    """Fetches ``parts`` up to twice until ``damage`` finds nothing; returns the path and what is wrong with it."""
    folder = tempfile.mkdtemp(prefix='llmfoundry-checkpoint-')
    _downloads.append(folder)
    local = Path(folder) / posixpath.basename(name)
    reason: str | None = None
    for _ in range(_ATTEMPTS):
        shutil.rmtree(folder)
        with ThreadPoolExecutor(_PARALLEL_DOWNLOADS) as pool:
            places = [(part, Path(folder) / posixpath.relpath(part, posixpath.dirname(name))) for part in parts]
            arrived: list[Any] = list(pool.map(lambda place: _download(store, *place), places))
        reason = next((r for r in arrived if r is not None), None) or damage(local)
        if reason is None:
            break
    if reason is not None:
        shutil.rmtree(folder, ignore_errors=True)
        reason += f' (after {_ATTEMPTS} downloads)'
    return str(local), reason


def _download(store: RemoteStore, name: str, path: Path) -> str | None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        store.download(name, path)
    except FileNotFoundError:
        return f'{posixpath.basename(name)} was removed meanwhile'
    return None
