"""The work folder of a conversion: finished shards, the spool of the unfinished one, and the journal that lets a killed run go on.

Everything lives in ``<output>/.data_prep`` until the end; then the shards move up and ``index.json`` moves last, so that a folder with an index is
whole. A checkpoint is one small state file, replaced atomically; the files that it refers to only grow and are cut back to the recorded length at a
restart. The work folder lies inside the output folder and not beside it, since an output folder may be a mount point, and only a rename within one
file system is atomic.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Iterator, Mapping

import numpy as np

from llmfoundry.command_utils.data_prep.mds_shards import ShardBuilder, index_text
from llmfoundry.data.token_concat import TOKEN_DTYPE, empty_tokens
from llmfoundry.errors import DataError
from llmfoundry.whole_files import flush_folder, write_whole

__all__ = ['BAD_ROWS_FILENAME', 'WORK_FOLDER', 'Journal', 'JournaledShards', 'State', 'journalled']

WORK_FOLDER = '.data_prep'
BAD_ROWS_FILENAME = 'bad_rows.jsonl'
_STATE, _SHARDS, _INDEX = 'state.json', 'shards.jsonl', 'index.json'
_FRAME = np.dtype('<u4')


@dataclass
class State:
    """What a checkpoint holds. ``*_bytes`` are lengths of the append-only files that belong to it, ``dropped`` counts left-out documents by reason."""

    fingerprint: str = ''
    engine: str = 'auto'
    position: dict[str, int] = field(default_factory=dict)
    leftover: str = ''
    num_shards: int = 0
    shards_bytes: int = 0
    spool_bytes: int = 0
    bad_rows: int = 0
    bad_rows_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    samples: int = 0
    input_bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    finished: bool = False

    def leftover_tokens(self) -> np.ndarray:
        """The tokens that do not fill a sample yet."""
        return np.frombuffer(base64.b64decode(self.leftover), dtype=TOKEN_DTYPE) if self.leftover else empty_tokens()

    def set_leftover(self, tokens: np.ndarray) -> None:
        """Stores the tokens that do not fill a sample yet."""
        self.leftover = base64.b64encode(tokens.astype(TOKEN_DTYPE).tobytes()).decode()


class Journal:
    """Reads and writes the work folder below ``output``."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / WORK_FOLDER
        self._spool: Any = None
        self._shards: Any = None
        self._bad_rows: Any = None

    def load(self) -> State | None:
        """The last checkpoint, or None."""
        try:
            with open(self.folder / _STATE, encoding='utf-8') as f:
                return State(**json.load(f))
        except (FileNotFoundError, NotADirectoryError, TypeError, json.JSONDecodeError):
            # Nothing there, or written by another version: both mean to begin anew.
            return None

    def start(self, fingerprint: str, engine: str) -> State:
        """Empties the work folder and begins anew."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if not (self.output / _INDEX).exists():
            # Shards without an index: a run that was killed while it moved its result up.
            for path in self.output.glob('shard.*.mds*'):
                path.unlink()
        self.folder.mkdir(parents=True)
        state = State(fingerprint=fingerprint, engine=engine)
        self._open(state)
        return state

    def resume(self, state: State) -> Iterator[tuple[np.ndarray, bytes]]:
        """Opens the files of a checkpoint, cut back to it, and yields the spooled samples of the unfinished shard as (sizes, payload)."""
        self._open(state)
        with open(self._spool_path(state.num_shards), 'rb') as f:
            while f.tell() < state.spool_bytes:
                count = int(np.frombuffer(f.read(_FRAME.itemsize), _FRAME)[0])
                sizes = np.frombuffer(f.read(count * _FRAME.itemsize), _FRAME)
                yield sizes, f.read(int(sizes.sum(dtype=np.int64)))

    def _open(self, state: State) -> None:
        self._spool = _open_at(self._spool_path(state.num_shards), state.spool_bytes)
        self._shards = _open_at(self.folder / _SHARDS, state.shards_bytes)
        self._bad_rows = _open_at(self.folder / BAD_ROWS_FILENAME, state.bad_rows_bytes)

    def _spool_path(self, number: int) -> Path:
        return self.folder / f'spool.{number:05}'

    def spool(self, sizes: np.ndarray, payload: bytes) -> None:
        """Appends samples of the unfinished shard."""
        self._spool.write(_FRAME.type(len(sizes)).tobytes() + sizes.astype(_FRAME).tobytes())
        self._spool.write(payload)

    def add_shard(self, entry: dict[str, Any], number: int) -> None:
        """Records a finished shard and begins the spool of the next one."""
        self._shards.write(json.dumps(entry).encode() + b'\n')
        self._spool.close()
        self._spool = _open_at(self._spool_path(number + 1), 0)

    def add_bad_row(self, row: dict[str, Any]) -> None:
        """Lists a skipped row."""
        self._bad_rows.write(json.dumps(row, ensure_ascii=False).encode('utf-8', 'replace') + b'\n')

    def checkpoint(self, state: State) -> None:
        """Makes ``state`` the point from which a killed run goes on."""
        for f in (self._spool, self._shards, self._bad_rows):
            f.flush()
            os.fsync(f.fileno())
        state.spool_bytes, state.shards_bytes, state.bad_rows_bytes = self._spool.tell(), self._shards.tell(), self._bad_rows.tell()
        write_whole(self.folder / _STATE, json.dumps(asdict(state)))
        for old in self.folder.glob('spool.*'):
            if old != self._spool_path(state.num_shards):
                old.unlink()

    def shards(self) -> list[dict[str, Any]]:
        """Index entries of all finished shards."""
        with open(self.folder / _SHARDS, encoding='utf-8') as f:
            return [json.loads(line) for line in f]

    def publish(self, state: State, extra_files: Mapping[str, str]) -> None:
        """Moves the result and ``extra_files`` (name -> text) into the output folder, index last, and removes the work folder.

        May be repeated after a kill.
        """
        if not state.finished:
            entries = self.shards()
            write_whole(self.folder / _INDEX, index_text(entries))
            state.finished = True
            self.checkpoint(state)
        self.close()
        if (self.folder / _INDEX).exists():
            for path in sorted(self.folder.glob('shard.*.mds*')):
                os.replace(path, self.output / path.name)
            if state.bad_rows:
                shutil.copyfile(self.folder / BAD_ROWS_FILENAME, self.output / BAD_ROWS_FILENAME)
            for name, text in extra_files.items():
                write_whole(self.output / name, text)
            flush_folder(self.output)
            os.replace(self.folder / _INDEX, self.output / _INDEX)
        flush_folder(self.output)
        shutil.rmtree(self.folder)

    def discard(self, remove_output: bool) -> None:
        """Removes the work folder, and if so wished the output folder, provided that nothing else is in it."""
        self.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if not remove_output:
            return
        try:
            self.output.rmdir()
        except OSError:
            # Not empty, or not ours to remove: leave it.
            return

    def close(self) -> None:
        """Closes the files; a second call does nothing."""
        for f in (self._spool, self._shards, self._bad_rows):
            if f is not None:
                # Closing flushes: on a full disk that fails again, after the error that is already on its way.
                try:
                    f.close()
                except OSError:
                    continue
        self._spool = self._shards = self._bad_rows = None


class JournaledShards:
    """Samples on their way into shards; those of the unfinished shard lie in the journal's spool, so that a kill loses only what came after the last
    checkpoint.

    Args:
        columns, compression, size_limit: see ``ShardBuilder``.
        journal: where shards and spool go.
    """

    def __init__(self, columns: Mapping[str, tuple[str, int | None]], compression: str | None, size_limit: int, journal: Journal) -> None:
        self._builder = ShardBuilder(columns, compression, size_limit)
        self._journal = journal
        self.state = State()
        self.changed = False

    def start(self, fingerprint: str, engine: str) -> None:
        """Begins anew."""
        self.state = self._journal.start(fingerprint, engine)

    def resume(self, state: State) -> None:
        """Goes on from a checkpoint."""
        self.state = state
        if not state.finished:
            for sizes, payload in self._journal.resume(state):
                self._builder.add(sizes, payload)

    def add(self, sizes: np.ndarray, payload: bytes) -> None:
        """Adds encoded samples of ``sizes`` bytes each, laid end to end in ``payload``; ``changed`` says that a shard was finished since the last
        checkpoint."""
        self.state.samples += len(sizes)
        while len(sizes):
            fit = self._builder.room(sizes)
            if fit == 0:
                self._write()
                continue
            cut = int(sizes[:fit].sum())
            self._journal.spool(sizes[:fit], payload[:cut])
            self._builder.add(sizes[:fit], payload[:cut])
            sizes, payload = sizes[fit:], payload[cut:]

    def end(self) -> None:
        """Writes the last shard."""
        if self._builder.num_samples:
            self._write()

    def checkpoint(self) -> None:
        """Makes the present state the point from which a killed run goes on."""
        self._journal.checkpoint(self.state)
        self.changed = False

    def _write(self) -> None:
        entry = self._builder.write(self._journal.folder, self.state.num_shards)
        self._journal.add_shard(entry, self.state.num_shards)
        self.state.num_shards += 1
        self.changed = True


def _open_at(path: Path, length: int) -> Any:
    """Opens an append-only file for writing, cut back to ``length`` bytes."""
    f = open(path, 'r+b' if path.exists() else 'w+b')  # noqa: SIM115
    f.truncate(length)
    f.seek(length)
    return f


@contextlib.contextmanager
def journalled(output: Path) -> Iterator[Journal]:
    """The journal of a conversion into ``output``, which is made if it is absent, and goes again if nothing worth keeping was made.

    Raises:
        DataError: the output cannot be written.
    """
    journal, existed = Journal(output), output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        yield journal
    except OSError as e:
        reason = os.strerror(e.errno) if e.errno else str(e)
        raise DataError(
            f'cannot write the output: {reason}. Make room or choose another folder, then run the same command again.', file=str(output)
        ) from e
    finally:
        journal.close()
        state = journal.load()
        if state is None or not state.documents:
            # Published, or nothing worth keeping was made; a folder that holds something stays.
            journal.discard(remove_output=not existed)
