"""Saves the adapter of a PEFT run in PEFT's own format with every checkpoint, so that ``PeftModel.from_pretrained`` loads it without an extraction step.

``train`` adds it beside the checkpoint saver wherever there is a save folder; without an adapter it does nothing. A folder appears under its name only when it is whole.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from composer.core import Callback, Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, format_name_with_dist, format_name_with_dist_and_time, parse_uri

from llmfoundry import dist
from llmfoundry.checkpoint.adapters import gather_adapter, write_adapter
from llmfoundry.checkpoint.hf_folder import appears_whole
from llmfoundry.checkpoint.remote_store import RemoteStore
from llmfoundry.checkpoint.upload import upload_folder
from llmfoundry.errors import CheckpointError
from llmfoundry.models.composer_base import BaseHuggingFaceModel

__all__ = ['AdapterSaver']

log = logging.getLogger(__name__)


class AdapterSaver(Callback):
    """Saves adapters as ``{save_folder}/adapter/ba{batch}``.

    Args:
        save_folder: local folder or URI; ``{run_name}`` and the like are filled in.
        save_interval: as the checkpoint saver's; the end of training is always saved.
        num_to_keep: how many are kept, the newest; -1 for all.
        folder_name: name of each folder below ``save_folder``.

    Raises:
        ValueError: at start, an adapter of a prompt learning method in a sharded model.
    """

    def __init__(self, save_folder: str, save_interval: str | int | Time, num_to_keep: int = -1, folder_name: str = 'adapter/ba{batch}') -> None:
        self.save_folder = save_folder
        self.num_to_keep = num_to_keep
        self.folder_name = folder_name
        self.is_remote = parse_uri(save_folder)[0] != ''
        self.saved: list[str] = []
        self._should_save = create_interval_scheduler(Time.from_input(save_interval, TimeUnit.EPOCH), include_end_of_training=True)
        self._last_batch: Time | None = None

    def state_dict(self) -> dict[str, Any]:
        return {'saved': list(self.saved)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved = list(state.get('saved', ()))

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        del logger
        if event == Event.FIT_START:
            _check_sharding(state)
        elif state.get_elapsed_duration() is not None and self._last_batch != state.timestamp.batch and self._should_save(state, event):
            self._last_batch = state.timestamp.batch
            self.save(state)

    def save(self, state: State) -> None:
        """Saves now, if the model has an adapter; every rank must call it.

        Raises:
            CheckpointError: on every rank, if rank 0 could not write.
        """
        model = _unwrapped(state)
        if not _has_adapter(model):
            return
        weights = gather_adapter(model)
        try:
            dist.on_rank_zero(lambda: self._write(state, model, weights))
        except (OSError, RuntimeError) as e:
            raise CheckpointError(f'save_folder: the adapter of batch {int(state.timestamp.batch)} could not be written to {self.save_folder!r}: {e}') from e

    def _write(self, state: State, model: BaseHuggingFaceModel, weights: dict[str, torch.Tensor]) -> None:
        name = format_name_with_dist_and_time(self.folder_name, state.run_name, state.timestamp)
        base = format_name_with_dist(self.save_folder, state.run_name)
        if self.is_remote:
            with tempfile.TemporaryDirectory(prefix='adapter-') as temporary:
                folder = Path(temporary)
                write_adapter(folder, model.model, weights, model.tokenizer)
                upload_folder(folder, f'{base.rstrip("/")}/{name}')
        else:
            with appears_whole(Path(base) / name, overwrite=True) as folder:
                write_adapter(folder, model.model, weights, model.tokenizer)
        log.info('wrote the adapter %s/%s', base, name)
        self.saved = [kept for kept in self.saved if kept != name] + [name]
        while 0 <= self.num_to_keep < len(self.saved):
            self._remove(base, self.saved.pop(0))

    def _remove(self, base: str, name: str) -> None:
        if not self.is_remote:
            shutil.rmtree(Path(base) / name, ignore_errors=True)
            return
        RemoteStore(base).delete_below(name, first='adapter_config')


def _check_sharding(state: State) -> None:
    model = _unwrapped(state)
    if _has_adapter(model) and state.fsdp_enabled and model.model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f'peft_config.peft_type: {model.model.active_peft_config.peft_type.value} learns a prompt that PEFT computes from its own modules at each save, which cannot be done while these '
            'are sharded. Remove fsdp_config (data parallel), or use LORA.',
        )


def _has_adapter(model: Any) -> bool:
    return isinstance(model, BaseHuggingFaceModel) and model.using_peft


def _unwrapped(state: State) -> Any:
    return state.model.module if state.is_model_ddp else state.model
