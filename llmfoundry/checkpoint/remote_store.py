"""A folder on an object store or any other file system, by its URI: list, upload, download, delete, each whole or absent and tried again on faults of the network.

``s3``, ``gs``, ``oci``, ``azure`` and ``dbfs`` go through Composer's object stores, so that endpoints and credentials are found where Composer and Streaming look for them
(``S3_ENDPOINT_URL``, ``AWS_...``, ``GCS_KEY``, ...); every other scheme (``memory``, ``file``, ``sftp``, ...) and plain paths go through fsspec. Composer's stores cannot delete, and hide
a refused key behind "not found"; both is made good here.
"""

from __future__ import annotations

import os
import posixpath
import re
import tempfile
from pathlib import Path
from typing import Any, Callable, TypeVar
from urllib.parse import urlparse

from llmfoundry.data.network_faults import error_code, explain, http_status, with_retries
from llmfoundry.data.remote_files import filesystem, object_store
from llmfoundry.errors import RemoteStoreError

__all__ = ['INCOMPLETE_PREFIX', 'RemoteStore', 'shown_uri']

T = TypeVar('T')

INCOMPLETE_PREFIX = '.incomplete-'
COMPOSER_SCHEMES = ('s3', 'gs', 'oci', 'azure', 'dbfs')
# Where a file that is being written can be seen under its name; the others show an object when its last byte has arrived.
SEEN_WHILE_WRITTEN = frozenset({'file', 'local', 'sftp', 'ssh', 'smb', 'ftp', 'hdfs', 'webhdfs', 'arrow_hdfs', 'lakefs'})


def shown_uri(uri: str) -> str:
    """``uri`` without a password in it."""
    return re.sub(r'(://[^/:@]+):[^/@]*@', r'\1:***@', uri)


