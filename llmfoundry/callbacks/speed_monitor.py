"""Composer's SpeedMonitor with model FLOPs utilisation where Composer has no figure: on processors, and on GPUs newer than its table.

A processor's peak depends on clocks, threads and neighbours, so it is measured once at the start, as the best rate of a few matrix products in the run's precision with the
run's threads; a few tenths of a second. An MFU of 0.8 then says that the step runs at 80 % of what matrix products alone reach here.
"""

from __future__ import annotations

import logging

import torch
from composer import callbacks as composer_callbacks
from composer.callbacks.speed_monitor import get_gpu_flops_available
from composer.core import State
from composer.loggers import Logger

from llmfoundry import dist
from llmfoundry.callbacks.device_rates import matmul_rate, peak_flops

__all__ = ['SpeedMonitor']

log = logging.getLogger(__name__)

MEASUREMENT_LIMIT_S = 0.3


class SpeedMonitor(composer_callbacks.SpeedMonitor):
    """Logs ``throughput/*``, with ``throughput/device/mfu`` on every device, and ``time/{train,val,total}``.

    Args:
        window_size: batches of the rolling average; nothing but times is logged before it is full.
        gpu_flops_available: peak FLOP/s of one device; looked up or measured if None, and 0 logs no MFU.
        time_unit: of ``time/*``: seconds, minutes, hours or days.

    Raises:
        ValueError: another unit.
    """

    def __init__(self, window_size: int = 100, gpu_flops_available: float | int | None = None, time_unit: str = 'hours') -> None:
        super().__init__(window_size=window_size, gpu_flops_available=gpu_flops_available, time_unit=time_unit)

    def init(self, state: State, logger: Logger) -> None:
        if self.gpu_flops_available is None:
            self.gpu_flops_available = _gpu_peak(state) if torch.cuda.is_available() else _processor_rate(state)
        super().init(state, logger)


def _gpu_peak(state: State) -> float:
    known = peak_flops(torch.cuda.get_device_name(), state.precision.value, tf32=torch.backends.cuda.matmul.allow_tf32)
    return get_gpu_flops_available(state) if known is None else known


def _processor_rate(state: State) -> float:
    model = state.model.module if state.is_model_ddp else state.model
    # Composer knows fp32 only; reduced precision on a processor is autocast around the model.
    dtype = getattr(type(model), 'cpu_autocast_dtype', torch.float32)
    dist.barrier()  # all ranks at once, as in training
    rate = matmul_rate(dtype=dtype, limit_s=MEASUREMENT_LIMIT_S)
    log.info('MFU is against %.1f GFLOP/s, the measured rate of %s matrix products with %d threads', rate / 1e9, str(dtype).removeprefix('torch.'), torch.get_num_threads())
    return rate
