"""Lion with a guard against loss spikes, parameter by parameter.

Each step compares a norm of every parameter with its own recent mean. ``DecoupledAdaLRLion`` lowers the learning rate of a parameter whose momentum
is an outlier; ``DecoupledClipLion`` clips the gradient of a parameter whose gradient is one.

What is remembered is a running mean and counters, not a window of values: numbers survive every kind of (sharded) optimizer checkpoint, lists
and objects do not. The norms of all parameters are combined over ranks in one collective per step.
"""

from __future__ import annotations

from typing import Any, Iterable

import torch

from llmfoundry.optim.lion import DecoupledLionW, lion_step_
from llmfoundry.optim.metrics import squared_norms

__all__ = ['DecoupledAdaLRLion', 'DecoupledClipLion', 'adjusted_lr_scale', 'is_outlier', 'running_mean']

# Steps that the mean looks back, and that have to pass before anything can be an outlier: early norms change too fast.
MEAN_WINDOW_STEPS = 100


def is_outlier(value: float, mean: float, n_seen: int, threshold: float, min_seen: int = MEAN_WINDOW_STEPS) -> bool:
    """Whether ``value`` is more than ``threshold`` times the mean of at least ``min_seen`` earlier values."""
    return n_seen >= min_seen and value > threshold * mean


def running_mean(value: float, mean: float, n_seen: int, window: int = MEAN_WINDOW_STEPS) -> float:
    """The mean after ``value``: arithmetic over the first ``window`` values, then exponential with weight ``1 / window``."""
    return mean + (value - mean) / min(n_seen + 1, window)


def adjusted_lr_scale(n_outliers: int, lr_penalty: float, min_scale: float) -> float:
    """Factor on the learning rate after ``n_outliers`` outliers: ``lr_penalty`` for each, at least ``min_scale``."""
    return max(min_scale, lr_penalty**n_outliers)


class _OutlierLion(DecoupledLionW):
    """Observes one norm per parameter before each step; a subclass says which norm, and what an outlier leads to."""

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        outlier_threshold: float,
    ) -> None:
        if outlier_threshold <= 0.0:
            raise ValueError(f'Invalid outlier threshold: {outlier_threshold}. It must be > 0')
        super().__init__(params, lr, betas, weight_decay)
        self.outlier_threshold = outlier_threshold

    def _state_of(self, param: torch.Tensor) -> dict[str, Any]:
        state = super()._state_of(param)
        if 'norm_mean' not in state:
            state.update(n_seen=0, norm_mean=0.0, n_outliers=0, last_outlier=0)
        return state

    def _observed(self, param: torch.Tensor, group: dict[str, Any]) -> torch.Tensor | None:
        """The tensor whose norm is watched; None if there is none."""
        raise NotImplementedError(f'{type(self).__name__} must define _observed')

    def _on_observation(self, param: torch.Tensor, state: dict[str, Any], norm: float, outlier: bool) -> None:
        """Reacts to the norm of this step; ``state['norm_mean']`` is still that of earlier steps."""
        raise NotImplementedError(f'{type(self).__name__} must define _on_observation')

    def _observe(self) -> None:
        members = [(param, group) for group in self.param_groups for param in group['params'] if param.requires_grad]
        if not members:
            return
        norms = squared_norms([self._observed(param, group) for param, group in members], members[0][0].device).sqrt().tolist()
        for (param, _), norm in zip(members, norms, strict=True):
            if param.grad is None:
                continue
            state = self._state_of(param)
            outlier = is_outlier(norm, state['norm_mean'], state['n_seen'], self.outlier_threshold)
            self._on_observation(param, state, norm, outlier)
            state['norm_mean'] = running_mean(norm, state['norm_mean'], state['n_seen'])
            state['n_seen'] += 1


