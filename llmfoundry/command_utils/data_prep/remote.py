"""Remote inputs and outputs: listing, fetching one file at a time, uploading with the index last.

``file``, ``memory``, ``http(s)`` and whatever else ``fsspec`` can open on this machine go through fsspec; object stores whose fsspec plug-in is
missing (s3, gs, oci, azure, ...) go through the stores that Composer and Streaming bring along, which cost their import (10 s) only then.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import os
import posixpath
import shutil
import tempfile
import urllib.parse
from pathlib import Path
from typing import Any, Iterator

__all__ = ['fetch', 'is_remote', 'join', 'list_files', 'local_copy', 'staging_folder', 'upload_folder', 'upload_file', 'remote_text']


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URI."""
    return '://' in path or path.startswith('dbfs:/')


def join(root: str, name: str) -> str:
    """Appends a name to a path or URI."""
    return posixpath.join(root, name) if is_remote(root) else os.path.join(root, name)


def _filesystem(uri: str) -> tuple[Any, str] | None:
    """The fsspec file system for ``uri`` and the path in it, None if this machine has none for the scheme."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError):
        return None


def _object_store(uri: str) -> tuple[Any, str]:
    """Composer's object store for ``uri`` and the key in it.

    Raises:
        ValueError: no library here can open the URI.
    """
    from composer.utils import maybe_create_object_store_from_uri, parse_uri

    try:
        store = maybe_create_object_store_from_uri(uri)
    except (NotImplementedError, ImportError, KeyError) as e:
        raise ValueError(
            f'{uri}: cannot be opened here ({e}). Install the fsspec plug-in for {urllib.parse.urlparse(uri).scheme}:// or copy the files to a local folder.'
        ) from e
    return store, parse_uri(uri)[2]


def list_files(uri: str, patterns: tuple[str, ...]) -> list[tuple[str, int]]:
    """URIs and sizes of all files below ``uri`` whose names match one of ``patterns``, sorted; ``uri`` itself if it is a file."""
    found = _filesystem(uri)
    if found is not None:
        filesystem, path = found
        if filesystem.isfile(path):
            return [(uri, int(filesystem.size(path) or 0))]
        if not filesystem.exists(path):
            return []
        entries = filesystem.find(path, detail=True)
        # Built from the URI as it was given: file systems differ in how they spell their own names.
        pairs = [(join(uri.rstrip('/'), name[len(path) :].lstrip('/')), int(entry.get('size') or 0)) for name, entry in entries.items()]
    else:
        store, key = _object_store(uri)
        root = uri[: len(uri) - len(key)] if key else uri
        pairs = [(root + name, int(store.get_object_size(name))) for name in store.list_objects(key)]
    return sorted(p for p in pairs if any(fnmatch.fnmatch(posixpath.basename(p[0]), pattern) for pattern in patterns))


def fetch(uri: str, path: str) -> None:
    """Downloads one file."""
    found = _filesystem(uri)
    if found is not None:
        found[0].get_file(found[1], path)
        return
    store, key = _object_store(uri)
    store.download_object(key, path, overwrite=True)


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local path for ``path``: itself, or a temporary download that is removed afterwards."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix='llmfoundry-') as folder:
        copy = os.path.join(folder, posixpath.basename(path))
        fetch(path, copy)
        yield copy


def upload_file(path: Path, uri: str) -> None:
    """Uploads one file to ``uri``."""
    found = _filesystem(uri)
    if found is not None:
        filesystem, target = found
        filesystem.makedirs(posixpath.dirname(target), exist_ok=True)
        filesystem.put_file(str(path), target)
        return
    store, key = _object_store(uri)
    store.upload_object(key, str(path))


def upload_folder(folder: Path, uri: str) -> None:
    """Uploads the files of ``folder``, ``index.json`` last: a reader that finds the index finds everything."""
    for path in sorted((p for p in folder.iterdir() if p.is_file()), key=lambda p: (p.name == 'index.json', p.name)):
        upload_file(path, join(uri, path.name))


def remote_text(uri: str) -> str | None:
    """The content of a small remote file, None if it is not there."""
    with tempfile.TemporaryDirectory(prefix='llmfoundry-') as folder:
        copy = os.path.join(folder, 'file')
        try:
            fetch(uri, copy)
        except (FileNotFoundError, KeyError):
            return None
        return Path(copy).read_text(encoding='utf-8')


def staging_folder(uri: str) -> Path:
    """The local folder in which the shards of a remote output are built; the same for each run, so that a killed one can go on."""
    name = hashlib.sha256(uri.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f'llmfoundry-data-prep-{os.getuid()}' / name


def remove_staging(folder: Path) -> None:
    """Removes what ``staging_folder`` named."""
    shutil.rmtree(folder, ignore_errors=True)
