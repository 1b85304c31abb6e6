"""Lion: the sign of an interpolated momentum as the update, with decoupled weight decay.

Half the state of Adam (one moment). The loop goes tensor by tensor rather than through ``torch._foreach``, whose temporaries are as large as the model.
"""

from __future__ import annotations

from typing import Any, Callable, Iterable

import torch
from torch.optim import Optimizer

from llmfoundry.optim.adamw import warn_of_high_weight_decay
from llmfoundry.optim.metrics import UpdateNormMetrics, local_tensor

__all__ = ['DecoupledLionW', 'check_lion_args', 'lion_step_']


def check_lion_args(lr: float, betas: tuple[float, float]) -> None:
    """Raises ValueError unless ``lr > 0`` and both betas lie in [0, 1]."""
    if lr <= 0.0:
        raise ValueError(f'Invalid LR: {lr}. LR must be > 0')
    if len(betas) != 2 or not all(0.0 <= beta <= 1.0 for beta in betas):
        raise ValueError(f'Invalid beta values: {betas}. There must be two, all between 0 and 1.')


def lion_step_(
    param: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    lr: float,
    betas: tuple[float, float],
    decay: float,
) -> None:
    """One step of Lion in place (https://arxiv.org/abs/2302.06675, algorithm 2), with decoupled decay.

        p <- (1 - decay) * p - lr * sign(beta1 * m + (1 - beta1) * g)
        m <- beta2 * m + (1 - beta2) * g

    Args:
        param: p.
        grad: g, in the dtype of ``exp_avg``.
        exp_avg: m.
        lr: learning rate.
        betas: beta1 and beta2.
        decay: share of the weights that is removed.
    """
    beta1, beta2 = betas
    if decay:
        param.mul_(1 - decay)
    param.add_(exp_avg.lerp(grad, 1 - beta1).sign_(), alpha=-lr)
    exp_avg.lerp_(grad, 1 - beta2)


class DecoupledLionW(UpdateNormMetrics, Optimizer):
    """Lion with weight decay that follows the schedule but not the size of the learning rate: weights are multiplied by ``1 - weight_decay * lr / initial_lr``.

    Args:
        params: parameters, or dicts of parameter groups.
        lr: learning rate; about a third to a tenth of Adam's.
        betas: interpolation of the update and decay of the momentum.
        weight_decay: share of each weight that a step removes at the initial learning rate.

    Raises:
        ValueError: ``lr`` not positive, or a beta outside [0, 1].
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        check_lion_args(lr, betas)
        warn_of_high_weight_decay(weight_decay, type(self).__name__)
        super().__init__(params, {'lr': lr, 'betas': tuple(betas), 'weight_decay': weight_decay})
        for group in self.param_groups:
            group['initial_lr'] = group['lr']

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what ``closure``, if given, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._remember_lrs()
        self._observe()
        for group in self.param_groups:
            initial_lr = group.setdefault('initial_lr', group['lr'])
            decay = group['weight_decay'] * (group['lr'] / initial_lr if initial_lr else 1.0)
            for param in group['params']:
                if param.grad is not None and param.requires_grad:
                    self._step_param(param, group, decay)
        return loss

    def _observe(self) -> None:
        """Runs before the parameters are updated; what the adaptive variants hook into."""

    def _state_of(self, param: torch.Tensor) -> dict[str, Any]:
        state = self.state[param]
        if 'exp_avg' not in state:
            state['exp_avg'] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state

    def _step_param(self, param: torch.Tensor, group: dict[str, Any], decay: float) -> None:
        exp_avg = self._state_of(param)['exp_avg']
        lion_step_(param, param.grad.to(exp_avg.dtype), exp_avg, group['lr'], group['betas'], decay)

    def _last_step(self, param: torch.Tensor, state: dict[str, Any], group: dict[str, Any], lr: float) -> torch.Tensor:
        """``lr * sign(...)`` of the last step; the momentum before it is recovered from the one after it and the gradient."""
        beta1, beta2 = group['betas']
        after, grad = local_tensor(state['exp_avg']), local_tensor(param.grad).to(state['exp_avg'].dtype)
        before = (after - (1 - beta2) * grad) / beta2 if beta2 else after
        return before.lerp(grad, 1 - beta1).sign_().mul_(lr)
