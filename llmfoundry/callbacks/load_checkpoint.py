"""Composer's ``LoadCheckpoint`` (a second checkpoint, loaded at an event of the run) with the checks of ``load_path``: there on all ranks, whole, and nothing unpickled freely."""

from __future__ import annotations

from pathlib import Path

from composer.callbacks import LoadCheckpoint
from composer.core import State
from composer.loggers import Logger
from composer.models import HuggingFaceModel
from composer.utils import checkpoint as composer_checkpoint

from llmfoundry import dist
from llmfoundry.checkpoint.composer_loading import safe_loading
from llmfoundry.checkpoint.integrity import damage_over_ranks
from llmfoundry.checkpoint.local_path import fill_ranks, follow, unreadable
from llmfoundry.errors import CheckpointError, ConfigError, ConfigProblem

__all__ = ['SafeLoadCheckpoint']


class SafeLoadCheckpoint(LoadCheckpoint):
    """Arguments as Composer's."""

    def _load(self, state: State, logger: Logger) -> None:
        """Loads; adapters are put aside as the base class does, so that full weights can come in."""
        path = self.parsed_path
        if self.load_object_store is None:
            path = self._checked(path.replace('{run_name}', state.run_name))
        adapted = isinstance(state.model, HuggingFaceModel) and state.model.should_save_peft_only
        if adapted:
            state.model.should_save_peft_only = False
        try:
            with safe_loading():
                composer_checkpoint.load_checkpoint(
                    path=path, state=state, logger=logger, object_store=self.load_object_store, strict_model_weights=self.strict_model_weights, ignore_keys=self.ignore_keys,
                    load_weights_only=self.load_weights_only,
                )
        finally:
            if adapted:
                state.model.should_save_peft_only = True

    def _checked(self, path: str) -> str:
        """What ``path`` leads to.

        Raises:
            ConfigError: it cannot be opened on some rank.
            CheckpointError: it is damaged.
        """
        path = fill_ranks(path)
        problem = next((p for p in dist.all_gather_objects(unreadable(path)) if p), None)
        if problem is not None:
            raise ConfigError([ConfigProblem('callbacks.load_checkpoint.load_path', problem)])
        target = follow(path)
        reason = damage_over_ranks(Path(target), same_files=False)
        if reason is not None:
            raise CheckpointError(f'callbacks.load_checkpoint.load_path: {path!r} is damaged: {reason}. Copy it again, or name another checkpoint.')
        return target
