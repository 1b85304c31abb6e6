"""Ranks, barriers and process-group start: the only home of rank logic.

Reads the launcher's environment variables without importing torch, so that config code may ask for the world size; everything that
communicates imports torch (or Composer, for its device detection) when it is called.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import time
from typing import Any, Callable, Iterator, TypeVar

T = TypeVar('T')
_calls = itertools.count()


def _env_int(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)


def get_world_size() -> int:
    """Number of processes in the run, as the launcher promised, else 1."""
    return _env_int('WORLD_SIZE', 1)


def get_global_rank() -> int:
    """Index of this process in the run, 0-based."""
    return _env_int('RANK', 0)


def get_local_rank() -> int:
    """Index of this process on its node, 0-based."""
    return _env_int('LOCAL_RANK', 0)


def get_local_world_size() -> int:
    """Number of processes on this node."""
    return _env_int('LOCAL_WORLD_SIZE', 1)


def get_node_rank() -> int:
    """Index of this node, 0-based."""
    return _env_int('NODE_RANK', 0)


def is_initialized() -> bool:
    """Whether a process group exists."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def init_process_group(timeout_s: float) -> None:
    """Starts the process group (NCCL on GPUs, gloo on the CPU) unless one exists, and waits for every rank.

    Args:
        timeout_s: seconds after which a collective that a rank never joins becomes an error instead of a hang.
    """
    from composer.utils import dist as composer_dist
    from composer.utils import get_device

    composer_dist.initialize_dist(get_device(None), timeout=timeout_s)
    barrier()
    fix_gloo_average()


def barrier() -> None:
    """Waits until every rank is here; nothing in a run of one process."""
    if is_initialized() and get_world_size() > 1:
        from torch import distributed

        distributed.barrier()


def all_reduce_min(value: int) -> int:
    """The smallest ``value`` over all ranks, on every rank."""
    if not is_initialized() or get_world_size() == 1:
        return value
    import torch
    from torch import distributed

    device = 'cuda' if distributed.get_backend() == 'nccl' else 'cpu'
    tensor = torch.tensor([value], dtype=torch.int64, device=device)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MIN)
    return int(tensor.item())


def all_gather_objects(value: T) -> list[T]:
    """``value`` of every rank, in the order of ranks, on every rank. Values must pickle."""
    if not is_initialized() or get_world_size() == 1:
        return [value]
    from torch import distributed

    gathered: list[Any] = [None] * get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def on_rank_zero(function: Callable[[], T]) -> T:
    """Calls ``function`` on rank 0 only and returns its result, or raises its exception, on every rank.

    A check that only rank 0 can make (is the save folder writable?) would otherwise leave the other ranks waiting for it.
    """
    if not is_initialized() or get_world_size() == 1:
        return function()
    from torch import distributed

    outcome: list[Any] = [None, None]
    if get_global_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as e:  # sent to every rank and raised there
            outcome[1] = e
    distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_local_rank_zero(function: Callable[[], T]) -> T:
    """Calls ``function`` on local rank 0 of each node, and returns what the node's own call returned on all of its ranks.

    The other ranks ask the process group's key-value store instead of waiting in a collective, so the call may take hours (tokenising a large
    data set) without running into the collectives' time limit. An exception on any node is raised on every rank of the run.
    """
    if not is_initialized() or get_world_size() == 1:
        return function()
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    nodes = max(1, get_world_size() // max(1, get_local_world_size()))
    number = next(_calls)
    if get_local_rank() == 0:
        outcome: list[Any] = [None, None]
        try:
            outcome[0] = function()
        except Exception as e:  # sent to every rank and raised there
            outcome[1] = e
        store.set(f'llmfoundry/{number}/{get_node_rank()}', _pickled(outcome))
    keys = [f'llmfoundry/{number}/{node}' for node in range(nodes)]
    pause_s = 0.01
    while not store.check(keys):
        time.sleep(pause_s)
        pause_s = min(1.0, pause_s * 1.5)
    outcomes = [pickle.loads(store.get(key)) for key in keys]
    for _, error in outcomes:
        if error is not None:
            raise error
    return outcomes[get_node_rank()][0]


def _pickled(outcome: list[Any]) -> bytes:
    """The outcome as bytes; an error that does not survive pickling becomes a RuntimeError with its text."""
    try:
        data = pickle.dumps(outcome)
        pickle.loads(data)
    except Exception:  # whatever a foreign exception's pickling raises
        if outcome[1] is None:
            raise
        data = pickle.dumps([None, RuntimeError(f'{type(outcome[1]).__name__}: {outcome[1]}')])
    return data


@contextlib.contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Local rank 0 runs the block first, the node's other ranks after it (downloads, caches)."""
    if get_local_rank() != 0:
        barrier()
    try:
        yield
    finally:
        if get_local_rank() == 0:
            barrier()


def fix_gloo_average() -> bool:
    """Makes ``reduce_scatter_tensor(op=AVG)`` average on gloo; returns whether a fix was needed.

    torch 2.7.0's gloo returns the sum and says nothing, so gradients of a sharded model on CPU ranks come out ``world_size`` times too
    large. A two-element probe decides, because the version alone does not. Every rank must call this.
    """
    if not is_initialized() or get_world_size() == 1:
        return False
    import torch
    from torch import distributed

    if distributed.get_backend() != 'gloo' or getattr(distributed.reduce_scatter_tensor, '_averages', False):
        return False
    world_size = get_world_size()
    output = torch.zeros(1)
    try:
        distributed.reduce_scatter_tensor(output, torch.ones(world_size), op=distributed.ReduceOp.AVG)
        if output.item() == 1.0:
            return False
    except (RuntimeError, ValueError):
        pass  # AVG refused: the replacement serves that case too

    original = distributed.reduce_scatter_tensor

    def reduce_scatter_tensor(output: Any, input: Any, op: Any = distributed.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:  # noqa: A002
        if op != distributed.ReduceOp.AVG or distributed.get_backend(group) != 'gloo':
            return original(output, input, op=op, group=group, async_op=async_op)
        original(output, input, op=distributed.ReduceOp.SUM, group=group)
        output.div_(distributed.get_world_size(group))
        return _DoneWork() if async_op else None

    reduce_scatter_tensor._averages = True  # type: ignore[attr-defined]
    distributed.reduce_scatter_tensor = reduce_scatter_tensor
    distributed.distributed_c10d.reduce_scatter_tensor = reduce_scatter_tensor
    return True


class _DoneWork:
    """What an asynchronous collective returns when it has been run synchronously."""

    def wait(self) -> bool:
        return True

    def is_completed(self) -> bool:
        return True
