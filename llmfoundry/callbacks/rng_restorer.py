"""Restores the random state of a checkpoint taken in mid-epoch.

Composer restores it at an epoch's start, or while it skips batches one by one. A streaming loader jumps to its place instead, and then nobody restores
it: dropout masks after a resume would differ from those of the uninterrupted run. This callback does it right before the first batch is trained, or, where the
checkpoint was taken after the last batch of an epoch, before the next epoch's loader draws its seed.
"""

from __future__ import annotations

from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import reproducibility

__all__ = ['RNGRestorer']


class RNGRestorer(Callback):
    """Loads ``rng_state`` (one entry per rank, as Composer's checkpoints hold it) at the first ``EPOCH_START`` or ``BATCH_START``."""

    def __init__(self, rng_state: list[dict[str, Any]]) -> None:
        self._rng_state: list[dict[str, Any]] | None = rng_state

    def epoch_start(self, state: State, logger: Logger) -> None:
        self.batch_start(state, logger)

    def batch_start(self, state: State, logger: Logger) -> None:
        del state, logger
        if self._rng_state is not None:
            reproducibility.load_rng_state(self._rng_state)
            self._rng_state = None
