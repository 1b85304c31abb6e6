"""How much memory is free and how much a piece of work takes, on a GPU or on the CPU.

CUDA counts exactly. For the CPU the kernel's high-water mark of the resident set serves (reset where Linux allows it), and free memory is the smaller of the machine's and the
container's, shared among the processes of the node.
"""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from llmfoundry import dist

__all__ = ['PeakMeter', 'available_cpu_bytes', 'local_bytes']

_CGROUP_FILES = (
    ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory.current'),
    ('/sys/fs/cgroup/memory/memory.limit_in_bytes', '/sys/fs/cgroup/memory/memory.usage_in_bytes'),
)
# Used when the system does not say what is free (not Linux).
FALLBACK_BYTES = 4 << 30


def local_bytes(parameter: Any) -> int:
    """Bytes of a parameter on this rank: a sharded one counts its shard."""
    local = parameter.to_local() if hasattr(parameter, 'to_local') else parameter
    return local.numel() * local.element_size()


def available_cpu_bytes() -> int:
    """Memory that one process of this node may still take: free on the machine and within the container's limit, divided by the local processes."""
    free = []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        line = next(x for x in Path('/proc/meminfo').read_text().splitlines() if x.startswith('MemAvailable:'))
        free.append(int(line.split()[1]) * 1024)
    for limit, used in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # "max" means no limit
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(min(free, default=FALLBACK_BYTES), 0) // dist.get_local_world_size()


class PeakMeter:
    """Peak memory of the work between ``reset`` and ``peak``, in bytes above what was in use when the meter was made.

    Args:
        device_type: ``cuda`` or ``cpu``.
    """

    def __init__(self, device_type: str) -> None:
        self.cuda = device_type == 'cuda'
        gc.collect()
        self.baseline = torch.cuda.memory_allocated() if self.cuda else _status_bytes('VmRSS')

    def available(self) -> int:
        """Bytes that are free now, including what CUDA's allocator holds without using it."""
        if not self.cuda:
            return available_cpu_bytes()
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def reset(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):  # resets the high-water mark; without it an earlier peak may be counted, which errs on the safe side
                Path('/proc/self/clear_refs').write_text('5')

    def peak(self) -> int:
        if self.cuda:
            torch.cuda.synchronize()
            return max(torch.cuda.max_memory_allocated() - self.baseline, 0)
        return max(_status_bytes('VmHWM') - self.baseline, 0)

    def release(self) -> None:
        """Gives freed memory back, so that the next measurement starts clean."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def _status_bytes(field: str) -> int:
    """A line of /proc/self/status; the resource module's peak where there is no /proc."""
    try:
        text = Path('/proc/self/status').read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == 'darwin' else peak * 1024
    return next(int(x.split()[1]) * 1024 for x in text.splitlines() if x.startswith(f'{field}:'))
