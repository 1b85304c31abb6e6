"""Where a checkpoint goes once its bytes are written: the link to the newest, the object store, the loggers, the copies; and which older ones go.

Everything here runs in the thread of a save, on the rank that it says. The order is the guarantee: contents, then the metadata of a sharded checkpoint, then what names it as the newest,
then the deletion of older ones. Whoever reads at any moment, also after a kill, finds a newest checkpoint that is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import posixpath
import re
import shutil
import tempfile
from pathlib import Path
from typing import Iterable, Sequence

from composer.loggers import Logger

from llmfoundry.checkpoint.atomic_files import failed_write, link_atomically
from llmfoundry.checkpoint.integrity import SEAL_FILE
from llmfoundry.checkpoint.metadata_file import METADATA_FILE
from llmfoundry.checkpoint.output_mirror import OutputMirror
from llmfoundry.checkpoint.remote_store import RemoteStore
from llmfoundry.errors import CheckpointError, CheckpointUploadError, RemoteStoreError

__all__ = ['SaveTarget', 'remove_staged', 'staging_folder']

log = logging.getLogger(__name__)

# Direct children of the folder and files of sharded checkpoints: other runs may be uploading to folders below this one.
_OWN_CHECKPOINTS = re.compile(r'ep\d+-ba\d+')
_CHECKPOINT_NAMES = re.compile(r'[^/]+|ep\d+-ba\d+/[^/]+')


def staging_folder(uri: str, run_name: str | None, rank: int) -> Path:
    """Where a rank keeps what it has not uploaded yet: the same for each start of a run, so that what a killed one left is found and removed."""
    name = hashlib.sha256(f'{uri}\0{run_name or ""}'.encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f'llmfoundry-staging-{os.getuid()}' / f'{name}-{rank}'


def remove_staged(folder: Path) -> None:
    """Removes what an earlier start of the run left on this node, of any rank, given the staging folder of one."""
    for leftover in folder.parent.glob(f'{folder.name.rpartition("-")[0]}-*'):
        shutil.rmtree(leftover, ignore_errors=True)


class SaveTarget:
    """The save folder of a run.

    Args:
        folder: local folder of this rank.
        remote: URI that the folder stands for; None if it is the save folder itself.
        logger: destinations that store files get the checkpoints too.
        num_to_keep: how many checkpoints are kept, at least one; -1 for all.
        mirror: copies of the folder.
    """

    def __init__(self, folder: Path, remote: str | None, logger: Logger, num_to_keep: int, mirror: OutputMirror | None) -> None:
        self.folder, self.logger, self.mirror = folder, logger, mirror
        self.store = None if remote is None else RemoteStore(remote)
        # 0 has always meant "nothing on the local disk", which a remote folder never leaves there.
        self.num_to_keep = -1 if num_to_keep < 0 or (num_to_keep == 0 and remote is not None) else max(1, num_to_keep)
        self._kept: list[str] = []
        self._removed: list[str] = []

    @property
    def is_remote(self) -> bool:
        return self.store is not None

    def prepare(self) -> None:
        """On rank 0 at start: the store can be written to, and nothing of a killed run's uploads is left there.

        Raises:
            RemoteStoreError: it cannot.
        """
        if self.store is not None:
            self.store.check_writable()
            with contextlib.suppress(RemoteStoreError):  # a key may write and not be allowed to look for these
                self.store.remove_unfinished_uploads(lambda name: _CHECKPOINT_NAMES.fullmatch(name) is not None)

    def refuse_used_folder(self) -> None:
        """On rank 0, when a run starts from nothing and may not overwrite.

        Raises:
            CheckpointError: the remote folder holds checkpoints already.
        """
        assert self.store is not None
        found = [name for name in self.store.list() if _OWN_CHECKPOINTS.match(name)]
        if found:
            raise CheckpointError(
                f'save_folder: {self.store.uri!r} already holds checkpoints ({found[-1]!r} and {len(found) - 1} more files), which this run would overwrite. Continue that run with autoresume: true, '
                'choose another save_folder or run_name, or set save_overwrite: true.',
            )

    def key_of(self, path: str) -> str:
        """What the run remembers a checkpoint by: its path, or its URI."""
        return path if self.store is None else self.store.uri_of(self._name(path))

    def adopt(self, keys: Iterable[str]) -> None:
        """Takes over the checkpoints that the resumed run had saved to this folder, so that they count for what is kept."""
        self._kept = [k for k in keys if (Path(k).is_relative_to(self.folder) if self.store is None else k.startswith(f'{self.store.uri}/'))]

    def take_removed(self) -> list[str]:
        """Keys of the checkpoints that were deleted since the last call."""
        removed, self._removed = self._removed, []
        return removed

    def send_parts(self, paths: Sequence[Path]) -> None:
        """Any rank: uploads files of a checkpoint, which nothing names yet.

        Raises:
            CheckpointError: an upload failed for good.
        """
        for path in paths:
            self._send(path, self._name(path))
            if self.store is not None:
                path.unlink()

    def publish(self, checkpoint: Path, key: str, latest: str | None) -> None:
        """Rank 0, when all parts are written and sent: metadata, the link, older checkpoints, copies.

        Args:
            checkpoint: the file or folder.
            key: what the run remembers it by.
            latest: path of the link to the newest.

        Raises:
            CheckpointError: what names the checkpoint could not be written.
        """
        name = self._name(checkpoint)
        for path in (checkpoint / METADATA_FILE, checkpoint / SEAL_FILE):
            if path.is_file():
                self._send(path, self._name(path))
        if latest is not None:
            self._name_latest(checkpoint, name, latest)
        self._kept = [k for k in self._kept if self._checkpoint_of(k) != name] + [key]
        removed = self._remove_old(name)
        if self.store is not None:
            shutil.rmtree(checkpoint, ignore_errors=True)
        if self.mirror is not None:
            self.mirror.sync(removed)

    def finish(self) -> None:
        """Rank 0, at the end of the run: brings the copies up to date.

        Raises:
            CheckpointError: one of them is not.
        """
        if self.mirror is not None:
            self.mirror.sync()
            self.mirror.require()

    def close(self) -> None:
        """Removes the local folder that stood for a remote one."""
        if self.store is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.folder.parent.rmdir()

    def _name(self, path: str | Path) -> str:
        return Path(os.path.relpath(path, self.folder)).as_posix()

    def _send(self, path: Path, name: str) -> None:
        if self.store is None:
            if any(destination.can_upload_files() for destination in self.logger.destinations):
                self.logger.upload_file(remote_file_name=str(self.folder / name).lstrip('/'), file_path=str(path), overwrite=True)
            return
        try:
            self.store.upload(path, name)
        except (RemoteStoreError, OSError) as e:
            raise CheckpointUploadError(
                f'save_folder: the checkpoint {self.store.uri_of(name)!r} could not be uploaded: {e} Earlier checkpoints are untouched and the latest one is named as before; rerun with autoresume: true.',
            ) from e

    def _name_latest(self, checkpoint: Path, name: str, latest: str) -> None:
        if self.store is None:
            link_atomically(str(checkpoint), latest)
        link = Path(tempfile.mkdtemp(prefix='llmfoundry-')) / 'latest.symlink'
        try:
            link.write_text(str(self.folder / name).lstrip('/') if self.store is None else self.store.key_of(name))
            self._send(link, f'{self._name(latest)}.symlink')
        except OSError as e:
            raise failed_write(str(link), e) from e
        finally:
            shutil.rmtree(link.parent, ignore_errors=True)

    def _checkpoint_of(self, key: str) -> str:
        """The name of the file, or of the folder of a sharded checkpoint, that a key stands for."""
        name = self._name(key) if self.store is None else key[len(self.store.uri) + 1 :]
        return posixpath.dirname(name) if name.endswith('.distcp') else name

    def _remove_old(self, newest: str) -> list[str]:
        """Deletes what is too much, the oldest first, never the newest; returns the names."""
        removed: list[str] = []
        while 0 <= self.num_to_keep < len(self._kept):
            key = self._kept[0]
            name = self._checkpoint_of(key)
            if name != newest:
                try:
                    self._remove(name)
                except (RemoteStoreError, OSError, ValueError) as e:
                    log.warning('save_num_checkpoints_to_keep: %s could not be deleted: %s. It is tried again after the next save.', key, e)
                    return removed
            self._kept.pop(0)
            self._removed.append(key)
            removed.append(name)
        return removed

    def _remove(self, name: str) -> None:
        """The metadata first, so that a kill in between leaves nothing that looks whole."""
        if self.store is None:
            path = self.folder / name
            for part in (path / METADATA_FILE, path / SEAL_FILE):
                part.unlink(missing_ok=True) if path.is_dir() else None
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            return
        if not self.store.delete_below(name, first=METADATA_FILE):
            self.store.delete(name)
