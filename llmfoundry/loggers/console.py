"""Prints training progress as the documents show it.

    [batch=1/100]:
             Train LanguageCrossEntropy: 10.9736
             Train Perplexity: 58312.0586
             Train loss/train/total: 10.9736

Composer's own console logger prints every metric under its full key: bookkeeping (``time/batch``, ``time/sample``, ...) and a dozen rates per step, in which the loss
drowns. Ours keeps its intervals and evaluation lines, prints these three first, then other metrics of the model, and the few figures that a watcher acts on (learning
rate, tokens per second, time left) when their callbacks are on. Everything else still goes to the other loggers.
"""

from __future__ import annotations

from typing import Any, Mapping

from composer.loggers import ConsoleLogger
from composer.utils import dist

__all__ = ['Figure', 'TrainConsoleLogger', 'console_lines']

METRIC_PREFIX = 'metrics/train/'
SHORT_NAMES = {'LanguageCrossEntropy': 'LanguageCrossEntropy', 'LanguagePerplexity': 'Perplexity'}
EXTRA_PREFIXES = ('lr-', 'throughput/tokens_per_sec', 'throughput/device/mfu', 'time/remaining_estimate')


def console_lines(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Chooses and names what one training step prints, in order: the documented lines, other model metrics, the extras."""
    model_metrics = {k[len(METRIC_PREFIX):]: metrics[k] for k in sorted(metrics) if k.startswith(METRIC_PREFIX)}
    documented = {SHORT_NAMES[name]: model_metrics.pop(name) for name in SHORT_NAMES if name in model_metrics}
    losses = {k: metrics[k] for k in sorted(metrics) if k.startswith('loss/')}
    extras = {k: Figure(metrics[k]) for prefix in EXTRA_PREFIXES for k in sorted(metrics) if k.startswith(prefix)}
    return {**documented, **losses, **model_metrics, **extras}


class Figure(float):
    """A number printed with four significant digits: Composer's four decimals would show a learning rate of 3e-5 as 0.0000."""

    def __format__(self, spec: str) -> str:
        del spec
        return f'{float(self):.4g}'


class TrainConsoleLogger(ConsoleLogger):
    """Composer's console logger with the documented lines; prints on rank 0 only.

    Args: as Composer's, ``log_interval`` (``1ba``) and ``stream`` (``stderr``).
    """

    def log_to_console(self, data: dict[str, Any], state: Any, prefix: str = '', is_train: bool = True) -> None:
        super().log_to_console(console_lines(data) if is_train else data, state, prefix, is_train)

    def _log_hparams_to_console(self) -> None:
        """Nothing: the command prints its config once itself."""

    def _log_to_console(self, log_str: str) -> None:
        if dist.get_global_rank() == 0:
            super()._log_to_console(log_str)
