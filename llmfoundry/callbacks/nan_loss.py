"""Stops the run at the first NaN or infinite loss, before the optimizer can spread it into the weights.

Composer's NaNMonitor looks at the loss of the last microbatch of its own rank. Here every microbatch counts and the ranks agree by one reduction per step, so
that all of them stop at the same step with the same error instead of leaving the others in a collective. One number is read from the device per
step, which Composer does anyway when it logs the loss.
"""

from __future__ import annotations

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist

from llmfoundry.callbacks.total_loss import total_loss
from llmfoundry.errors import NaNLossError

__all__ = ['NonFiniteLossStopper']


class NonFiniteLossStopper(Callback):
    """Raises ``NaNLossError`` on every rank before the optimizer step; the run's callbacks always hold one."""

    def __init__(self) -> None:
        self._worst: torch.Tensor | None = None

    def before_train_batch(self, state: State, logger: Logger) -> None:
        del state, logger
        self._worst = None

    def after_loss(self, state: State, logger: Logger) -> None:
        del logger
        # x * 0 is 0 for a finite x and NaN for the others; the sum keeps the first bad value's NaN without a read from the device.
        bad = total_loss(state.loss).detach().float().reshape(()) * 0
        self._worst = bad if self._worst is None else self._worst + bad

    def after_train_batch(self, state: State, logger: Logger) -> None:
        del logger
        if self._worst is None:
            return
        # 0: fine; r + 1: rank r saw it. MAX names one of the ranks that did.
        flag = torch.where(torch.isfinite(self._worst), 0, dist.get_global_rank() + 1).to(torch.int64)
        dist.all_reduce(flag, reduce_operation='MAX')
        rank = int(flag.item()) - 1
        if rank >= 0:
            loss = total_loss(state.loss)
            value = float(loss.detach()) if not bool(torch.isfinite(loss)) else float('nan')
            raise NaNLossError(batch=int(state.timestamp.batch) + 1, rank=rank, value=value)
