"""Composer's checkpoint saver, with writes that are whole or absent.

Composer writes straight to the final name, so a run killed in that moment leaves a file that looks like a checkpoint and fails when it is needed. Here the bytes go to a hidden
name in the same folder, are flushed to the disk, and are renamed. Sharded checkpoints need no help in that: torch writes their ``.metadata`` last, by renaming.
A failed write (full disk, quota) of either kind removes its leftovers and says what happened, on every rank that took part.
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
from torch.distributed.checkpoint.api import CheckpointException

from llmfoundry import dist
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
        raise _failed_write(filename, e, written) from e


def _failed_write(path: str, cause: BaseException, written: int | None = None) -> CheckpointError:
    """The error about ``path``; with the space that was left if ``written``, the bytes that it took, is known."""
    folder = os.path.dirname(path) or '.'
    free = shutil.disk_usage(folder).free if os.path.isdir(folder) else 0
    sizes = '' if written is None else f' ({written:,} bytes in, {free:,} bytes free)'
    reason = str(cause).partition('\n')[0]
    return CheckpointError(
        f'save_folder: the checkpoint {path!r} could not be written{sizes}: {type(cause).__name__}: {reason}. '
        'Earlier checkpoints are untouched. Free some space or choose another save_folder (save_num_checkpoints_to_keep limits how many are kept), then rerun with autoresume: true.',
    )


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
        try:
            with _atomic_writes():
                super()._save_checkpoint(state, logger)
        except CheckpointException as e:  # torch's, which every rank gets when the write of one has failed
            causes = [cause for cause, _ in e.failures.values()]
            if not all(isinstance(cause, OSError | RuntimeError) for cause in causes):
                raise
            raise self._remove_failed_shards(state, causes[0]) from e

    def _remove_failed_shards(self, state: State, cause: BaseException) -> CheckpointError:
        """Removes the folder of a sharded checkpoint that could not be written; returns the error to raise.

        Rank 0 removes it, and alone can say how large it was: no rank writes any more, but with several replicas not every rank comes here, so they cannot wait for each other.
        """
        folder = os.path.dirname(composer_checkpoint.get_save_filename(state, self.filename.format(state, keep_placeholders=True)))
        if dist.get_global_rank() != 0 or not os.path.isdir(folder):
            return _failed_write(folder, cause)
        error = _failed_write(folder, cause, sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()))
        shutil.rmtree(folder, ignore_errors=True)
        return error
