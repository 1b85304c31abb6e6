"""Batch arithmetic: global batch -> device batch -> microbatch -> accumulation steps. Pure functions over numbers and plain dicts.

The global batch is part of the mathematics of a run; everything below it only says how the machine executes it.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from llmfoundry import dist

__all__ = ['batch_size_summary', 'calculate_batch_size_info', 'update_batch_size_info', 'update_config_with_batch_size_info']

MicrobatchSize = int | float | Literal['auto']


def calculate_batch_size_info(
    global_batch_size: int,
    device_microbatch_size: MicrobatchSize,
    data_replication_degree: int = 1,
    world_size: int | None = None,
) -> tuple[int | float, MicrobatchSize, int | Literal['auto']]:
    """Splits a global batch over devices and microbatches.

    Args:
        global_batch_size: samples per optimizer step over all devices.
        device_microbatch_size: samples per forward pass on a device, or 'auto'.
        data_replication_degree: number of ranks that see the same samples (tensor or sequence parallelism).
        world_size: number of ranks; by default that of the running job.

    Returns:
        Samples per device and step (fractional when replicated ranks share a sample), the microbatch (never more than that), and the number
        of microbatches, the last of which may be smaller; 'auto' when the microbatch is.

    Raises:
        ValueError: ranks that do not divide by the replication degree, a batch that does not divide by the data-parallel ranks, or a microbatch that
            is neither a positive number nor 'auto'.
    """
    world_size = dist.get_world_size() if world_size is None else world_size
    if world_size % data_replication_degree != 0:
        raise ValueError(f'world size {world_size} is not divisible by the data replication degree {data_replication_degree}')
    data_ranks = world_size // data_replication_degree
    if global_batch_size <= 0:
        raise ValueError(f'the global batch size must be positive, got {global_batch_size}')
    if global_batch_size % data_ranks != 0:
        below = global_batch_size // data_ranks * data_ranks
        nearby = f'{below} or {below + data_ranks}' if below else str(data_ranks)
        raise ValueError(f'global batch size {global_batch_size} is not divisible by the {data_ranks} data-parallel ranks, so it cannot be the same on each; use {nearby}')
    device_batch_size: int | float = global_batch_size / world_size
    if float(device_batch_size).is_integer():
        device_batch_size = int(device_batch_size)
    if device_microbatch_size == 'auto':
        return device_batch_size, 'auto', 'auto'
    if isinstance(device_microbatch_size, (str, bool)) or device_microbatch_size <= 0:
        raise ValueError(f"the microbatch size must be a positive number or 'auto', got {device_microbatch_size!r}")
    microbatch = min(device_microbatch_size, device_batch_size)
    return device_batch_size, microbatch, math.ceil(device_batch_size / microbatch)


def update_batch_size_info(cfg: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of the config with n_gpus, device_train_batch_size, device_train_microbatch_size, device_train_grad_accum and device_eval_batch_size.

    Registered as a config transform. ``device_train_microbatch_size`` defaults to 'auto'; ``device_eval_batch_size`` to the microbatch, or to 1 when that is 'auto'.

    Raises:
        ValueError: no global_train_batch_size, or sizes that do not fit (see ``calculate_batch_size_info``).
    """
    global_batch_size = cfg.get('global_train_batch_size')
    if global_batch_size is None:
        raise ValueError('global_train_batch_size is missing: set the number of samples per optimizer step over all devices')
    microbatch = cfg.get('device_train_microbatch_size', 'auto')
    return update_config_with_batch_size_info(cfg, *calculate_batch_size_info(global_batch_size, 'auto' if microbatch is None else microbatch))


def update_config_with_batch_size_info(
    cfg: dict[str, Any], device_train_batch_size: int | float, device_train_microbatch_size: MicrobatchSize, device_train_grad_accum: int | Literal['auto']
) -> dict[str, Any]:
    """Returns a copy of the config with sizes that the caller computed (see ``calculate_batch_size_info``)."""
    updated = {
        **cfg,
        'n_gpus': dist.get_world_size(),
        'device_train_batch_size': device_train_batch_size,
        'device_train_microbatch_size': device_train_microbatch_size,
        'device_train_grad_accum': device_train_grad_accum,
    }
    if updated.get('device_eval_batch_size') is None:
        updated['device_eval_batch_size'] = 1 if device_train_microbatch_size == 'auto' else device_train_microbatch_size
    return updated


def batch_size_summary(cfg: dict[str, Any]) -> str:
    """The arithmetic in one line, from a config that ``update_batch_size_info`` completed."""
    ranks, device, microbatch, steps = (cfg[k] for k in ('n_gpus', 'device_train_batch_size', 'device_train_microbatch_size', 'device_train_grad_accum'))
    processes = 'process' if ranks == 1 else 'processes'
    head = f'batch: global {cfg["global_train_batch_size"]} samples = {ranks} {processes} x device {device}'
    evaluation = f'; evaluation {cfg["device_eval_batch_size"]} per device'
    if microbatch == 'auto':
        return f'{head}; microbatch auto (largest that fits, found before the first step){evaluation}'
    last = device - microbatch * (steps - 1)
    uneven = f' (the last has {last:g})' if last != microbatch else ''
    return f'{head}; device {device} = {steps} x microbatch {microbatch}{uneven}{evaluation}'
