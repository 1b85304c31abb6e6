"""Averages on gloo: the collectives with which FSDP2 averages gradients, made to average where torch's gloo does not.

torch 2.7.0's gloo returns the sum from ``reduce_scatter_tensor(op=AVG)`` and says nothing, so gradients of a model that is sharded over CPU ranks come out as many times too large as there are ranks;
``all_reduce(op=AVG)``, which a hybrid mesh needs besides, raises. A probe decides, because the version alone does not. A hybrid mesh also needs an event that the CPU's stream does not give.
"""

from __future__ import annotations

from typing import Any

__all__ = ['fix_cpu_events', 'fix_gloo_average']


def fix_gloo_average() -> bool:
    """Replaces the two collectives of ``torch.distributed`` if they do not average on gloo; returns whether one was replaced. Every rank must call this, with a process group of several."""
    from torch import distributed

    if distributed.get_backend() != 'gloo' or distributed.get_world_size() == 1:
        return False
    fixed = False
    for name, averages in (('reduce_scatter_tensor', _reduce_scatter_averages), ('all_reduce', _all_reduce_averages)):
        if getattr(getattr(distributed, name), '_averages', False) or averages():
            continue
        replacement = {'reduce_scatter_tensor': _make_reduce_scatter, 'all_reduce': _make_all_reduce}[name](getattr(distributed, name))
        replacement._averages = True
        setattr(distributed, name, replacement)
        setattr(distributed.distributed_c10d, name, replacement)
        fixed = True
    return fixed


def fix_cpu_events() -> bool:
    """Gives FSDP2 an event for the all-reduce of a hybrid mesh on the CPU; returns whether that was needed.

    torch 2.7 asserts that there is one. The CPU's stream has nothing to wait for and records None, so the first backward pass failed. Only this event is made up: others are None on the CPU by
    design, and torch would look for an accelerator to wait for them on.
    """
    import inspect

    import torch
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as module

    original = module.foreach_reduce
    if 'assert all_reduce_event is not None' not in inspect.getsource(module.FSDPParamGroup.post_backward) or getattr(original, '_gives_event', False):
        return False

    def foreach_reduce(*args: Any, **kwargs: Any) -> Any:
        *first, all_reduce_input, event, partial_output = original(*args, **kwargs)
        needed = event is None and all_reduce_input is not None and all_reduce_input.device.type == 'cpu'
        return (*first, all_reduce_input, torch.cpu.Event() if needed else event, partial_output)

    foreach_reduce._gives_event = True  # type: ignore[attr-defined]
    module.foreach_reduce = foreach_reduce
    return True


def _reduce_scatter_averages() -> bool:
    """Probes with ones, one per rank; a refusal (other versions) counts as no."""
    import torch
    from torch import distributed

    output = torch.zeros(1)
    try:
        distributed.reduce_scatter_tensor(output, torch.ones(distributed.get_world_size()), op=distributed.ReduceOp.AVG)
    except (RuntimeError, ValueError):
        return False
    return output.item() == 1.0


def _all_reduce_averages() -> bool:
    import torch
    from torch import distributed

    value = torch.ones(1)
    try:
        distributed.all_reduce(value, op=distributed.ReduceOp.AVG)
    except (RuntimeError, ValueError):
        return False
    return value.item() == 1.0


def _make_reduce_scatter(original: Any) -> Any:
    from torch import distributed

    def reduce_scatter_tensor(output: Any, input: Any, op: Any = distributed.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:  # noqa: A002
        if op != distributed.ReduceOp.AVG or distributed.get_backend(group) != 'gloo':
            return original(output, input, op=op, group=group, async_op=async_op)
        original(output, input, op=distributed.ReduceOp.SUM, group=group)
        output.div_(distributed.get_world_size(group))
        return _DoneWork() if async_op else None

    return reduce_scatter_tensor


def _make_all_reduce(original: Any) -> Any:
    from torch import distributed

    def all_reduce(tensor: Any, op: Any = distributed.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if op != distributed.ReduceOp.AVG or distributed.get_backend(group) != 'gloo':
            return original(tensor, op=op, group=group, async_op=async_op)
        original(tensor, op=distributed.ReduceOp.SUM, group=group)
        tensor.div_(distributed.get_world_size(group))
        return _DoneWork() if async_op else None

    return all_reduce


class _DoneWork:
    """What an asynchronous collective returns when it has been run synchronously."""

    def wait(self) -> bool:
        return True

    def is_completed(self) -> bool:
        return True
