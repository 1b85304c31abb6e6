"""Threads of a process that trains on the CPU.

Torch starts as many threads as there are cores, in every process: two processes on two cores run four threads, which wait for one another. Users who set a number mean it.
"""

from __future__ import annotations

import os

import torch

from llmfoundry import dist

__all__ = ['share_cores', 'threads_per_process']

SET_BY_USERS = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS')


def threads_per_process(cores: int, local_world_size: int) -> int:
    """An equal share of the cores for each process of a node, at least one."""
    return max(cores // max(local_world_size, 1), 1)


def share_cores() -> None:
    """Gives this process its share of the cores it may run on, if it has neighbours and nobody set a number of threads."""
    if dist.get_local_world_size() == 1 or any(os.environ.get(name) for name in SET_BY_USERS):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    torch.set_num_threads(threads_per_process(cores, dist.get_local_world_size()))
