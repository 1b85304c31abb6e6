"""Remote inputs: which file system opens a URI, listing, fetching one file at a time.

``file``, ``memory``, ``http(s)`` and whatever else ``fsspec`` can open on this machine go through fsspec; object stores whose fsspec plug-in is
missing (s3, gs, oci, azure, ...) go through the stores that Composer and Streaming bring along, which cost their import (10 s) only then.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import posixpath
import tempfile
import urllib.parse
from typing import Any, Iterator

from llmfoundry.data.network_faults import with_retries

__all__ = ['fetch', 'filesystem', 'is_remote', 'join', 'list_files', 'local_copy', 'object_store']


def is_remote(path: str) -> bool:
    """Whether ``path`` is a URI."""
    return '://' in path or path.startswith('dbfs:/')


def join(root: str, name: str) -> str:
    """Appends a name to a path or URI."""
    return posixpath.join(root, name) if is_remote(root) else os.path.join(root, name)


def filesystem(uri: str) -> tuple[Any, str] | None:
    """The fsspec file system for ``uri`` and the path in it, None if this machine has none for the scheme."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError):
        return None


def object_store(uri: str) -> tuple[Any, str]:
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
    return with_retries(lambda: _list_files(uri, patterns), f'listing {uri}', attempts=4)


def _list_files(uri: str, patterns: tuple[str, ...]) -> list[tuple[str, int]]:
    found = filesystem(uri)
    if found is not None:
        fs, path = found
        if fs.isfile(path):
            return [(uri, int(fs.size(path) or 0))]
        if not fs.exists(path):
            return []
        entries = fs.find(path, detail=True)
        # Built from the URI as it was given: file systems differ in how they spell their own names.
        pairs = [(join(uri.rstrip('/'), name[len(path) :].lstrip('/')), int(entry.get('size') or 0)) for name, entry in entries.items()]
    else:
        store, key = object_store(uri)
        root = uri[: len(uri) - len(key)] if key else uri
        pairs = [(root + name, int(store.get_object_size(name))) for name in store.list_objects(key)]
    return sorted(p for p in pairs if any(fnmatch.fnmatch(posixpath.basename(p[0]), pattern) for pattern in patterns))


def fetch(uri: str, path: str) -> None:
    """Downloads one file; faults of the network are outlived."""
    with_retries(lambda: _fetch(uri, path), f'downloading {uri}', attempts=4)


def _fetch(uri: str, path: str) -> None:
    found = filesystem(uri)
    if found is not None:
        found[0].get_file(found[1], path)
        return
    store, key = object_store(uri)
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
