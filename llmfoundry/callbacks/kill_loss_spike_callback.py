"""Watches the training loss for spikes and for staying high, and reports or stops the run: Chowdhery et al. 2022 (PaLM), section 5.1, saw such spikes even with clipping.

A spike is a loss far above the mean of the last window, several steps in a row: one bad batch is not one. Staying high means that more than half of the window lies above a cap.
Both are decided on rank 0 from its own loss and told to the others, so that all ranks stop at the same step.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import torch
from composer.core import Callback, State, TimeUnit
from composer.loggers import Logger
from composer.utils import dist

from llmfoundry.callbacks.total_loss import total_loss
from llmfoundry.errors import HighLossError, LossSpikeError
from llmfoundry.experimental import experimental_class

__all__ = ['KillLossSpike']

log = logging.getLogger(__name__)

DEFAULT_WINDOW_SIZE = 100
DEFAULT_LOSS_CAP = 10
WINDOW_SHARE = 0.05  # of the run's batches, where that is more than the default window
_OK, _SPIKE, _HIGH = 0, 1, 2


@experimental_class('KillLossSpike')
class KillLossSpike(Callback):
    """Reports, and unless ``log_only`` stops, a run whose loss spikes or stays high.

    Args:
        log_only: log and record metadata, but go on.
        patience: steps in a row above the outlier bound that make a spike.
        outlier_multiplier: the bound, as a multiple of the window's mean loss.
        window_size: steps of the window. Left at 100 it grows to 5 % of the run where that is more.
        loss_cap: a loss above it is high. Left at 10 it becomes the highest loss of the first window where that is more.

    Raises:
        LossSpikeError, HighLossError: (in training, on every rank) with ``log_only: false``.
    """

    def __init__(self, log_only: bool = True, patience: int = 4, outlier_multiplier: float = 2, window_size: int = DEFAULT_WINDOW_SIZE, loss_cap: float = DEFAULT_LOSS_CAP) -> None:
        self.log_only = log_only
        self.patience = patience
        self.outlier_multiplier = outlier_multiplier
        self.window_size = window_size
        self.loss_cap = loss_cap
        self.outlier_counter = 0
        self.loss_window: deque[float] = deque(maxlen=window_size)
        self._learns_cap = loss_cap == DEFAULT_LOSS_CAP
        self._estimates_batches = False  # of a run whose duration is in tokens or samples

    def fit_start(self, state: State, logger: Logger) -> None:
        del logger
        if self.window_size != DEFAULT_WINDOW_SIZE or state.max_duration is None:
            return
        duration = state.max_duration
        if duration.unit in (TimeUnit.BATCH, TimeUnit.EPOCH):
            self._grow_window(duration.value * (1 if duration.unit == TimeUnit.BATCH else int(state.dataloader_len or 0)))
        else:
            self._estimates_batches = True

    def _grow_window(self, batches_in_run: float) -> None:
        self.window_size = max(self.window_size, int(WINDOW_SHARE * batches_in_run))
        self.loss_window = deque(self.loss_window, maxlen=self.window_size)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._estimates_batches:
            self._estimates_batches = False
            done = state.timestamp.get(state.max_duration.unit).value
            self._grow_window(state.max_duration.value * int(state.timestamp.batch) / done if done else 0)
        verdict, mean = self._judge(total_loss(state.loss).detach().float().item()) if dist.get_global_rank() == 0 else (_OK, 0.0)
        told = torch.tensor([float(verdict), mean], dtype=torch.float64)
        if dist.get_world_size() > 1:
            told = told.to(state.device._device)
            dist.broadcast(told, src=0)
        verdict, mean = int(told[0]), float(told[1])
        if verdict == _SPIKE:
            self._report(logger, LossSpikeError(self.outlier_multiplier, round(mean), self.patience), {'loss_window': list(self.loss_window)})
        elif verdict == _HIGH:
            self._report(logger, HighLossError(self.loss_cap, self.window_size), {'loss_cap': self.loss_cap, 'loss_window': list(self.loss_window)})

    def _judge(self, loss: float) -> tuple[int, float]:
        """The verdict on this step, and the window's mean before it."""
        window, mean = self.loss_window, 0.0
        verdict = _OK
        if len(window) == self.window_size:
            mean = sum(window) / len(window)
            if self._learns_cap:
                self._learns_cap = False
                self.loss_cap = max(self.loss_cap, max(window))
            self.outlier_counter = self.outlier_counter + 1 if loss >= mean * self.outlier_multiplier else 0
            if self.outlier_counter >= self.patience:
                verdict = _SPIKE
            elif sum(value > self.loss_cap for value in window) > len(window) / 2:
                verdict = _HIGH
        window.append(loss)
        return verdict, mean

    def _report(self, logger: Logger, error: LossSpikeError | HighLossError, metadata: dict[str, Any]) -> None:
        for destination in logger.destinations:
            if hasattr(destination, 'log_metadata'):
                destination.log_metadata({'loss_spike' if isinstance(error, LossSpikeError) else 'high_loss': str(error), **metadata})
        if not self.log_only:
            raise error
        log.warning('%s (log_only: true, going on)', error)
        self.outlier_counter = 0

    def state_dict(self) -> dict[str, Any]:
        return {'outlier_counter': self.outlier_counter, 'loss_window': list(self.loss_window), 'window_size': self.window_size, 'loss_cap': self.loss_cap, 'learns_cap': self._learns_cap}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.outlier_counter, self.window_size = state['outlier_counter'], state['window_size']
        self.loss_cap, self._learns_cap = state['loss_cap'], state['learns_cap']
        self.loss_window = deque(state['loss_window'], maxlen=self.window_size)