class DecoupledAdaLRLion(_OutlierLion):
    """``DecoupledLionW`` that lowers the learning rate of parameters whose momentum is an outlier.

    Each outlier multiplies the parameter's learning rate by ``lr_penalty``, down to ``min_scale``; ``timeout`` steps after the last one the rate is whole again.

    Args:
        params: parameters, or dicts of parameter groups.
        lr: learning rate.
        betas: interpolation of the update and decay of the momentum.
        weight_decay: share of each weight that a step removes at the initial learning rate; not lowered by outliers.
        outlier_threshold: how many times its mean the norm of a momentum must be to be an outlier.
        timeout: steps.
        lr_penalty: factor in (0, 1).
        min_scale: smallest factor in [0, 1].

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        outlier_threshold: float = 10.0,
        timeout: int = 100,
        lr_penalty: float = 0.707,
        min_scale: float = 1e-4,
    ) -> None:
        if timeout < 0:
            raise ValueError(f'Invalid timeout: {timeout}. It must be >= 0 steps')
        if not 0.0 < lr_penalty < 1.0:
            raise ValueError(f'Invalid lr_penalty: {lr_penalty}. It must lie between 0 and 1')
        if not 0.0 <= min_scale <= 1.0:
            raise ValueError(f'Invalid min_scale: {min_scale}. It must lie between 0 and 1')
        super().__init__(params, lr, betas, weight_decay, outlier_threshold)
        self.timeout = timeout
        self.lr_penalty = lr_penalty
        self.min_scale = min_scale

    def _observed(self, param: torch.Tensor, group: dict[str, Any]) -> torch.Tensor | None:
        if param.grad is None:
            return None
        # The momentum as this step will leave it, so that a spike lowers the rate in the step in which it comes.
        exp_avg = self._state_of(param)['exp_avg']
        return exp_avg.lerp(param.grad.to(exp_avg.dtype), 1 - group['betas'][1])

    def _on_observation(self, param: torch.Tensor, state: dict[str, Any], norm: float, outlier: bool) -> None:
        if outlier:
            state['n_outliers'] += 1
            state['last_outlier'] = state['n_seen']
        elif state['n_seen'] - state['last_outlier'] > self.timeout:
            state['n_outliers'] = 0

    def _lr_scale(self, param: torch.Tensor) -> float:
        return adjusted_lr_scale(self.state[param]['n_outliers'], self.lr_penalty, self.min_scale)

    def _step_param(self, param: torch.Tensor, group: dict[str, Any], decay: float) -> None:
        exp_avg = self._state_of(param)['exp_avg']
        lion_step_(param, param.grad.to(exp_avg.dtype), exp_avg, group['lr'] * self._lr_scale(param), group['betas'], decay)

    def _last_step(self, param: torch.Tensor, state: dict[str, Any], group: dict[str, Any], lr: float) -> torch.Tensor:
        return super()._last_step(param, state, group, lr).mul_(self._lr_scale(param))

    def report_per_parameter_metrics(self, param: torch.Tensor, name: str, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """As ``DecoupledLionW``, and ``layerwise_lr_scale/<name>``, the factor on the parameter's learning rate."""
        super().report_per_parameter_metrics(param, name, optimizer_metrics)
        if self.state.get(param):
            optimizer_metrics[f'layerwise_lr_scale/{name}'] = torch.tensor(self._lr_scale(param))
        return optimizer_metrics


class DecoupledClipLion(_OutlierLion):
    """``DecoupledLionW`` that clips gradients that are outliers: their norm becomes ``outlier_threshold`` times the mean.

    Args:
        params: parameters, or dicts of parameter groups.
        lr: learning rate.
        betas: interpolation of the update and decay of the momentum.
        weight_decay: share of each weight that a step removes at the initial learning rate.
        outlier_threshold: how many times its mean the norm of a gradient must be to be clipped.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        outlier_threshold: float = 5.0,
    ) -> None:
        super().__init__(params, lr, betas, weight_decay, outlier_threshold)

    def _observed(self, param: torch.Tensor, group: dict[str, Any]) -> torch.Tensor | None:
        return param.grad

    def _on_observation(self, param: torch.Tensor, state: dict[str, Any], norm: float, outlier: bool) -> None:
        if not outlier:
            return
        state['n_outliers'] += 1
        state['last_outlier'] = state['n_seen']
        param.grad.mul_(self.outlier_threshold * state['norm_mean'] / norm)

    def report_per_parameter_metrics(self, param: torch.Tensor, name: str, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """As ``DecoupledLionW``, and ``clipped_batches/<name>``, how often the parameter's gradient was clipped so far."""
        super().report_per_parameter_metrics(param, name, optimizer_metrics)
        if self.state.get(param):
            optimizer_metrics[f'clipped_batches/{name}'] = torch.tensor(float(self.state[param]['n_outliers']))
        return optimizer_metrics