class RemoteStore:
    """The folder ``uri``; names are relative to it, with forward slashes.

    Args:
        uri: ``s3://bucket/folder``, ``gs://...``, ``memory://...``, a path.
        setting: the config key that holds the URI, for error messages.
        attempts: calls of each operation before a fault of the network becomes an error.
        first_pause_s: pause after the first, doubled each time.

    Raises:
        RemoteStoreError: at once, what another attempt would not change (refused, no such bucket, unknown scheme); or the attempts are used up.
    """

    def __init__(self, uri: str, *, setting: str = 'save_folder', attempts: int = 8, first_pause_s: float = 1.0) -> None:
        self.uri = uri.rstrip('/') if '://' in uri or len(uri) > 1 else uri
        self.setting = setting
        self.attempts, self.first_pause_s = attempts, first_pause_s
        self.scheme = urlparse(uri).scheme or 'file'
        self._backend = self._run('opening', '', self._open)

    def _open(self) -> _ComposerBackend | _FsspecBackend:
        if self.scheme == 's3':
            from composer.utils.object_store import S3ObjectStore

            place = urlparse(self.uri)
            # Attempts are made here, where they are logged; botocore's own would multiply them.
            return _ComposerBackend(S3ObjectStore(bucket=place.netloc, client_config={'retries': {'total_max_attempts': 1}}), place.path.strip('/'))
        if self.scheme in COMPOSER_SCHEMES:
            store, key = object_store(self.uri)
            return _ComposerBackend(store, key.strip('/'))
        found = filesystem(self.uri)
        if found is None:
            raise ValueError(f'no library here opens {self.scheme}://; install the fsspec plug-in for it')
        return _FsspecBackend(found[0], found[1].rstrip('/'), self.scheme)

    def uri_of(self, name: str) -> str:
        """The whole URI of ``name``."""
        return posixpath.join(self.uri, name) if name else self.uri

    def key_of(self, name: str) -> str:
        """The name within the bucket, as Composer's own files refer to each other."""
        return posixpath.join(self._backend.root, name)

    def list(self, prefix: str = '') -> list[str]:
        """Names that begin with ``prefix``, sorted, at any depth; empty if there are none."""
        return sorted(n for n in self._run('listing', prefix, lambda: self._backend.list(prefix)) if not posixpath.basename(n).startswith(INCOMPLETE_PREFIX))

    def exists(self, name: str) -> bool:
        """Whether there is an object ``name`` (asked by listing, since a HEAD request cannot tell "refused" from "missing")."""
        return name in self.list(name)

    def upload(self, local: str | os.PathLike, name: str) -> None:
        """Copies a local file to ``name``, over what is there; readers see the old or the new one."""
        self._run('uploading', name, lambda: self._backend.upload(os.fspath(local), name))

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file."""
        with tempfile.TemporaryDirectory(prefix='llmfoundry-') as folder:
            path = Path(folder) / 'text'
            path.write_text(text)
            self.upload(path, name)

    def link(self, name: str, target: str) -> None:
        """Makes ``name`` a symbolic link with the content ``target``; for local folders only."""
        self._run('linking', name, lambda: self._backend.link(name, target))

    def download(self, name: str, local: str | os.PathLike) -> None:
        """Copies ``name`` to a local file, whose name appears when it is whole.

        Raises:
            FileNotFoundError: there is no such object.
        """
        path = Path(local)
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = path.with_name(INCOMPLETE_PREFIX + path.name)
        try:
            self._run('downloading', name, lambda: self._backend.download(name, str(hidden)))
            os.replace(hidden, path)
        finally:
            hidden.unlink(missing_ok=True)

    def read_text(self, name: str) -> str:
        """The content of a small file.

        Raises:
            FileNotFoundError: there is no such object.
        """
        with tempfile.TemporaryDirectory(prefix='llmfoundry-') as folder:
            self.download(name, Path(folder) / 'text')
            return (Path(folder) / 'text').read_text()

    def delete(self, name: str) -> None:
        """Removes ``name``; nothing if there is no such object."""
        try:
            self._run('deleting', name, lambda: self._backend.delete(name))
        except FileNotFoundError:
            return

    def delete_below(self, name: str, first: str = '') -> int:
        """Removes every object below the folder ``name``; returns how many there were.

        Those whose own names begin with ``first`` go before the others, so that a kill in between leaves nothing that looks whole.
        """
        parts = sorted(self.list(f'{name}/'), key=lambda part: (not posixpath.basename(part).startswith(first), part))
        for part in parts:
            self.delete(part)
        return len(parts)

    def remove_unfinished_uploads(self, is_ours: Callable[[str], bool]) -> int:
        """Aborts what killed runs left of uploads in several parts, which nobody sees and everybody pays for; returns how many. Only S3 has such.

        Args:
            is_ours: whether a name may be touched; other runs may be uploading to folders below this one.
        """
        return self._run('looking for unfinished uploads of', '', lambda: self._backend.abort_uploads(is_ours))

    def check_writable(self) -> None:
        """Writes and removes a small object, so that a run whose folder is refused fails before the first step."""
        name = f'{INCOMPLETE_PREFIX}probe-{os.getpid()}'
        self.write_text(name, 'may this run write here?')
        self.delete(name)

    def _run(self, doing: str, name: str, function: Callable[[], T]) -> T:
        where = shown_uri(self.uri_of(name))
        try:
            return with_retries(function, f'{doing} {where}', attempts=self.attempts, first_pause_s=self.first_pause_s)
        except Exception as e:  # every client has its own classes; what the network or the server said is explained, the rest goes on
            if doing == 'downloading' and _is_missing(e):
                raise FileNotFoundError(f'{where}: there is no such object') from e
            explained = explain(e, self.uri, self.setting, self.attempts)
            if explained is None:
                raise
            raise RemoteStoreError(f'{self.setting}: {doing} {where} failed: {explained}') from e


def _is_missing(error: Exception) -> bool:
    refused = http_status(error) in (401, 403) or error_code(error) == 'NoSuchBucket'
    return not refused and (isinstance(error, FileNotFoundError) or http_status(error) == 404)


class _ComposerBackend:
    """Composer's object store, with what it lacks."""

    def __init__(self, store: Any, root: str) -> None:
        self.store, self.root = getattr(store, 's3_object_store', None) or store, root

    def _key(self, name: str) -> str:
        return posixpath.join(self.root, name) if self.root else name

    def list(self, prefix: str) -> list[str]:
        start = f'{self.root}/' if self.root else ''
        return [key[len(start) :] for key in self.store.list_objects(start + prefix) if key.startswith(start) and not key.endswith('/')]

    def upload(self, local: str, name: str) -> None:
        self.store.upload_object(self._key(name), local)

    def download(self, name: str, local: str) -> None:
        self.store.download_object(self._key(name), local, overwrite=True)

    def delete(self, name: str) -> None:
        """Each of Composer's stores holds the client of its service, which can."""
        kind, key = type(self.store).__name__, self._key(name)
        if kind == 'S3ObjectStore':
            self.store.client.delete_object(Bucket=self.store.bucket, Key=self.store.get_key(key))
        elif kind == 'GCSObjectStore':
            self.store.bucket.blob(self.store.get_key(key)).delete()
        elif kind == 'OCIObjectStore':
            self.store.client.delete_object(namespace_name=self.store.namespace, bucket_name=self.store.bucket, object_name=key)
        elif kind == 'LibcloudObjectStore':
            self.store._provider.delete_object(self.store._provider.get_object(self.store._container.name, key))
        elif kind == 'UCObjectStore':
            self.store.client.files.delete(self.store._get_object_path(key))
        else:
            raise ValueError(f'objects of {kind} cannot be deleted from here')

    def link(self, name: str, target: str) -> None:
        raise ValueError(f'{type(self.store).__name__} has no links')

    def abort_uploads(self, is_ours: Callable[[str], bool]) -> int:
        if type(self.store).__name__ != 'S3ObjectStore':
            return 0
        client, bucket = self.store.client, self.store.bucket
        start = self.store.get_key(f'{self.root}/' if self.root else '')
        found = [u for u in client.list_multipart_uploads(Bucket=bucket, Prefix=start).get('Uploads') or [] if is_ours(u['Key'][len(start) :])]
        for upload in found:
            client.abort_multipart_upload(Bucket=bucket, Key=upload['Key'], UploadId=upload['UploadId'])
        return len(found)


