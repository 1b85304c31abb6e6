"""Logs by how much metrics change from one report to the next: a finite difference over training batches or evaluations."""

from __future__ import annotations

from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger

from llmfoundry.callbacks.total_loss import total_loss

__all__ = ['FDiffMetrics']


class FDiffMetrics(Callback):
    """Adds a value ``{metric}_fdiff`` for each metric, from its second report on.

    Args:
        diff_train_metrics: differences of the training loss and metrics, per batch.
        diff_eval_metrics: differences of each evaluation's metrics.

    Raises:
        NotImplementedError: (in training) a model with several losses and no total.
    """

    def __init__(self, diff_train_metrics: bool = False, diff_eval_metrics: bool = True) -> None:
        self.diff_train_metrics = diff_train_metrics
        self.diff_eval_metrics = diff_eval_metrics
        self._train: dict[str, float] = {}
        self._eval: dict[str, float] = {}

    def batch_end(self, state: State, logger: Logger) -> None:
        if not self.diff_train_metrics:
            return
        values = {'loss/train/total': _total(state.loss), **{f'metrics/train/{name}': _scalar(metric) for name, metric in (state.train_metrics or {}).items()}}
        self._train = _log_differences(values, self._train, logger)

    def eval_end(self, state: State, logger: Logger) -> None:
        if not self.diff_eval_metrics:
            return
        label = state.dataloader_label
        values = {f'metrics/{label}/{name}': _scalar(metric) for name, metric in state.eval_metrics.get(label, {}).items()}
        self._eval = {**self._eval, **_log_differences(values, self._eval, logger)}


def _log_differences(values: dict[str, float], before: dict[str, float], logger: Logger) -> dict[str, float]:
    differences = {f'{name}_fdiff': value - before[name] for name, value in values.items() if name in before}
    if differences:
        logger.log_metrics(differences)
    return values


def _total(loss: Any) -> float:
    if isinstance(loss, (list, tuple)) or (isinstance(loss, dict) and 'total' not in loss):
        raise NotImplementedError(f'fdiff_metrics: the model returns several losses without a total ({type(loss).__name__}); set diff_train_metrics: false')
    return total_loss(loss).detach().float().item()


def _scalar(metric: Any) -> float:
    return float(metric.compute())
