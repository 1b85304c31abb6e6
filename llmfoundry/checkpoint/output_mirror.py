"""``additional_output_paths``: copies of the save folder elsewhere, brought up to date after every save.

Only what has changed is copied, by size and time of modification as noted in a list that is kept at the target, so that a resumed run does not copy everything again. What names the newest
checkpoint is copied last, what a reader needs before it: at every moment the target holds a checkpoint that can be loaded. A target that fails costs attempts and a warning, never the run.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any, Iterator, Sequence

from llmfoundry.checkpoint.atomic_files import INCOMPLETE_PREFIX
from llmfoundry.checkpoint.metadata_file import METADATA_FILE
from llmfoundry.checkpoint.remote_store import RemoteStore, shown_uri
from llmfoundry.errors import CheckpointError, RemoteStoreError

__all__ = ['OutputMirror']

log = logging.getLogger(__name__)

LIST_NAME = '.llmfoundry-mirror.json'
SETTING = 'additional_output_paths'
# Left by a run that found a checkpoint damaged; nobody wants it elsewhere.
SKIPPED_PREFIXES = (INCOMPLETE_PREFIX, 'damaged-')
Files = dict[str, Any]


class OutputMirror:
    """Keeps copies of one folder.

    Args:
        folder: the local save folder.
        targets: paths or URIs, of any scheme that ``RemoteStore`` opens.
        attempts: of each operation, before a target is given up until the next save.
    """

    def __init__(self, folder: Path, targets: Sequence[str], attempts: int = 4, first_pause_s: float = 1.0) -> None:
        self.folder = folder
        self.attempts, self.first_pause_s = attempts, first_pause_s
        self._stores: dict[str, RemoteStore | None] = dict.fromkeys(targets)
        self._known: dict[str, Files] = {}
        self.behind: dict[str, str] = {}
        """Targets that are not up to date, with the cause."""

    def sync(self, removed: Sequence[str] = ()) -> None:
        """Brings every target up to date. Never raises; see ``behind``.

        Args:
            removed: names of checkpoints that the run has deleted, to be deleted there too.
        """
        for target in self._stores:
            try:
                self._sync_one(target, removed)
                self.behind.pop(target, None)
            except (RemoteStoreError, OSError, ValueError) as e:
                if target not in self.behind:
                    log.warning('%s: %s is not up to date: %s. Training goes on; it is tried again at the next save.', SETTING, shown_uri(target), e)
                self.behind[target] = str(e)

    def require(self) -> None:
        """The last word, at the end of a run.

        Raises:
            CheckpointError: a target is not up to date.
        """
        if self.behind:
            causes = '\n'.join(f'  {shown_uri(target)}: {cause}' for target, cause in self.behind.items())
            raise CheckpointError(f'{SETTING}: training is complete and its checkpoints are in {str(self.folder)!r}, but these copies are not up to date:\n{causes}')

    def _sync_one(self, target: str, removed: Sequence[str]) -> None:
        store = self._stores[target]
        if store is None:
            store = self._stores[target] = RemoteStore(target, setting=SETTING, attempts=self.attempts, first_pause_s=self.first_pause_s)
            self._known[target] = _read_list(store)
        known, here = self._known[target], dict(_contents(self.folder))
        for name, state in sorted(here.items(), key=lambda item: _rank_of(item[0], item[1])):
            if known.get(name) == state:
                continue
            try:
                self._copy(store, name, state)
            except FileNotFoundError:  # deleted since the folder was read
                continue
            known[name] = state
        gone = [name for name in known if name not in here and any(name == r or name.startswith(f'{r}/') for r in removed)]
        for name in sorted(gone, key=lambda name: _rank_of(name, None), reverse=True):  # the metadata first, so that half a checkpoint never looks whole
            store.delete(name)
            del known[name]
        store.write_text(LIST_NAME, json.dumps(known, indent=0, sort_keys=True))

    def _copy(self, store: RemoteStore, name: str, state: Any) -> None:
        if not isinstance(state, str):
            store.upload(self.folder / name, name)
        elif store.scheme == 'file':
            store.link(name, state)
        else:  # the form in which Composer looks for links on object stores
            store.write_text(f'{name}.symlink', store.key_of(os.path.normpath(os.path.join(os.path.dirname(name), state))))


def _contents(folder: Path) -> Iterator[tuple[str, Any]]:
    """Name -> [bytes, time of modification], or the target of a link; hidden work in progress is left out."""
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(SKIPPED_PREFIXES)]
        for entry in files + [f for f in folders if os.path.islink(os.path.join(root, f))]:
            path = Path(root) / entry
            if entry.startswith(SKIPPED_PREFIXES) or entry.endswith('.tmp'):
                continue
            name = path.relative_to(folder).as_posix()
            try:
                if path.is_symlink():
                    yield name, os.readlink(path)
                else:
                    info = path.stat()
                    yield name, [info.st_size, info.st_mtime_ns]
            except FileNotFoundError:
                continue


def _rank_of(name: str, state: Any) -> tuple[int, str]:
    """Contents, then the metadata that makes a folder a checkpoint, then the links that name it."""
    base = os.path.basename(name)
    return (2 if isinstance(state, str) else int(base.startswith(METADATA_FILE) or base == 'config.json'), name)


def _read_list(store: RemoteStore) -> Files:
    """What an earlier run has copied; nothing if there is no readable list, so that everything is copied."""
    try:
        found = json.loads(store.read_text(LIST_NAME))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
