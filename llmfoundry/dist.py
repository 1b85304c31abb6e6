"""Ranks, barriers and process-group start: the only home of rank logic.

Reads the launcher's environment variables without importing torch, so that config code may ask for the world size; everything that
communicates imports torch (or Composer, for its device detection) when it is called.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import pickle
import socket
import time
from typing import Any, Callable, Iterator, TypeVar

from llmfoundry import gloo_average
from llmfoundry.errors import PreflightError

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
    """Index of this node, 0-based; torchrun calls it GROUP_RANK."""
    return _env_int('NODE_RANK', _env_int('GROUP_RANK', 0))


def complete_environment() -> None:
    """Sets the variables that Composer reads and that a launcher other than Composer's leaves out, from those that it does set.

    torchrun numbers nodes as GROUP_RANK; Composer asks for NODE_RANK and refuses to guess it once a process group exists.
    """
    if not os.environ.get('NODE_RANK') and os.environ.get('GROUP_RANK'):
        os.environ['NODE_RANK'] = os.environ['GROUP_RANK']


def is_initialized() -> bool:
    """Whether a process group exists."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def init_process_group(timeout_s: float, preflight: Callable[[Any], None] | None = None) -> None:
    """Starts the process group (NCCL on GPUs, gloo on the CPU) unless one exists, and waits for every rank.

    Args:
        timeout_s: seconds after which a collective that a rank never joins becomes an error instead of a hang.
        preflight: called with the key-value store of the run (None in a run of one process) before any collective, which would hang where ranks disagree.
    """
    from composer.utils import dist as composer_dist
    from composer.utils import get_device

    complete_environment()
    store = open_store(timeout_s) if get_world_size() > 1 else None
    choose_gloo_interface()
    if preflight is not None:
        preflight(store)
    device = get_device(None)
    if store is not None and not is_initialized() and device.dist_backend in ('gloo', 'nccl'):
        from torch import distributed

        distributed.init_process_group(
            device.dist_backend, store=distributed.PrefixStore('default_pg', store), rank=get_global_rank(), world_size=get_world_size(),
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    composer_dist.initialize_dist(device, timeout=timeout_s)
    barrier()
    fix_gloo_average()


def open_store(timeout_s: float) -> Any:
    """The key-value store of the run: that of the process group if there is one, else a new one at MASTER_ADDR:MASTER_PORT, served by rank 0 (or by torchrun's agent).

    Unlike torch's own start it does not wait for the other ranks, so that whoever holds it can tell which of them never came.

    Raises:
        PreflightError: variables are missing, the port is taken, or rank 0 does not answer within ``timeout_s``.
    """
    from torch import distributed

    if is_initialized():
        return distributed.distributed_c10d._get_default_store()
    missing = [name for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if not os.environ.get(name)]
    if missing:
        raise PreflightError(
            f'WORLD_SIZE={get_world_size()} says that this process is one of several, but {", ".join(missing)} is not set. Start it with `composer` or `torchrun`, '
            'which set them, or unset WORLD_SIZE for a run of one process.',
        )
    host, port = os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])
    serves = get_global_rank() == 0 and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True'
    try:
        return distributed.TCPStore(
            host, port, get_world_size(), is_master=serves, timeout=datetime.timedelta(seconds=timeout_s), wait_for_workers=False, multi_tenant=True,
        )
    except RuntimeError as e:  # torch's DistNetworkError and DistStoreError, both of which derive from it
        if 'EADDRINUSE' in str(e):
            raise PreflightError(f'MASTER_PORT={port} of this machine is taken by another process, so rank 0 cannot serve the run there. Choose another port, the same on every node, and give only one node the rank 0.') from e
        raise PreflightError(
            f'rank {get_global_rank()} on {socket.gethostname()} got no answer from rank 0 at MASTER_ADDR={host}, MASTER_PORT={port} within {timeout_s:g} s. Is node 0 started, is that address '
            f'one of node 0 that this machine can reach (0.0.0.0 and 127.0.0.1 mean the machine itself), and does a firewall let port {port} through? ({str(e).splitlines()[0]})',
        ) from e


def address_towards_master() -> str | None:
    """The address of this machine from which packets to MASTER_ADDR leave, or None if nothing leads there."""
    host, port = os.environ.get('MASTER_ADDR'), _env_int('MASTER_PORT', 1)
    if not host:
        return None
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # of a datagram socket: sends nothing, but chooses the route
            return probe.getsockname()[0]
    except OSError:
        return None


def gloo_address() -> str | None:
    """The address that gloo would give to other nodes by itself: what the host name resolves to, else loopback. None where GLOO_SOCKET_IFNAME decides."""
    if os.environ.get('GLOO_SOCKET_IFNAME'):
        return None
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None)[0][4][0])
    except OSError:
        return '127.0.0.1'


def choose_gloo_interface() -> str | None:
    """Lets gloo use the interface that leads to MASTER_ADDR, where there are several nodes and GLOO_SOCKET_IFNAME is not set; returns its name.

    gloo's own choice is the address that the hostname resolves to, which many machines know as 127.0.0.1 or not at all: the other nodes are then told to connect to themselves.
    """
    if os.environ.get('GLOO_SOCKET_IFNAME') or get_local_world_size() >= get_world_size():
        return None
    import psutil

    address = address_towards_master()
    if address is None or address.startswith('127.') or address == '::1':
        return None  # two "nodes" on one machine, or node 0 that knows itself by its loopback address: gloo's choice is as good
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition('%')[0] == address for entry in addresses):
            os.environ['GLOO_SOCKET_IFNAME'] = name
            return name
    return None


def barrier() -> None:
    """Waits until every rank is here; nothing in a run of one process."""
    if is_initialized() and get_world_size() > 1:
        from torch import distributed

        distributed.barrier()


def default_store() -> Any:
    """The process group's key-value store, which any thread may use; None in a run of one process."""
    if not is_initialized() or get_world_size() == 1:
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


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
    """Makes gloo average where torch's does not (see ``gloo_average``); returns whether a fix was needed. Every rank must call this."""
    return is_initialized() and get_world_size() > 1 and gloo_average.fix_gloo_average()
