"""Collects garbage at the same batch on every rank, instead of whenever Python's counters happen to be full on one of them.

A rank that collects while the others wait in a collective costs all of them its pause; collected together, the pauses overlap.
"""

from __future__ import annotations

import gc

import torch
from composer.core import Callback, State
from composer.loggers import Logger

__all__ = ['ScheduledGarbageCollector']


class ScheduledGarbageCollector(Callback):
    """Turns automatic collection off from the start to the end of training.

    Args:
        batch_interval: batches between full collections.
        gen_1_batch_interval: batches between collections of the younger generations; None makes none.
        eval_keep_disabled: leave automatic collection off during evaluation too.

    Raises:
        ValueError: an interval below 1.
    """

    def __init__(self, batch_interval: int, gen_1_batch_interval: int | None = None, eval_keep_disabled: bool = False) -> None:
        for name, value in (('batch_interval', batch_interval), ('gen_1_batch_interval', gen_1_batch_interval)):
            if value is not None and value < 1:
                raise ValueError(f'scheduled_gc.{name} must be at least 1 batch, got {value}')
        self.batch_interval = batch_interval
        self.gen_1_batch_interval = gen_1_batch_interval
        self.eval_keep_disabled = eval_keep_disabled
        self._was_enabled = False

    def fit_start(self, state: State, logger: Logger) -> None:
        del state, logger
        self._was_enabled = gc.isenabled()
        gc.disable()
        _collect_all()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        del logger
        batch = int(state.timestamp.batch)
        if batch % self.batch_interval == 0:
            _collect_all()
        elif self.gen_1_batch_interval is not None and batch % self.gen_1_batch_interval == 0:
            gc.collect(1)

    def eval_start(self, state: State, logger: Logger) -> None:
        del state, logger
        _collect_all()
        if not self.eval_keep_disabled and self._was_enabled:
            gc.enable()

    def eval_end(self, state: State, logger: Logger) -> None:
        del state, logger
        gc.disable()
        _collect_all()

    def fit_end(self, state: State, logger: Logger) -> None:
        del state, logger
        _collect_all()
        if self._was_enabled:
            gc.enable()


def _collect_all() -> None:
    gc.collect()
    torch.cuda.empty_cache()
