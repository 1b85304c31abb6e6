"""Composer's checkpoint saver, with writes that are whole or absent.

Composer writes straight to the final name, so a run killed in that moment leaves a file that looks like a checkpoint and fails when it is needed. Here the bytes go to a hidden
name in the same folder, are flushed to the disk, and are renamed. A failed write (full disk, quota) removes its leftovers and says what happened. Sharded checkpoints
need no help: torch writes their ``.metadata`` last, by renaming.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Any, Callable, Iterator

from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import Logger
from composer.utils import checkpoint as composer_checkpoint

from llmfoundry.errors import CheckpointError

__all__ = ['INCOMPLETE_PREFIX', 'AtomicCheckpointSaver', 'write_atomically']

INCOMPLETE_PREFIX = '.incomplete-'


def write_atomically(write: Callable[[Any, str], None], state_dict: Any, filename: str) -> None:
    """Calls ``write(state_dict, path)`` with a hidden path and renames the result to ``filename``.

    Raises:
        CheckpointError: the write failed; nothing is left behind and older checkpoints are untouched.
    """
    folder, name = os.path.split(filename)
    # The suffix stays the same, since Composer chooses the compression by it.
    hidden = os.path.join(folder, INCOMPLETE_PREFIX + name)
    try:
        write(state_dict, hidden)
        with open(hidden, 'rb') as f:
            os.fsync(f.fileno())
        os.replace(hidden, filename)
    except (OSError, RuntimeError) as e:  # torch's zip writer turns a full disk into a RuntimeError
        written = os.path.getsize(hidden) if os.path.exists(hidden) else 0
        with contextlib.suppress(OSError):
            os.remove(hidden)
        free = shutil.disk_usage(folder or '.').free if os.path.isdir(folder or '.') else 0
        cause = str(e).partition('\n')[0]
        raise CheckpointError(
            f'save_folder: the checkpoint {filename!r} could not be written ({written:,} bytes in, {free:,} bytes free): {type(e).__name__}: {cause}. '
            'Earlier checkpoints are untouched. Free some space or choose another save_folder (save_num_checkpoints_to_keep limits how many are kept), then rerun with autoresume: true.',
        ) from e


@contextlib.contextmanager
def _atomic_writes() -> Iterator[None]:
    """Composer offers no hook around the one function that writes the file, so it is replaced while a checkpoint is saved."""
    original = composer_checkpoint._write_checkpoint_file
    composer_checkpoint._write_checkpoint_file = lambda state_dict, filename: write_atomically(original, state_dict, filename)
    try:
        yield
    finally:
        composer_checkpoint._write_checkpoint_file = original


class AtomicCheckpointSaver(CheckpointSaver):
    """``CheckpointSaver`` for local folders; arguments as Composer's."""

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        with _atomic_writes():
            super()._save_checkpoint(state, logger)
