"""Checkpoint files and links that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any, Callable

from llmfoundry.checkpoint.remote_store import INCOMPLETE_PREFIX
from llmfoundry.errors import CheckpointError
from llmfoundry.whole_files import appearing_whole, flush_folder

__all__ = ['INCOMPLETE_PREFIX', 'failed_write', 'link_atomically', 'write_atomically']


def write_atomically(write: Callable[[Any, str], None], state_dict: Any, filename: str) -> None:
    """Calls ``write(state_dict, path)`` with a hidden path and renames the result to ``filename``.

    Raises:
        CheckpointError: the write failed; nothing is left behind and older checkpoints are untouched.
    """
    folder, name = os.path.split(filename)
    # The suffix stays the same, since Composer chooses the compression by it.
    hidden = os.path.join(folder, INCOMPLETE_PREFIX + name)
    written = 0
    try:
        os.makedirs(folder or '.', exist_ok=True)
        with appearing_whole(filename, hidden):
            try:
                write(state_dict, hidden)
            finally:
                written = os.path.getsize(hidden) if os.path.exists(hidden) else 0
        flush_folder(folder)
    except (OSError, RuntimeError) as e:  # torch's zip writer turns a full disk into a RuntimeError
        raise failed_write(filename, e, written) from e


def link_atomically(target: str, link: str) -> None:
    """Makes ``link`` a relative symbolic link to ``target``, over an older one; at every moment there is one of the two.

    Raises:
        CheckpointError: the link could not be made.
    """
    folder, name = os.path.split(link)
    hidden = os.path.join(folder, INCOMPLETE_PREFIX + name)
    try:
        os.makedirs(folder or '.', exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.remove(hidden)
        os.symlink(os.path.relpath(target, folder or '.'), hidden)
        os.replace(hidden, link)
        flush_folder(folder)
    except OSError as e:
        raise failed_write(link, e) from e


def failed_write(path: str, cause: BaseException, written: int | None = None) -> CheckpointError:
    """The error about ``path``; with the space that was left if ``written``, the bytes that it took, is known."""
    folder = Path(path).parent
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    sizes = '' if written is None else f' ({written:,} bytes in, {free:,} bytes free)'
    reason = str(cause).partition('\n')[0]
    return CheckpointError(
        f'save_folder: the checkpoint {path!r} could not be written{sizes}: {type(cause).__name__}: {reason}. '
        'Earlier checkpoints are untouched. Free some space or choose another save_folder (save_num_checkpoints_to_keep limits how many are kept), then rerun with autoresume: true.',
    )
