"""Work that may run out of memory on one rank only, with an answer on which all ranks agree.

In a sharded pass the ranks exchange weights and gradients layer by layer. One that runs out of memory leaves, and the others wait for it in the next exchange until the time limit ends the run. So
before every exchange the ranks ask each other, in a reduction of one number, whether all are still there; a rank that has left takes part in that once more, to say so. The price is one small
reduction per exchange, for as long as sizes are tried.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Iterator

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule

from llmfoundry import dist

__all__ = ['all_stay_within_memory', 'is_out_of_memory', 'reset_sharded_pass']

# What FSDP2 calls, in the releases of torch since 2.7.
EXCHANGES = ('all_gather_into_tensor', 'all_gather_single', 'reduce_scatter_tensor', 'reduce_scatter_single', 'all_reduce')


class _OutOfMemoryElsewhere(Exception):
    """Another rank ran out of memory; raised in front of an exchange that it would not come to."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: CUDA's, Python's, or that of torch's CPU allocator, which is a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or (isinstance(error, RuntimeError) and 'DefaultCPUAllocator' in str(error))


def all_stay_within_memory(work: Callable[[], None], model: nn.Module) -> bool:
    """Runs ``work`` on every rank; False, on every rank, if any of them ran out of memory. Collective.

    Args:
        work: passes of ``model``. Its gradients are worthless after a False.
        model: afterwards ready for another pass, sharded or not.
    """
    several = dist.is_initialized() and dist.get_world_size() > 1
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    survived = _survives(work, ask=several and sharded)
    if survived is None:  # another rank's lack, on which this rank has agreed already
        all_survived = False
    else:
        all_survived = bool(dist.all_reduce_min(int(survived)))
    if not all_survived and sharded:
        reset_sharded_pass(model)
    return all_survived


def _survives(work: Callable[[], None], ask: bool) -> bool | None:
    """Whether the work was done; None if it was left since another rank ran out of memory. A function of its own, so that the error's traceback, which holds the activations, is gone after it."""
    try:
        with _asking_before_exchanges() if ask else contextlib.nullcontext():
            work()
    except _OutOfMemoryElsewhere:
        return None
    except (MemoryError, RuntimeError) as e:  # CUDA's out-of-memory error is a RuntimeError too
        if not is_out_of_memory(e):
            raise
        return False
    return True


@contextlib.contextmanager
def _asking_before_exchanges() -> Iterator[None]:
    """Within it, the exchanges of ``torch.distributed`` first ask whether all ranks have come this far."""
    originals: dict[str, Any] = {name: getattr(distributed, name) for name in EXCHANGES if hasattr(distributed, name)}
    asking = False  # the question is a reduction itself

    def wrap(original: Any) -> Any:
        @functools.wraps(original)
        def exchange(*args: Any, **kwargs: Any) -> Any:
            nonlocal asking
            if not asking:
                asking = True
                try:
                    everyone = dist.all_reduce_min(1)
                finally:
                    asking = False
                if not everyone:
                    raise _OutOfMemoryElsewhere()
            return original(*args, **kwargs)

        return exchange

    for name, original in originals.items():
        setattr(distributed, name, wrap(original))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)


def reset_sharded_pass(model: nn.Module) -> None:
    """Makes a sharded model ready for another forward pass after an exception in the middle of one: whole weights are freed, pending exchanges and gradients forgotten."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    roots = [module for module in sharded if module._get_fsdp_state()._is_root]
    for module in roots:
        if hasattr(module, 'reset_iter_state'):  # torch has it since 2.13
            module.reset_iter_state()
        else:
            _reset_root(module._get_fsdp_state())
    for p in model.parameters():
        p.grad = None


def _reset_root(root: Any) -> None:
    """What torch's own ``reset_iter_state`` does, for the releases before it."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    shared = root._comm_ctx
    shared.all_gather_state = shared.reduce_scatter_state = None
    shared.post_forward_order.clear()
    for state in root._state_ctx.all_states:
        state._training_state = TrainingState.IDLE
        state._modules_to_run_forward.clear()
        group = state._fsdp_param_group
        if group is None:
            continue
        group._training_state = TrainingState.IDLE
        pending = getattr(group._all_gather_result, 'all_gather_work', None)
        if isinstance(pending, distributed.Work):
            pending.wait()
        group._all_gather_result = group._post_reduce_event = group._reshard_after_forward_event = group._all_reduce_state = group._partial_reduce_output = None
        group._post_forward_indices.clear()
        for param in group.fsdp_params:
            param.unsharded_accumulated_grad = None
            if hasattr(param, '_unsharded_param'):
                param._unsharded_param.grad = None
        group._to_sharded()
    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False
