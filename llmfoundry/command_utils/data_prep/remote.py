"""Remote outputs of data preparation: uploading with the index last, and the local folder in which a remote output is built.

Reading from remote places is ``llmfoundry.data.remote_files``, whose names are repeated here.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import shutil
import tempfile
from pathlib import Path

from llmfoundry.data.remote_files import fetch, filesystem, is_remote, join, list_files, local_copy, object_store

__all__ = ['fetch', 'is_remote', 'join', 'list_files', 'local_copy', 'staging_folder', 'upload_folder', 'upload_file', 'remote_text']


def upload_file(path: Path, uri: str) -> None:
    """Uploads one file to ``uri``."""
    found = filesystem(uri)
    if found is not None:
        fs, target = found
        fs.makedirs(posixpath.dirname(target), exist_ok=True)
        fs.put_file(str(path), target)
        return
    store, key = object_store(uri)
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
