"""Python stacks of this process and of its loader workers, and what can be read from them: whether a rank waits for the others, and which shard it reads."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, Iterator, SupportsIndex

__all__ = ['MainStack', 'all_threads', 'disable_crash_dump', 'enable_crash_dump', 'has_left', 'main_stack', 'waiting_in_crash', 'worker_stacks']

# A real-time signal that nobody else is known to use; its handler is inherited by forked loader workers.
DUMP_SIGNAL = signal.SIGRTMIN + 5
_WORKER_ANSWER_S = 0.3
_FRAMES_KEPT = 60
# Waiting for other ranks: frames of these files, when nothing but libraries lies between them and the innermost frame.
_WAITING_FILES = ('/torch/distributed/', '/torch/nn/parallel/distributed.py', '/composer/utils/dist.py', '/streaming/base/shared/barrier.py', '/streaming/base/distributed.py')
_OUR_WAITS = {('/llmfoundry/dist.py', 'on_local_rank_zero')}
_BACKWARD = ('/torch/autograd/graph.py', '_engine_run_backward')
_PLUMBING = ('/torch/', '/contextlib.py', '/llmfoundry/gloo_average.py', '/llmfoundry/dist.py')
_LIBRARIES = ('/torch/', '/composer/', '/streaming/', f'{os.path.dirname(os.__file__)}/')
_READER_LOCALS = ('shard_id', 'sample_id')
_left: str | None = None


@dataclass
class MainStack:
    """The main thread's stack.

    ``frames`` are ``file:line function``, innermost first; ``waiting_in`` names the collective that it waits in, or has left with an error, with the place that called it; ``reading``
    the shard or sample that a Streaming reader has in hand.
    """

    frames: list[str]
    waiting_in: str | None = None
    reading: dict[str, Any] = field(default_factory=dict)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _describe(frame: FrameType) -> str:
    return f'{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}'


def has_left(call: str) -> None:
    """From here on the main thread counts as waiting in ``call``: it has left that collective with an error, so its stack does not show it any more."""
    global _left
    _left = call


def main_stack() -> MainStack:
    """The stack of the main thread, from any thread."""
    found = list(_frames(sys._current_frames().get(threading.main_thread().ident or 0)))
    stack = MainStack([_describe(f) for f in found[:_FRAMES_KEPT]], _left or waiting_in(found))
    for frame in found:
        if '/streaming/' in frame.f_code.co_filename:
            for name in _READER_LOCALS:
                if isinstance(value := frame.f_locals.get(name), SupportsIndex):
                    stack.reading.setdefault(name, int(value))
    return stack


def waiting_in(frames: list[FrameType]) -> str | None:
    """``'all_reduce, called at file:line function'`` if the stack (innermost first) is that of a process that waits for others, else None."""
    name = None
    for frame in frames:
        path, function = frame.f_code.co_filename, frame.f_code.co_name
        if any(path.endswith(file) and function == wait for file, wait in _OUR_WAITS):
            return f'{function}, called at {_describe(frame)}'
        if any(part in path for part in _WAITING_FILES):
            name = name if name and not path.endswith('/composer/utils/dist.py') else function if 'c10d_logger' not in path else name
        elif path.endswith(_BACKWARD[0]) and function == _BACKWARD[1]:
            name = 'the reduction of gradients'
        elif name is not None and not _is_plumbing(path):
            return f'{name}, called at {_describe(frame)}'
        elif name is None and not any(part in path for part in (*_LIBRARIES, *_PLUMBING)):
            return None
    return name


def _is_plumbing(path: str) -> bool:
    return any(part in path for part in _PLUMBING)


def waiting_in_crash(text: str) -> str | None:
    """The same from what the interpreter wrote when the process crashed."""
    name = None
    for path, line, function in re.findall(r'File "([^"]+)", line (\d+) in (\S+)', text):
        if any(part in path for part in _WAITING_FILES):
            name = function if 'c10d_logger' not in path else name
        elif name is not None and not _is_plumbing(path):
            return f'{name}, called at {path}:{line} {function}'
    return name


def all_threads() -> str:
    """The stacks of all threads as text, the main one first."""
    names = {t.ident: t.name for t in threading.enumerate()}
    current = sorted(sys._current_frames().items(), key=lambda item: item[0] != threading.main_thread().ident)
    blocks = []
    for ident, frame in current:
        blocks.append(f'--- thread {names.get(ident, "?")} ({ident}), most recent call last\n' + ''.join(traceback.format_stack(frame)))
    return '\n'.join(blocks)


def enable_crash_dump(path: Path) -> IO[str]:
    """Has the interpreter write all stacks to ``path`` on a crash (SIGSEGV, SIGABRT, SIGBUS, ...), and loader workers theirs when they are asked. Keep the file open."""
    file = open(path, 'a', encoding='utf-8')  # noqa: SIM115  (must stay open as long as the process lives)
    faulthandler.enable(file, all_threads=True)
    faulthandler.register(DUMP_SIGNAL, file, all_threads=True, chain=False)
    return file


def disable_crash_dump() -> None:
    """Undoes ``enable_crash_dump``, before its file is closed."""
    faulthandler.unregister(DUMP_SIGNAL)
    faulthandler.disable()


def worker_stacks(path: Path) -> str:
    """The stacks of this process's children that were forked from it (loader workers), as they write them to the file of ``enable_crash_dump``."""
    children = [c for c in multiprocessing.active_children() if c.pid is not None and _handles_dump(c.pid)]
    before = path.stat().st_size if children and path.exists() else 0
    blocks = []
    for child in children:
        with contextlib.suppress(OSError):
            os.kill(child.pid or 0, DUMP_SIGNAL)
            time.sleep(_WORKER_ANSWER_S / max(1, len(children)))
            size = path.stat().st_size
            with open(path, encoding='utf-8', errors='replace') as f:
                f.seek(before)
                blocks.append(f'--- worker {child.name} (pid {child.pid}), most recent call first\n{f.read(size - before)}')
            before = size
    return '\n'.join(blocks)


def _handles_dump(pid: int) -> bool:
    """Whether the process catches the signal; it would die of it otherwise."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f'/proc/{pid}/status').read_text().splitlines():
            if line.startswith('SigCgt:'):
                return bool(int(line.split()[1], 16) >> (DUMP_SIGNAL - 1) & 1)
    return False
