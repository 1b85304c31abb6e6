"""Runs blocks on worker processes and gives the answers back in order, with a bounded number of blocks under way."""

from __future__ import annotations

import collections
import pickle
import queue
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Iterable, Iterator

from llmfoundry.command_utils.data_prep.tokenizer_spec import child_environment
from llmfoundry.errors import InternalError

__all__ = ['WorkerPool']

_ENCODER = 'llmfoundry.command_utils.data_prep.worker:Encoder'
_START = 'import sys; from llmfoundry.command_utils.data_prep.worker import main; main(sys.argv[1])'
_AHEAD_PER_WORKER = 2


class _Worker:
    """One child process and its two pipes."""

    def __init__(self, encoder: str) -> None:
        self._process = subprocess.Popen([sys.executable, '-c', _START, encoder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment())

    def ask(self, message: Any) -> Any:
        """Sends a message and waits for the answer, raising it if it is an exception."""
        try:
            pickle.dump(message, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
            answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise self._death() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _death(self) -> InternalError:
        code = self._process.wait()
        why = ' (killed, probably for lack of memory: pass fewer --processes)' if code == -9 else ''
        return InternalError(f'a tokenising process ended with code {code}{why}. What was finished is kept: run the same command again to go on.')

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:
                # What was still buffered for a process that is gone.
                continue


class WorkerPool:
    """``processes`` workers with one encoder each; a context manager.

    Args:
        spec: what they do.
        processes: how many, at least 1.
        encoder: ``module:class`` of the encoder, which is built from the spec, has ``facts``, and whose ``encode(number, block)`` gives the answers.
    """

    def __init__(self, spec: Any, processes: int, encoder: str = _ENCODER) -> None:
        self._spec = spec
        self._workers = [_Worker(encoder) for _ in range(processes)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix='tokenise')

    def facts(self) -> Any:
        """Waits until all workers are up; what they found out."""
        found = list(self._threads.map(lambda worker: worker.ask(self._spec), self._workers))
        for worker in self._workers:
            self._idle.put(worker)
        return found[0]

    def map(self, blocks: Iterable[tuple[Any, Any]]) -> Iterator[tuple[Any, Any]]:
        """Encodes ``(key, block)`` in parallel and yields ``(key, answer)`` in the order given.

        Reads at most ``2 x processes`` blocks ahead, so memory does not grow with the input.
        """
        under_way: collections.deque[tuple[Any, Future[Any]]] = collections.deque()
        limit = _AHEAD_PER_WORKER * len(self._workers)
        for number, (key, block) in enumerate(blocks):
            under_way.append((key, self._threads.submit(self._encode, number, block)))
            if len(under_way) > limit:
                done, future = under_way.popleft()
                yield done, future.result()
        while under_way:
            done, future = under_way.popleft()
            yield done, future.result()

    def _encode(self, number: int, block: Any) -> Any:
        worker = self._idle.get()
        try:
            return worker.ask((number, block))
        finally:
            self._idle.put(worker)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exc: object) -> None:
        # Workers first: threads that wait for them then end.
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)
