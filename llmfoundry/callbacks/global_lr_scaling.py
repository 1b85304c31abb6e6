"""Scales the learning rate of a run that goes on from a checkpoint, whose own rates would otherwise come back with it."""

from __future__ import annotations

import logging

from composer.core import Callback, State
from composer.loggers import Logger

from llmfoundry.experimental import experimental_class

__all__ = ['GlobalLRScaling']

log = logging.getLogger(__name__)


@experimental_class('GlobalLRScaling')
class GlobalLRScaling(Callback):
    """Multiplies every learning rate when training starts, after a checkpoint was loaded.

    Args:
        lr_scale: factor on the rate of each parameter group and on what schedulers start from.
        wd_pct: the weight decay of each group becomes this share of its new rate; 0 turns it off.
    """

    def __init__(self, lr_scale: float, wd_pct: float = 0.0) -> None:
        self.lr_scale = lr_scale
        self.wd_pct = wd_pct

    def fit_start(self, state: State, logger: Logger) -> None:
        del logger
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group['lr'] *= self.lr_scale
                if 'initial_lr' in group:
                    group['initial_lr'] *= self.lr_scale
                group['weight_decay'] = group['lr'] * self.wd_pct
                log.info('lr scaled by %s to %s, weight decay %s', self.lr_scale, group['lr'], group['weight_decay'])
        for scheduler in state.schedulers:
            scheduler.base_lrs = [rate * self.lr_scale for rate in scheduler.base_lrs]
