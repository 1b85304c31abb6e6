"""What the kernel says about processes and memory: small readers of ``/proc`` and cgroups, for processes that may be gone at any moment. Standard library only."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from pathlib import Path
from typing import Any

__all__ = ['code_of_status', 'exit_status', 'is_alive', 'is_python', 'kill_same', 'memory_facts', 'oom_kills', 'own_memory', 'resident_bytes', 'signal_name', 'start_ticks']

_ZOMBIES = ('Z', 'X', 'x')
# Fields of /proc/PID/stat after the command name (which may hold blanks and brackets), 0-based.
_STATE, _START_TICKS, _EXIT_CODE = 0, 19, -1


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f'/proc/{pid}/stat').read_text(encoding='utf-8', errors='replace')
    except OSError:
        return None
    return text.rpartition(')')[2].split()


def start_ticks(pid: int) -> int:
    """When the process started, in clock ticks since boot; with the pid it names a process for ever. 0 when there is none."""
    fields = _stat(pid)
    return int(fields[_START_TICKS]) if fields else 0


def is_alive(pid: int, ticks: int) -> bool:
    """Whether this very process runs; one that has ended and waits for its parent does not."""
    fields = _stat(pid)
    return fields is not None and int(fields[_START_TICKS]) == ticks and fields[_STATE] not in _ZOMBIES


def exit_status(pid: int, ticks: int) -> int | None:
    """The wait status of a process that has ended while its parent has not asked yet; None before, and after the parent has."""
    fields = _stat(pid)
    if fields is None or int(fields[_START_TICKS]) != ticks or fields[_STATE] not in _ZOMBIES:
        return None
    return int(fields[_EXIT_CODE])


def code_of_status(status: int) -> int:
    """A wait status as a shell says it: the exit code, or 128 + the signal."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def signal_name(code: int) -> str | None:
    """``137`` -> ``'SIGKILL'``; None for codes that are no signal."""
    try:
        return signal.Signals(code - 128).name if code > 128 else None
    except ValueError:
        return None


def is_python(pid: int) -> bool:
    """Whether the program is a Python interpreter, as launchers are and shells are not."""
    try:
        return os.path.basename(os.readlink(f'/proc/{pid}/exe')).startswith(('python', 'pypy'))
    except OSError:
        return False


def kill_same(pid: int, ticks: int, number: int) -> None:
    """Sends a signal to this very process, and to no other that got its number since."""
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        try:
            if start_ticks(pid) == ticks:
                signal.pidfd_send_signal(fd, number)
        finally:
            os.close(fd)


def resident_bytes(pid: int | str = 'self') -> int | None:
    """Resident memory of a process."""
    try:
        return int(Path(f'/proc/{pid}/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    except (OSError, ValueError, IndexError):
        return None


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None  # absent, or 'max'


def _cgroup_folders() -> list[tuple[str, str]]:
    """(version, folder) of this process's memory cgroup and of the root as seen in a container."""
    found = []
    with contextlib.suppress(OSError):
        for line in Path('/proc/self/cgroup').read_text().splitlines():
            _, controllers, path = line.split(':', 2)
            if not controllers:
                found += [('v2', f'/sys/fs/cgroup{path}'), ('v2', '/sys/fs/cgroup')]
            elif 'memory' in controllers.split(','):
                found += [('v1', f'/sys/fs/cgroup/memory{path}'), ('v1', '/sys/fs/cgroup/memory')]
    return found


def _cgroup_memory() -> dict[str, int | None]:
    for version, folder in _cgroup_folders():
        names = ('memory.max', 'memory.current') if version == 'v2' else ('memory.limit_in_bytes', 'memory.usage_in_bytes')
        limit = _number(f'{folder}/{names[0]}')
        if limit is not None and limit < 1 << 60:
            return {'cgroup_limit': limit, 'cgroup_used': _number(f'{folder}/{names[1]}')}
    return {}


def memory_facts() -> dict[str, int | None]:
    """Bytes: total and available on the machine, and limit and use of the cgroup where there is a limit."""
    facts: dict[str, int | None] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path('/proc/meminfo').read_text().splitlines():
            name, _, rest = line.partition(':')
            if name in ('MemTotal', 'MemAvailable'):
                facts['machine_total' if name == 'MemTotal' else 'machine_available'] = int(rest.split()[0]) * 1024
    return {**facts, **_cgroup_memory()}


def oom_kills() -> int:
    """Processes that the kernel has killed for want of memory so far, on this machine and in this cgroup; one that grows during a run is proof."""
    count = 0
    files = ['/proc/vmstat', *(f'{folder}/{"memory.events" if version == "v2" else "memory.oom_control"}' for version, folder in _cgroup_folders())]
    for path in dict.fromkeys(files):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text().splitlines():
                if line.startswith('oom_kill '):
                    count += int(line.split()[1])
    return count


def own_memory() -> dict[str, Any]:
    """``memory_facts`` with this process's resident memory and its peak."""
    return {'rss': resident_bytes(), 'rss_peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, **memory_facts()}
