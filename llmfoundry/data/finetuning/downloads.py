"""Copies of remote finetuning files below the cache folder, fetched once for each version of a file.

A file's version is what its store says of it (ETag, time, generation). Stores that say nothing are asked again at every start; the copy is then
kept if nothing changed, so that later stages still find their own caches.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import posixpath
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Sequence

from filelock import FileLock

from llmfoundry.data.finetuning.cache_folder import cache_folder
from llmfoundry.data.remote_files import fetch, filesystem, list_files, object_store
from llmfoundry.errors import FinetuningFileNotFoundError

__all__ = ['download_file', 'download_folder', 'download_split']

_VERSION_KEYS = ('ETag', 'etag', 'md5Hash', 'generation', 'md5', 'mtime', 'created', 'LastModified', 'last_modified')
_LOCAL = 'file://'


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _info(uri: str) -> dict[str, Any] | None:
    """What the store says of a file, None if there is no such file."""
    found = filesystem(uri)
    if found is None:
        store, key = object_store(uri)
        try:
            return {'size': store.get_object_size(key)}
        except FileNotFoundError:
            return None
    fs, path = found
    try:
        info = fs.info(path)
    except FileNotFoundError:
        return None
    return info if info.get('type', 'file') == 'file' else None


def _version(info: dict[str, Any]) -> str | None:
    known = [(key, str(info[key])) for key in _VERSION_KEYS if info.get(key)]
    return repr((info.get('size'), known)) if known else None


def _copy(uri: str, version: str | None, target: Path) -> Path:
    """Puts a file at ``target``. Without a version it is fetched again, and an equal copy stays as it is, with its time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f'{target}.lock'):
        if version is not None and target.is_file():
            return target
        temporary = target.with_name(f'{target.name}.{os.getpid()}.tmp')
        try:
            fetch(uri, str(temporary))
            if not (target.is_file() and filecmp.cmp(temporary, target, shallow=False)):
                os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    return target


def download_file(uri: str) -> str | list[str]:
    """Local path of a file, or the sorted paths of all files that a pattern matches.

    Raises:
        FinetuningFileNotFoundError: there is none.
    """
    if uri.startswith(_LOCAL):
        return uri[len(_LOCAL) :]
    if any(character in posixpath.basename(uri) for character in '*?['):
        parent, pattern = posixpath.split(uri)
        found = [u for u, _ in list_files(parent, (pattern,)) if fnmatch(u[len(parent) + 1 :], pattern) and '/' not in u[len(parent) + 1 :]]
        if not found:
            raise FinetuningFileNotFoundError([uri])
        return [str(download_file(u)) for u in found]
    info = _info(uri)
    if info is None:
        raise FinetuningFileNotFoundError([uri])
    version = _version(info)
    return str(_copy(uri, version, cache_folder() / 'downloads' / _digest(uri, version) / posixpath.basename(uri)))


def download_folder(uri: str, patterns: Sequence[str]) -> Path:
    """Local folder with all files below ``uri`` whose names match, under the same relative paths.

    Raises:
        FinetuningFileNotFoundError: there is none.
    """
    if uri.startswith(_LOCAL):
        return Path(uri[len(_LOCAL) :])
    uri = uri.rstrip('/')
    files = [u for u, _ in list_files(uri, tuple(patterns))]
    if not files:
        raise FinetuningFileNotFoundError([f'{uri}/**/{pattern}' for pattern in patterns])
    versions = {u: _version(_info(u) or {}) for u in files}
    folder = cache_folder() / 'downloads' / _digest(uri, sorted(versions.items()))
    for u in files:
        _copy(u, versions[u], folder / u[len(uri) + 1 :])
    return folder


def download_split(uri: str, split: str, extensions: Sequence[str]) -> Path:
    """Local copy of the file of a split: ``{uri}/{split}`` with the first extension that exists, or ``uri`` itself where it names a file.

    Raises:
        FinetuningFileNotFoundError: none exists; the message lists what was tried.
    """
    if uri.endswith((*extensions, '.arrow')):
        return Path(str(download_file(uri)))
    names = dict.fromkeys((split, split.replace('-', '_')))
    searched = [f'{uri.rstrip("/")}/{name}{extension}' for name in names for extension in extensions]
    for candidate in searched:
        if _info(candidate) is not None:
            return Path(str(download_file(candidate)))
    raise FinetuningFileNotFoundError(searched)
