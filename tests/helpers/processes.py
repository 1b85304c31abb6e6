"""Runs a function in a fresh process, or in several with a gloo process group between them."""

from __future__ import annotations

import atexit
import concurrent.futures
import multiprocessing
import os
import tempfile
from typing import Any, Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ['run_in_process', 'run_in_processes']

# The fork server imports these once, before it has run anything, for all processes of all calls.
_IMPORTED = ['llmfoundry.command_utils.train', 'llmfoundry.models.mpt.composer_mpt', 'llmfoundry.data.text_data', 'transformers.models.llama.modeling_llama']


def _take_over(environment: dict[str, str]) -> None:
    os.environ.clear()  # the fork server's
    os.environ.update(environment)


def _entry(rank: int, world_size: int, function: Callable[..., Any], args: tuple[Any, ...], folder: str, environment: dict[str, str]) -> None:
    _take_over(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=world_size)
    torch.save(function(*args), f'{folder}/{rank}.pt')
    dist.barrier()
    # Not destroy_process_group: in torch 2.7 the gloo group's destructor joins its threads while it holds the GIL, and a thread that drops the last reference to a tensor at that moment
    # waits for the GIL: a deadlock in one of some hundred runs. Exit handlers still run, since Streaming's unlink shared memory.
    atexit._run_exitfuncs()
    os._exit(0)


def run_in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Calls ``function(*args)`` in a process that has run nothing before, without a process group."""
    multiprocessing.set_forkserver_preload(_IMPORTED)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context('forkserver'), _take_over, (dict(os.environ),)) as pool:
        return pool.submit(function, *args).result()


def run_in_processes(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Calls ``function(*args)`` in each of ``world_size`` fresh processes and returns what each returned, in rank order.

    Args:
        function: defined at the top of a module, since the processes are forked from a server (one forked from here could not run backward after its parent has).
        world_size: number of processes.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(_IMPORTED)
        mp.start_processes(_entry, (world_size, function, args, folder, dict(os.environ)), nprocs=world_size, join=True, start_method='forkserver')
        return [torch.load(f'{folder}/{rank}.pt', weights_only=False) for rank in range(world_size)]
