"""``mono_checkpoint_saver``: one unsharded file from a run whose own checkpoints may be sharded, at an interval of its own.

The file is a Composer checkpoint like any other (``load_path`` takes it, with ``load_weights_only`` where the optimizer was left out), so every tool that reads
monolithic checkpoints reads it. Weights are gathered on rank 0 in host memory, which has to hold them all; the other ranks wait.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Iterator

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import format_name_with_dist, format_name_with_dist_and_time, parse_uri, reproducibility

from llmfoundry import dist
from llmfoundry.callbacks.checkpoint_saver import write_atomically
from llmfoundry.checkpoint.remote_store import RemoteStore
from llmfoundry.errors import CheckpointError

__all__ = ['MonolithicCheckpointSaver']

log = logging.getLogger(__name__)


class MonolithicCheckpointSaver(Callback):
    """Writes ``{save_folder}/{filename}`` every ``batch_interval`` batches and at the end of training.

    Args:
        save_folder: local folder or URI; may hold ``{run_name}`` and the other placeholders of ``filename``.
        batch_interval: batches between saves.
        filename: name of each file; ``{epoch}``, ``{batch}``, ``{run_name}`` and the like are filled in.
        overwrite: whether an existing file is replaced; otherwise it is an error.
        keep_optimizers: keep the optimizers' state, which makes the file about three times as large and lets a run resume from it.

    Raises:
        ValueError: a ``batch_interval`` below 1.
        CheckpointError: (in training, on every rank) the file exists and ``overwrite`` is false, or it could not be written.
    """

    def __init__(self, save_folder: str, batch_interval: int, filename: str = 'ep{epoch}-ba{batch}.pt', overwrite: bool = False, keep_optimizers: bool = False) -> None:
        if batch_interval < 1:
            raise ValueError(f'mono_checkpoint_saver.batch_interval must be at least 1 batch, got {batch_interval}')
        self.save_folder = save_folder
        self.batch_interval = batch_interval
        self.filename = filename
        self.overwrite = overwrite
        self.keep_optimizers = keep_optimizers
        self.is_remote = parse_uri(save_folder)[0] != ''
        self._last_saved = -1

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        del logger
        if int(state.timestamp.batch) % self.batch_interval == 0:
            self.save(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        del logger
        if int(state.timestamp.batch) != self._last_saved:
            self.save(state)

    def save(self, state: State) -> None:
        """Saves now; every rank must call it.

        Raises:
            CheckpointError: on every rank, if rank 0 could not write.
        """
        self._last_saved = int(state.timestamp.batch)
        name = format_name_with_dist_and_time(self.filename, state.run_name, state.timestamp)
        folder = format_name_with_dist(self.save_folder, state.run_name)
        if not self.is_remote:
            dist.on_rank_zero(lambda: self._check_free(Path(folder) / name))  # before the gathering, which takes longest
        with _unsharded(state):
            contents: dict[str, Any] = {'state': state.state_dict(), 'rng': reproducibility.get_rng_state()}
        if not self.keep_optimizers:
            contents['state'].pop('optimizers', None)
        dist.on_rank_zero(lambda: self._write(contents, folder, name))

    def _check_free(self, target: Path) -> None:
        if target.exists() and not self.overwrite:
            raise CheckpointError(f'callbacks.mono_checkpoint_saver: {target} exists already. Set overwrite: true, or another filename or save_folder.')

    def _write(self, contents: dict[str, Any], folder: str, name: str) -> None:
        if not self.is_remote:
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(torch.save, contents, str(target))
            log.info('mono_checkpoint_saver: wrote %s', target)
            return
        with tempfile.TemporaryDirectory(prefix='mono-checkpoint-') as temporary:
            store = RemoteStore(folder, setting='callbacks.mono_checkpoint_saver.save_folder')
            if not self.overwrite and store.exists(name):
                raise CheckpointError(f'callbacks.mono_checkpoint_saver: {folder}/{name} exists already. Set overwrite: true, or another filename or save_folder.')
            local = os.path.join(temporary, os.path.basename(name))
            write_atomically(torch.save, contents, local)
            store.upload(local, name)


@contextlib.contextmanager
def _unsharded(state: State) -> Iterator[None]:
    """State dicts hold whole weights, and the model's metadata as monolithic checkpoints have it, while this is open."""
    model = state.model.module if state.is_model_ddp else state.model
    fsdp = state.fsdp_config
    kind, form = getattr(fsdp, 'state_dict_type', None), getattr(model, 'metadata_form', None)
    try:
        if fsdp is not None:
            fsdp.state_dict_type = 'full'
        if form is not None:
            model.metadata_form = 'parsed'
        yield
    finally:
        if fsdp is not None:
            fsdp.state_dict_type = kind
        if form is not None:
            model.metadata_form = form
