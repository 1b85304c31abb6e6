"""Norms that Composer's ``OptimizerMonitor`` logs per parameter.

It calls ``report_per_parameter_metrics`` for each parameter after the step, then, if parameters are sharded, ``pre_reduce_metrics`` and
``dist_reduce_metrics``. What is reported is the norm of this rank's share, so that the squares of all ranks add up to the square of the norm of the whole.
"""

from __future__ import annotations

import math
from typing import Any, Iterator

import torch
import torch.distributed as torch_dist
from torch.distributed.tensor import DTensor

__all__ = ['UpdateNormMetrics', 'local_norm', 'local_tensor', 'reduce_metrics', 'squared_norms']


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _num_replicas(tensor: torch.Tensor) -> int:
    """How many ranks hold the same shard."""
    if not isinstance(tensor, DTensor):
        return 1
    mesh = tensor.device_mesh
    replicas = math.prod(mesh.size(dim) for dim, placement in enumerate(tensor.placements) if placement.is_replicate())
    return replicas * (torch_dist.get_world_size() // mesh.size())


def local_norm(tensor: torch.Tensor) -> torch.Tensor:
    """The share of the L2 norm that this rank accounts for: the squares of the shares of all ranks sum to the square of the norm."""
    norm = torch.linalg.vector_norm(local_tensor(tensor).float())
    return norm / math.sqrt(_num_replicas(tensor))


def squared_norms(tensors: list[torch.Tensor | None], device: torch.device) -> torch.Tensor:
    """Squared L2 norms of whole tensors, (len(tensors),), equal on all ranks; None counts as 0.

    One collective for all of them, in which every rank takes part whatever it holds: a rank without a shard of a parameter must not leave the others waiting.
    Unsharded tensors that every rank holds alike are counted once per rank, a factor that cancels when a norm is compared with its own mean.
    """
    zero = torch.zeros((), device=device)
    squares = torch.stack([zero if tensor is None else local_norm(tensor).square() for tensor in tensors]) if tensors else torch.zeros(0, device=device)
    if _is_distributed():
        torch_dist.all_reduce(squares)
    return squares


def _is_distributed() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized() and torch_dist.get_world_size() > 1


def reduce_metrics(metrics: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Combines metrics of all ranks: keys that start with ``l2_norm`` hold squares and become the root of their sum, others the mean over the ranks that have them."""
    keys = sorted(metrics)
    if _is_distributed():
        gathered: list[list[str]] = [[] for _ in range(torch_dist.get_world_size())]
        torch_dist.all_gather_object(gathered, keys)
        keys = sorted({key for rank_keys in gathered for key in rank_keys})
    if not keys:
        return metrics
    sums = torch.tensor([[float(metrics.get(key, 0.0)), float(key in metrics)] for key in keys], dtype=torch.float64, device='cpu' if device.type == 'cpu' else device)
    if _is_distributed():
        torch_dist.all_reduce(sums)
    for key, (total, count) in zip(keys, sums.tolist(), strict=True):
        metrics[key] = math.sqrt(total) if key.startswith('l2_norm') else total / count
    return metrics


class UpdateNormMetrics:
    """The hooks of ``OptimizerMonitor`` for optimizers with a momentum called ``exp_avg``. Mix into a ``torch.optim.Optimizer``."""

    param_groups: list[dict[str, Any]]
    state: Any
    _step_lrs: dict[int, float]

    def _remember_lrs(self) -> None:
        """Keeps the learning rates of this step; the schedule has moved on when the monitor asks. Kept outside of the groups, which are saved."""
        self._step_lrs = {i: float(group['lr']) for i, group in enumerate(self.param_groups)}

    def _groups_with(self, param: torch.Tensor) -> Iterator[tuple[dict[str, Any], float]]:
        lrs = getattr(self, '_step_lrs', {})
        for i, group in enumerate(self.param_groups):
            if i in lrs and any(param is p for p in group['params']):
                yield group, lrs[i]

    def _last_step(self, param: torch.Tensor, state: dict[str, Any], group: dict[str, Any], lr: float) -> torch.Tensor:
        """What the last step subtracted from this rank's share of ``param``, weight decay apart."""
        raise NotImplementedError(f'{type(self).__name__} must define _last_step')

    def report_per_parameter_metrics(self, param: torch.Tensor, name: str, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Adds ``l2_norm/{moment,param,update,grad}/<name>``: norms of the momentum, the parameter, the last change to it, and its gradient.

        Args:
            param: a parameter of the model.
            name: its name.
            optimizer_metrics: the dict that is added to.

        Returns:
            ``optimizer_metrics``, unchanged if this optimizer has not stepped ``param`` yet or the gradient is gone.
        """
        state = self.state.get(param)
        for group, lr in self._groups_with(param) if state and param.grad is not None else ():
            step = self._last_step(param, state, group, lr)
            initial_lr = group.get('initial_lr')
            decay = group['weight_decay'] * (lr / initial_lr if initial_lr else 1.0)
            # The step left p_new = (1 - decay) * p_old - step.
            old = (local_tensor(param.detach()) + step) / (1 - decay)
            optimizer_metrics[f'l2_norm/moment/{name}'] = local_norm(state['exp_avg'])
            optimizer_metrics[f'l2_norm/param/{name}'] = local_norm(param.detach())
            optimizer_metrics[f'l2_norm/update/{name}'] = local_norm(old * decay + step) / math.sqrt(_num_replicas(param))
            optimizer_metrics[f'l2_norm/grad/{name}'] = local_norm(param.grad)
        return optimizer_metrics

    def pre_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Squares the norms, so that summing over ranks combines them."""
        for key in optimizer_metrics:
            if key.startswith('l2_norm'):
                optimizer_metrics[key] = optimizer_metrics[key] ** 2
        return optimizer_metrics

    def dist_reduce_metrics(self, optimizer_metrics: dict[str, Any]) -> dict[str, Any]:
        """Combines what ``pre_reduce_metrics`` returned on all ranks; every rank must call it."""
        return reduce_metrics(optimizer_metrics, self.param_groups[0]['params'][0].device)
