"""Adam with weight decay that does not scale with the learning rate.

Each step multiplies weights by ``1 - weight_decay * lr / initial_lr``: the decay follows the schedule but not the size of the learning rate
(https://arxiv.org/abs/1711.05101, eq. 12). The arithmetic is torch's fused AdamW kernel, one pass over the weights (5 times faster on
a CPU core than the loop of separate operations), with its ``weight_decay`` set to ours divided by ``initial_lr``.
"""

from __future__ import annotations

import logging
from typing import Any, Callable, Iterable

import torch
from torch.optim import AdamW
from torch.optim.adamw import adamw

from llmfoundry.optim.metrics import UpdateNormMetrics, local_tensor

__all__ = ['DecoupledAdamW', 'warn_of_high_weight_decay']

log = logging.getLogger(__name__)

_FUSED_DEVICES = ('cpu', 'cuda')


def warn_of_high_weight_decay(weight_decay: float, optimizer: str) -> None:
    """Logs a warning for values that suit coupled weight decay (1e-3 and more), which shrink weights thousands of times faster here."""
    if weight_decay >= 1e-3:
        log.warning(
            'You are using a high value of `weight_decay=%s` for the `%s` optimizer. Are you sure you want to do this? Your model\'s weights will be multiplied by %s on every step!',
            weight_decay,
            optimizer,
            1.0 - weight_decay,
        )


class DecoupledAdamW(UpdateNormMetrics, AdamW):
    """Adam (https://arxiv.org/abs/1412.6980) with decoupled weight decay.

    Args:
        params: parameters, or dicts of parameter groups.
        lr: learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: share of each weight that a step removes at the initial learning rate.
        amsgrad: divide by the largest second moment so far (https://arxiv.org/abs/1904.09237).
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-5,
        amsgrad: bool = False,
    ) -> None:
        warn_of_high_weight_decay(weight_decay, type(self).__name__)
        super().__init__(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)
        for group in self.param_groups:
            group['initial_lr'] = group['lr']

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient; returns what ``closure``, if given, returned.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._remember_lrs()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _state_of(self, param: torch.Tensor, amsgrad: bool) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if 'step' not in state:
            state['step'] = torch.zeros((), dtype=torch.float32, device=param.device)
            state['exp_avg'] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state['exp_avg_sq'] = torch.zeros_like(param, memory_format=torch.preserve_format)
            if amsgrad:
                state['max_exp_avg_sq'] = torch.zeros_like(param, memory_format=torch.preserve_format)
        return state

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group['params'] if p.grad is not None and p.requires_grad]
        if any(p.grad.is_sparse for p in params):
            raise RuntimeError(f'{type(self).__name__} does not support sparse gradients')
        states = [self._state_of(p, group['amsgrad']) for p in params]
        lr, initial_lr = group['lr'], group.setdefault('initial_lr', group['lr'])
        weight_decay = group['weight_decay'] / initial_lr if initial_lr else 0.0
        if group['weight_decay'] and not initial_lr:
            torch._foreach_mul_(params, 1 - group['weight_decay'])
        beta1, beta2 = group['betas']
        adamw(
            params,
            # Gradients kept in low precision by FSDP have another dtype than the weights; the kernel wants one.
            [p.grad if p.grad.dtype == p.dtype else p.grad.to(p.dtype) for p in params],
            [state['exp_avg'] for state in states],
            [state['exp_avg_sq'] for state in states],
            [state['max_exp_avg_sq'] for state in states] if group['amsgrad'] else [],
            [state['step'] for state in states],
            fused=all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for p in params),
            foreach=False,
            amsgrad=group['amsgrad'],
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=group['eps'],
            maximize=False,
        )

    def _last_step(self, param: torch.Tensor, state: dict[str, Any], group: dict[str, Any], lr: float) -> torch.Tensor:
        """``lr * m_hat / (sqrt(v_hat) + eps)`` (https://arxiv.org/abs/1412.6980, algorithm 1)."""
        beta1, beta2 = group['betas']
        n_steps = float(state['step'])
        second = local_tensor(state['max_exp_avg_sq' if group['amsgrad'] else 'exp_avg_sq'])
        denominator = (second / (1 - beta2**n_steps)).sqrt_().add_(group['eps'])
        return local_tensor(state['exp_avg']) / denominator * (lr / (1 - beta1**n_steps))
