"""Around the training command: whatever ends it leaves a bundle, and the process ends, with the exit code of the rank that failed first.

    guard = Guard()
    with guard:
        cfg = guard.run(read_config)
        guard.watch(cfg.save_folder, cfg.run_name, cfg.dist_timeout)
        guard.run(train)

A process alone raises its error as Python does. A rank of several ends at once after its bundle and its exit handlers: an interpreter that winds down with the threads of a broken process
group may hang, and the others wait for it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Callable, NoReturn, TypeVar

from llmfoundry import dist, phases
from llmfoundry.command_utils.error_report import EXPLAINED_ERRORS, TRACEBACK_VARIABLE, format_error
from llmfoundry.command_utils.incidents import bundle, classify, courier, faults, inquiry, procs, stacks
from llmfoundry.command_utils.incidents.faults import Fault
from llmfoundry.command_utils.incidents.record import LiveRecord, live_folder
from llmfoundry.command_utils.incidents.watchdog import ENDING_SIGNALS, Watchdog

__all__ = ['Guard']

T = TypeVar('T')

WATCHER = 'llmfoundry.command_utils.incidents.watcher'
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[3])
_STOP_CODES = {128 + signal.SIGTERM: 'SIGTERM', 128 + signal.SIGINT: 'SIGINT'}
# A rank that is ended by another's fault shall be gone in two seconds; one with an error of its own may flush its loggers and uploads first.
_FLUSH_S = 20.0
_FLUSH_AFTER_ANOTHER_S = 1.0
_OTHERS_WORD_S = 2.0
_SAME_ERROR_S = 3.0
_OTHER_NODES_WORD_S = 4.0


class Guard:
    """Keeps the live record from the start on, and ends the process in one place. Does little where the temp folder cannot be written to."""

    def __init__(self) -> None:
        self.rank, self.world_size, self.host = dist.get_global_rank(), dist.get_world_size(), socket.gethostname()
        self.live = live_folder()
        self.places: bundle.Places | None = None
        self.record: LiveRecord | None = None
        self.watchdog: Watchdog | None = None
        self.courier: courier.Courier | None = None
        self.has_watcher = False
        self._claim = threading.Lock()
        self._code = 1
        self._restore: list[Callable[[], Any]] = []

    def __enter__(self) -> Guard:
        phases.enter('start')
        try:
            self.record = LiveRecord(self.live)
        except OSError as e:
            print(f'llmfoundry: no incident reports in this run: {e}', file=sys.stderr)
            return self
        self._restore.append(self.record.close)
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, _exit_on_signal) for number in ENDING_SIGNALS}
            self._restore.append(lambda: [signal.signal(number, handler) for number, handler in before.items()])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.record is not None and self.world_size > 1:
            if error is None:
                self._leave(0, None)
            self._exit(self._code)  # a second signal cut the end short
        if self.watchdog is not None:
            self.watchdog.close()
        if self.record is not None:
            self.record.end(self._code if error is not None else 0)
            if not self.has_watcher:
                self.record.remove_if_last()
        for restore in reversed(self._restore):
            restore()

    def run(self, function: Callable[[], T]) -> T:
        """Calls ``function``; an error of it ends the process, or is raised when the process is alone.

        Raises:
            SystemExit: after an explained error, whose block has been printed.
        """
        try:
            return function()
        except BaseException as e:  # noqa: BLE001  (whatever ends training is to be reported)
            self._fail(e)

    def watch(self, save_folder: str | None, run_name: str | None, timeout_s: float) -> None:
        """From here on bundles are written, the watchdog runs, and local rank 0 has started the node's watcher."""
        if self.record is None:
            return
        self.places = bundle.places_for(save_folder, run_name)
        bundle.set_older_aside(self.places)
        crash_file = stacks.enable_crash_dump(self.live / f'rank{self.rank}.crash')
        self._restore.append(crash_file.close)
        self._restore.append(stacks.disable_crash_dump)
        if dist.get_local_rank() == 0:
            _start_watcher(self.live, self.places)
        self.has_watcher = True
        if self.world_size > dist.get_local_world_size() and dist.get_local_rank() == 0:
            self.courier = courier.Courier(self.live, timeout_s)
            self.courier.start()
        self.watchdog = Watchdog(self.live, timeout_s, self._wakeup_socket(), self._end_from_watchdog, self._find_culprit, _launcher())
        self.watchdog.start()

    def _wakeup_socket(self) -> socket.socket | None:
        if threading.current_thread() is not threading.main_thread():
            return None
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        old = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        # A forked child (a loader's worker, a tokeniser's pool) shares the socket: its own SIGTERM must not look like this process's.
        os.register_at_fork(after_in_child=_forget_signals)
        self._restore += [theirs.close, lambda: signal.set_wakeup_fd(old)]
        return ours

    # The end of a process

    def _fail(self, error: BaseException) -> NoReturn:
        """Reports what ended the training thread, and ends the process or raises."""
        if self.world_size > 1:
            _ignore_signals()  # the launcher's SIGTERM must not cut short what it would ask for
        if not self._claim.acquire(blocking=False):  # the watchdog ends the process
            time.sleep(_FLUSH_S)
        explained = isinstance(error, EXPLAINED_ERRORS)
        if self.record is None:
            _print_alone(error, explained)
        self._code = _code_of(error)
        fault = self._settle(error, explained)
        self._code = fault.code
        is_secondary = fault.rank != self.rank and fault.detected_by != self.rank
        if self.places is not None and (self.world_size > 1 or not explained or phases.current() != 'start') and fault.code != 0:
            bundle.write_bundle(self.places, fault=fault, code=fault.code, live=self.live, error=error, explained=explained, peers=courier.remote_ranks(self.live))
        if self.world_size == 1:
            _print_alone(error, explained)
        if explained:
            self._print_block(error)
        elif not is_secondary and fault.kind == 'exception' and not isinstance(error, SystemExit):
            traceback.print_exception(error)
        self._leave(fault.code, _FLUSH_AFTER_ANOTHER_S if is_secondary else _FLUSH_S)

    def _settle(self, error: BaseException, explained: bool) -> Fault:
        """The first fault of the run: this error, unless another rank's came before it or caused it."""
        code = _code_of(error)
        stopped = _STOP_CODES.get(code) if isinstance(error, SystemExit) else 'SIGINT' if isinstance(error, KeyboardInterrupt) else None
        described = bundle.describe_error(error, explained)
        lost_connection = self.world_size > 1 and classify.is_lost_connection(described)
        if lost_connection:  # known before anybody asks: the time limit of a collective and that of another rank's watchdog end in the same moments
            stacks.has_left(f'{described["innermost"].rpartition(" ")[2]}, called at {described["place"]}')
        if self.world_size > 1 and (stopped or lost_connection):
            if self.courier is not None:
                self.courier.exchange_now(_OTHERS_WORD_S / 2)
            other = faults.wait_for_fault_of_another(self.live, self.rank, _OTHERS_WORD_S if lost_connection else _OTHERS_WORD_S / 2)
            if other is None and lost_connection:
                other = self._find_culprit()
                is_hang = other.rank != self.rank or (other.kind == 'hang' and 'imed out' in str(error))
                other = faults.publish(self.live, other) if is_hang else None
            if other is not None:
                return other
        if code == 0:
            return Fault(self.rank, self.host, 'left early', 0, time.time(), self.rank)
        if stopped:
            return faults.publish(self.live, Fault(self.rank, self.host, 'stopped', code, time.time(), self.rank, f'{stopped} from outside'))
        rank = getattr(error, 'rank', None) if explained else None  # an error that all ranks raise may name the one that it is about
        fault = Fault(self.rank if rank is None else rank, self.host, 'exception', code, time.time(), self.rank)
        return faults.publish(self.live, replace(fault, **_cause(fault, described, self.world_size)))

    def _print_block(self, error: BaseException) -> None:
        """One block per node for an error that all ranks have: local rank 0 prints it, the others wait until it has; later errors are the summary's."""
        if phases.current() != 'start' and self.has_watcher:
            return
        if dist.get_local_rank() == 0:
            print(format_error(error), file=sys.stderr, flush=True)
        else:
            inquiry.wait_for_end_of_leader(self.live, _SAME_ERROR_S)

    def _leave(self, code: int, limit_s: float | None) -> NoReturn:
        """Ends a rank of several: exit handlers, then the process, within ``limit_s``."""
        if limit_s is not None:
            alarm = threading.Timer(limit_s, self._exit, [code])
            alarm.daemon = True
            alarm.start()
        else:
            threading._shutdown()  # waits for uploads and other threads that are not daemons, as the interpreter would
        if self.courier is not None:
            self.courier.exchange_now(1.0)
        if self.record is not None:
            self.record.end(code)
        with contextlib.suppress(BaseException):  # exit handlers of libraries; a second signal
            atexit._run_exitfuncs()
        self._exit(code)

    def _exit(self, code: int) -> NoReturn:
        if self.record is not None:
            self.record.end(code)
            if not self.has_watcher:
                self.record.remove_if_last()
        for child in multiprocessing.active_children():
            with contextlib.suppress(OSError, ValueError):
                child.kill()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    def _end_from_watchdog(self, fault: Fault) -> None:
        if not self._claim.acquire(blocking=False):
            return
        standing = faults.publish(self.live, fault)
        if self.places is not None:
            bundle.write_bundle(self.places, fault=standing, code=standing.code, live=self.live, peers=courier.remote_ranks(self.live))
        if self.courier is not None:
            self.courier.exchange_now(1.0)
        inquiry.answer_if_asked(self.live)
        self._exit(standing.code)

    def _find_culprit(self) -> Fault:
        if self.courier is not None:
            self.courier.exchange_now(1.0)
        found = inquiry.find_culprit(self.live, self.host, courier.remote_ranks(self.live))
        if found.rank == self.rank and self.world_size > dist.get_local_world_size():
            # Nobody on this node is behind; a node with a rank that is says so in the same moments.
            found = faults.wait_for_fault_of_another(self.live, self.rank, _OTHER_NODES_WORD_S) or found
        return found


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    """As Composer's own handler, which takes its place when Composer is imported."""
    del frame
    sys.exit(128 + number)


