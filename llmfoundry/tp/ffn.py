"""The tensor-parallel strategy ``ffn``: feed-forward blocks are split over the tensor-parallel ranks, everything else is not.

The first projection is split by columns and the second by rows (https://arxiv.org/abs/1909.08053, section 3), so a block needs one collective on the way in and
one on the way out. Ranks of a tensor-parallel group hold different samples, since the data loader knows nothing of the group: the way in gathers
their batches, the way out scatters the sums back.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle

__all__ = ['ffn_tp_strategy']

_REQUIRED = ('ffn', 'ffn.up_proj', 'ffn.down_proj')


def _style(name: str) -> ParallelStyle | None:
    """The style of the module with this dotted name; None leaves it whole."""
    path = name.split('.')
    if path[-1] == 'ffn':
        return PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate(), use_local_output=True)
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
