"""``fsdp_config.activation_checkpointing`` where nothing is sharded: one process, or data parallel."""

from __future__ import annotations

from composer import Callback, State
from composer.distributed.activation_checkpointing import apply_ac, generate_composer_model_check_fn
from composer.loggers import Logger

__all__ = ['ActivationRecompute']


class ActivationRecompute(Callback):
    """Recomputes the activations of the modules that the model names (``activation_checkpointing_target``) in the backward pass.

    Composer does so as a part of sharding only, so that the same YAML would need far more memory per sample on one GPU than on two. Applied at INIT: the optimizer has its parameter groups by then,
    whose patterns are over the names without the wrappers, and data parallel has not yet wrapped the model.
    """

    def init(self, state: State, logger: Logger) -> None:
        del logger
        apply_ac(state.model, True, False, generate_composer_model_check_fn(state.model))