def _ignore_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        for number in ENDING_SIGNALS:
            signal.signal(number, lambda number, frame: None)  # not SIG_IGN, which would hide it from the watchdog, too


def _forget_signals() -> None:
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)


def _code_of(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, SystemExit):
        return 0 if error.code is None else error.code if isinstance(error.code, int) else 1
    return 1


def _cause(fault: Fault, described: dict[str, Any], world_size: int) -> dict[str, str]:
    """Class and sign of an error, for the nodes that cannot read its bundle."""
    alone = {
        'rank': fault.rank, 'world_size': world_size, 'phase': phases.current(), 'error': described, 'fault': asdict(fault), 'progress': asdict(phases.progress), 'time': '',
    }  # fmt: skip
    cause = classify.classify([alone])
    return {'cause': cause.kind, 'note': cause.sign}


def _print_alone(error: BaseException, explained: bool) -> NoReturn:
    """What a process without other ranks does: a block and exit code 1 for an explained error, else the error itself."""
    if explained and os.environ.get(TRACEBACK_VARIABLE, '') in ('', '0'):
        print(format_error(error), file=sys.stderr, flush=True)
        raise SystemExit(1)
    raise error


def _launcher() -> int | None:
    """The parent, if it is one that started ranks: it is a Python program and has told this process its rank. A shell that exports RANK is none; logging out must not end the run."""
    named = 'RANK' in os.environ and 'LOCAL_WORLD_SIZE' in os.environ
    return os.getppid() if named and procs.is_python(os.getppid()) else None


def _start_watcher(live: Path, places: bundle.Places) -> None:
    environment = {**os.environ, 'PYTHONPATH': _PACKAGE_PARENT}
    arguments = json.dumps({'live': str(live), 'folder': str(places.folder), 'fallback': str(places.fallback), 'launcher': _launcher()})
    process = subprocess.Popen([sys.executable, '-S', '-m', WATCHER, arguments], env=environment, cwd='/', stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    process.wait()  # it forks at once and goes on as nobody's child
