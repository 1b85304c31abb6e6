"""Files that appear whole or not at all: bytes go to another name in the same folder, are flushed to the disk, and are renamed. Standard library only."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Iterator

__all__ = ['appearing_whole', 'flush_folder', 'flush_to_disk', 'write_whole']


@contextlib.contextmanager
def appearing_whole(path: str | os.PathLike, partial: str | os.PathLike | None = None) -> Iterator[Path]:
    """Gives a path to write to, whose content becomes ``path`` when the block ends well and is removed when it does not.

    After a power cut the older file may be back; ``flush_folder`` makes the new name last, which costs a tenth of the time where many shards are written.

    Args:
        path: of the file that is to be written. Until the end an older file of that name stays as it is.
        partial: name to write to, in the same folder (default: ``path`` with ``.tmp`` behind it). One that is always the same is written over by the next run if this one is killed;
            several writers at once need a name each.
    """
    target = Path(path)
    partial = Path(partial) if partial is not None else target.with_name(f'{target.name}.tmp')
    try:
        yield partial
        flush_to_disk(partial)
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):  # on a full disk this gives back what was taken
            partial.unlink()
        raise


def write_whole(path: str | os.PathLike, data: bytes | str, partial: str | os.PathLike | None = None) -> None:
    """Writes ``data``, text as UTF-8; arguments as for ``appearing_whole``."""
    with appearing_whole(path, partial) as hidden:
        hidden.write_bytes(data.encode() if isinstance(data, str) else data)


def flush_folder(folder: str | os.PathLike) -> None:
    """Forces the names in a folder to the disk; file systems that cannot do it are left alone."""
    with contextlib.suppress(OSError):
        flush_to_disk(os.fspath(folder) or '.')


def flush_to_disk(path: str | os.PathLike) -> None:
    """Forces the content of a file, or the names in a folder, to the disk, so that it outlives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