class _FsspecBackend:
    """A file system of fsspec."""

    def __init__(self, fs: Any, root: str, scheme: str) -> None:
        self.fs, self.root = fs, root
        self.in_two_steps = scheme in SEEN_WHILE_WRITTEN

    def _path(self, name: str) -> str:
        return posixpath.join(self.root, name)

    def list(self, prefix: str) -> list[str]:
        self.fs.invalidate_cache()
        folder = posixpath.join(self.root, posixpath.dirname(prefix)) if '/' in prefix else self.root
        if not self.fs.exists(folder or '/'):
            return []
        names = [name[len(self.root) :].lstrip('/') for name in self.fs.find(folder or '/')]
        return [name for name in names if name.startswith(prefix)]

    def upload(self, local: str, name: str) -> None:
        path = self._path(name)
        self.fs.makedirs(posixpath.dirname(path), exist_ok=True)
        if not self.in_two_steps:
            self.fs.put_file(local, path)
            return
        hidden = posixpath.join(posixpath.dirname(path), INCOMPLETE_PREFIX + posixpath.basename(path))
        self.fs.put_file(local, hidden)
        if type(self.fs).__name__ == 'LocalFileSystem':
            with open(hidden, 'rb') as f:
                os.fsync(f.fileno())
            os.replace(hidden, path)
            return
        if self.fs.exists(path):  # most servers refuse to rename over a file
            self.fs.rm_file(path)
        self.fs.mv(hidden, path)

    def download(self, name: str, local: str) -> None:
        self.fs.get_file(self._path(name), local)

    def delete(self, name: str) -> None:
        self.fs.rm_file(self._path(name))

    def link(self, name: str, target: str) -> None:
        path = self._path(name)
        hidden = posixpath.join(posixpath.dirname(path), INCOMPLETE_PREFIX + posixpath.basename(path))
        os.makedirs(posixpath.dirname(path), exist_ok=True)
        if os.path.lexists(hidden):
            os.remove(hidden)
        os.symlink(target, hidden)
        os.replace(hidden, path)

    def abort_uploads(self, is_ours: Callable[[str], bool]) -> int:
        del is_ours
        return 0
