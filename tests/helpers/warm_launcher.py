"""Composer's launcher and its ranks without the time that each of their processes takes to import torch and Composer.

A server imports them once; the tests of one pytest process share one (``shared_launcher``). For each job it forks; the child is the launcher, with the launcher's own code, and starts
its ranks by forking itself once more in place of ``subprocess.Popen``. So pids, signals, exit codes and process groups are those of a real job; only ``exec`` is left out.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.helpers.namespaces import Node, enter_node
from tests.helpers.workspace import command_environment

__all__ = ['Job', 'WarmLauncher', 'shared_launcher']

ROOT = Path(__file__).resolve().parents[2]
TRAIN_SCRIPT = ROOT / 'scripts/train/train.py'
_SERVER_VARIABLES = {'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': str(ROOT), 'PYTHONUNBUFFERED': '1'}


class Job:
    """One launcher process. ``code`` is its exit code as a shell says it and ``ended_at`` the time of its end, None while it runs."""

    def __init__(self, server: WarmLauncher, pid: int, folder: Path) -> None:
        self.server, self.pid, self.folder = server, pid, folder
        self.ended_at: float | None = None
        self.code: int | None = None

    def wait(self, timeout: float = 60.0) -> int:
        """The exit code.

        Raises:
            TimeoutError: the launcher still ran, and has been killed with its ranks.
        """
        deadline = time.monotonic() + timeout
        while self.code is None:
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise TimeoutError(f'the job still ran after {timeout} s:\n{self.output()[-3000:]}')
            self.server.collect(0.1)
        return self.code

    def poll(self) -> int | None:
        self.server.collect(0.0)
        return self.code

    def output(self) -> str:
        return (self.folder / 'out.txt').read_text(errors='replace')


class WarmLauncher:
    """The server; use it as a context manager."""

    def __enter__(self) -> WarmLauncher:
        environment = {**os.environ, **_SERVER_VARIABLES}
        self.process = subprocess.Popen([sys.executable, '-m', 'tests.helpers.warm_launcher'], cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        self.jobs: dict[int, Job] = {}
        self._buffer = b''
        self.pids: list[int] = []
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:  # a job that nothing ends; its test has failed by now
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def start(self, folder: Path, arguments: list[str], ranks: int | None = 2, script: Path = TRAIN_SCRIPT, node: Node | None = None, **env: str) -> Job:
        """Runs ``composer -n RANKS train.py ARGUMENTS``, or ``python train.py ARGUMENTS`` when ``ranks`` is None, in ``folder`` with output to its ``out.txt``.

        ``node``, if there is one, is the machine on which it runs. The job has this process's environment of the moment and ``env``; variables that libraries read when they are imported
        are those of the moment in which the server was started.
        """
        folder.mkdir(parents=True, exist_ok=True)
        job = {'folder': str(folder), 'script': str(script), 'arguments': arguments, 'ranks': ranks, 'node': node and node.name, 'env': {**command_environment(), **_SERVER_VARIABLES, **env}}
        self.process.stdin.write(json.dumps(job).encode() + b'\n')
        self.process.stdin.flush()
        known = len(self.pids)
        while len(self.pids) == known:
            self.collect(1.0)
        self.jobs[self.pids[-1]] = Job(self, self.pids[-1], folder)
        return self.jobs[self.pids[-1]]

    def collect(self, seconds: float) -> None:
        """Takes in what the server says within ``seconds``."""
        poll = select.poll()  # not select, which takes no descriptor above 1023
        poll.register(self.process.stdout, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return
        data = os.read(self.process.stdout.fileno(), 65536)
        assert data, 'the server has died'
        *lines, self._buffer = (self._buffer + data).split(b'\n')
        for line in lines:
            message = json.loads(line)
            if 'started' in message:
                self.pids.append(message['started'])
            else:
                job = self.jobs[message['ended']]
                job.code, job.ended_at = message['code'], time.time()


@functools.cache
def shared_launcher() -> WarmLauncher:
    """The server of this process, which is started at the first call and ends with it."""
    server = WarmLauncher()
    server.__enter__()
    atexit.register(server.__exit__)
    return server


class _ForkedRank:
    """What the launcher needs of ``subprocess.Popen``: a process with the same code and the launcher's present environment."""

    def __init__(self, cmd: list[str], stdout: Any = None, stderr: Any = None, **_: Any) -> None:
        self.args, self.returncode, self.stdout, self.stderr = cmd, None, None, None
        self.pid = os.fork()
        if self.pid == 0:
            for fd, file in ((1, stdout), (2, stderr)):
                if file is not None:
                    os.dup2(file.fileno(), fd)
            _run_script(cmd[1:])

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _run_script(argv: list[str]) -> None:
    """Runs a script as ``__main__`` and ends the process as an interpreter would."""
    import runpy
    import threading
    import traceback

    signal.signal(signal.SIGINT, signal.default_int_handler)
    code: Any = 0
    try:
        sys.argv = argv
        runpy.run_path(argv[0], run_name='__main__')
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if code is None else code & 0xFF if isinstance(code, int) else 1)


def _run_job(job: dict[str, Any]) -> None:
    from composer.cli import launcher

    for number in (signal.SIGTERM, signal.SIGINT):  # Composer's handlers are those of ranks; a launcher of its own process has Python's
        signal.signal(number, signal.SIG_DFL)
    os.setsid()
    os.chdir(job['folder'])
    if job['node'] is not None:
        enter_node(job['node'])
    os.environ.clear()
    os.environ.update(job['env'])
    tempfile.tempdir = None  # it was looked up when the server started
    fd = os.open('out.txt', os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    script = [job['script'], *job['arguments']]
    if job['ranks'] is None:
        _run_script(script)
    sys.argv = ['composer', '-n', str(job['ranks']), *script]
    launcher.subprocess = type('subprocess', (), {'Popen': _ForkedRank, 'CalledProcessError': subprocess.CalledProcessError})
    code = launcher.main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


def _serve() -> None:
    """Forks a job per line of standard input; ends, when that is closed, with all jobs that are left."""
    import importlib

    for name in (
        'composer.cli.launcher', 'llmfoundry.command_utils.train', 'llmfoundry.command_utils.incidents.guard', 'llmfoundry.models.mpt.composer_mpt', 'llmfoundry.data.text_data',
        'llmfoundry.optim.adamw', 'streaming',
    ):
        importlib.import_module(name)
    gc.freeze()  # each collection of a job would look at all that is imported, and copy the pages
    running: set[int] = set()
    out = os.dup(1)
    os.dup2(2, 1)
    is_open = True
    while is_open or running:
        if is_open and select.select([0], [], [], 0.02)[0]:
            line = sys.stdin.readline()
            is_open = bool(line)
            if is_open:
                pid = os.fork()
                if pid == 0:
                    os.close(out)
                    _run_job(json.loads(line))
                running.add(pid)
                os.write(out, json.dumps({'started': pid}).encode() + b'\n')
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.discard(pid)
                code = os.waitstatus_to_exitcode(status)
                os.write(out, json.dumps({'ended': pid, 'code': code if code >= 0 else 128 - code}).encode() + b'\n')
        if not is_open:
            time.sleep(0.02)


if __name__ == '__main__':
    _serve()
