"""Composer's MemoryMonitor, which also says what a run takes of the host's memory where the model trains on the processor."""

from __future__ import annotations

import contextlib
import math
import warnings
from pathlib import Path

import psutil
import torch
from composer import callbacks as composer_callbacks
from composer.core import State
from composer.loggers import Logger
from composer.utils import dist

__all__ = ['HOST_MEMORY_KEYS', 'MemoryMonitor', 'host_memory_stats']

# Statistic -> name under which it is logged, in gigabytes (1e9 bytes).
HOST_MEMORY_KEYS = {
    'rss_bytes.current': 'current_rss_mem',
    'rss_bytes.peak': 'peak_rss_mem',
    'shared_bytes.current': 'current_shared_mem',
    'available_bytes.host': 'host_available_mem',
}


class MemoryMonitor(composer_callbacks.MemoryMonitor):
    """Logs ``memory/{statistic}`` after each batch: on a GPU as Composer does, on the CPU this process's resident, peak and shared memory and what the host has left.

    Args:
        memory_keys: statistic -> name under which it is logged. On a GPU a key of ``torch.cuda.memory_stats()``, on the CPU one of ``HOST_MEMORY_KEYS``; others are passed over.
            The default statistics if None.
        dist_aggregate_batch_interval: batches between reports of ``{name}_avg``, ``_min`` and ``_max`` over all ranks; None makes none.
    """

    def __init__(self, memory_keys: dict[str, str] | None = None, dist_aggregate_batch_interval: int | None = None) -> None:
        super().__init__(memory_keys, dist_aggregate_batch_interval)

    def init(self, state: State, logger: Logger) -> None:
        del logger
        if not _on_cpu(state) or not self.memory_keys:
            return
        unknown = sorted(set(self.memory_keys) - set(HOST_MEMORY_KEYS))
        if unknown:
            warnings.warn(f'memory_monitor.memory_keys: the model is on the CPU, which has no {", ".join(unknown)}; it has {", ".join(HOST_MEMORY_KEYS)}')

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if not _on_cpu(state):
            super().after_train_batch(state, logger)
            return
        stats = host_memory_stats()
        report = {name: _gigabytes(stats[key]) for key, name in (self.memory_keys or HOST_MEMORY_KEYS).items() if key in stats}
        interval = self.dist_aggregate_batch_interval
        if interval is not None and int(state.timestamp.batch) % interval == 0:
            report |= _over_ranks(report)
        logger.log_metrics({f'memory/{name}': value for name, value in report.items()})


def host_memory_stats() -> dict[str, int]:
    """Bytes that this process has resident, had at most, and shares with others (shared-memory batches of loader workers among them); and what the host has left."""
    info = psutil.Process().memory_info()
    stats = {'rss_bytes.current': info.rss, 'rss_bytes.peak': info.rss, 'available_bytes.host': psutil.virtual_memory().available}
    if hasattr(info, 'shared'):
        stats['shared_bytes.current'] = info.shared
    with contextlib.suppress(OSError, StopIteration):  # Linux: the kernel's high-water mark
        line = next(x for x in Path('/proc/self/status').read_text().splitlines() if x.startswith('VmHWM:'))
        stats['rss_bytes.peak'] = int(line.split()[1]) * 1024
    return stats


def _over_ranks(report: dict[str, float]) -> dict[str, float]:
    values = torch.tensor(list(report.values()), dtype=torch.float64)
    reduced = {}
    for suffix, operation in (('avg', 'SUM'), ('min', 'MIN'), ('max', 'MAX')):
        total = values.clone()
        dist.all_reduce(total, operation)
        total = total / dist.get_world_size() if suffix == 'avg' else total
        reduced |= {f'{name}_{suffix}': value for name, value in zip(report, total.tolist(), strict=True)}
    return reduced


def _gigabytes(value: int) -> float:
    """In 1e9 bytes with five significant digits, as Composer rounds."""
    gigabytes = value / 1e9
    return round(gigabytes, 4 - math.floor(math.log10(gigabytes))) if gigabytes else 0.0


def _on_cpu(state: State) -> bool:
    return next(state.model.parameters()).device.type == 'cpu'
