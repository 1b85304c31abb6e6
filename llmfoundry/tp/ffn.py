"""The tensor-parallel strategy ``ffn``: feed-forward blocks are split over the tensor-parallel ranks, everything else is not.

The first projection is split by columns and the second by rows (https://arxiv.org/abs/1909.08053, section 3), so a block needs one collective on the way in and
one on the way out. Ranks of a tensor-parallel group hold different samples, since the data loader knows nothing of the group: the way in gathers
their batches, the way out scatters the sums back. Each rank's loss is a mean over its own samples, so the split weights would get the sum of the ranks' gradients, where every other weight gets
their mean: inside the block gradients are divided by the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle

__all__ = ['ffn_tp_strategy']

_REQUIRED = ('ffn', 'ffn.up_proj', 'ffn.down_proj')


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.factor, None


class _GatherSamples(PrepareModuleInput):
    """Gathers the batches of the ranks in front of a block whose weights get the mean of the ranks' gradients."""

    def __init__(self) -> None:
        super().__init__(input_layouts=Shard(0), desired_input_layouts=Replicate(), use_local_output=True)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        ranks = device_mesh.size()
        module.register_forward_pre_hook(lambda module, args: (_ScaleGradient.apply(args[0], float(ranks)), *args[1:]))
        module.register_forward_hook(lambda module, args, output: _ScaleGradient.apply(output, 1.0 / ranks))
        return super()._apply(module, device_mesh)


def _style(name: str) -> ParallelStyle | None:
    """The style of the module with this dotted name; None leaves it whole."""
    path = name.split('.')
    if path[-1] == 'ffn':
        return _GatherSamples()
    if path[-2:] in (['ffn', 'up_proj'], ['ffn', 'gate_proj']):
        return ColwiseParallel()
    if path[-2:] == ['ffn', 'down_proj']:
        return RowwiseParallel(output_layouts=Shard(0))
    return None


def ffn_tp_strategy(model: nn.Module) -> dict[str, ParallelStyle]:
    """Returns the layer plan of ``model``: dotted module name -> parallel style, as ``parallelize_module`` takes it.

    Args:
        model: a model whose blocks have an ``ffn`` with ``up_proj`` and ``down_proj`` (and ``gate_proj`` if gated).

    Raises:
        RuntimeError: there are no such modules.
    """
    names = [name for name, _ in model.named_modules()]
    missing = [required for required in _REQUIRED if not any(f'.{name}'.endswith(f'.{required}') for name in names)]
    if missing:
        raise RuntimeError(
            f"tp_config.strategy 'ffn' needs modules named {', '.join(_REQUIRED)}; {type(model).__name__} has none named {', '.join(missing)}. Use an MPT model with ffn_type mptmlp or mptglu",
        )
    return {name: style for name in names if (style := _style(name)) is not None}
