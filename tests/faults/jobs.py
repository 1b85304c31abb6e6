"""A training run as the campaign sees it from outside: processes, steps, files, what it said, what it left behind."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any, Callable

from tests.helpers.train_runs import losses_in, make_data, tiny_config
from tests.helpers.warm_launcher import WarmLauncher
from tests.helpers.workspace import command_environment

__all__ = ['SAVE_EVERY', 'STEPS', 'Job', 'JobFailed', 'NotInjected', 'base_config', 'final_digest', 'make_campaign_data', 'parent_of']

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
SAVE_EVERY = 4
DIST_TIMEOUT_S = 12
# Long enough for two processes to start on a busy machine; a run that has not ended by then hangs, which is a failure of the campaign.
START_TIMEOUT_S = 240.0
END_TIMEOUT_S = 180.0
# What is left of a run disappears within this time after its last process has ended.
LEFTOVER_GRACE_S = 15.0
_MARK = 'LLMFOUNDRY_CAMPAIGN_JOB'


class NotInjected(Exception):
    """The run ended, or went past the moment, before the fault could be injected; the campaign tries again."""


class JobFailed(Exception):
    """The run did something that no fault excuses: it hung, or did not start."""


def make_campaign_data(folder: Path) -> Path:
    """Three epochs' worth of steps in several shards, with hashes as our converters write them."""
    make_data(folder, num_train=8 * 16, hashes=('xxh3_64',))
    return folder


def base_config(data: Path, sharded: bool = False, **changes: Any) -> dict[str, Any]:
    """Dropout, shuffling, Adam and two epoch boundaries in ``STEPS`` steps, so that a resume has much to get wrong."""
    config = tiny_config(
        data, max_duration=f'{STEPS}ba', save_interval=f'{SAVE_EVERY}ba', save_num_checkpoints_to_keep=3, dist_timeout=DIST_TIMEOUT_S, run_name='campaign',
        python_log_level='info',
    )
    if sharded:
        config['fsdp_config'] = {'state_dict_type': 'sharded', 'mixed_precision': 'FULL'}
    return {**config, **copy.deepcopy(changes)}


class Job:
    """One run and its repetitions in a folder of its own.

    Args:
        folder: working folder; ``ckpt`` below it is the save folder unless the config says otherwise.
        config: see ``base_config``.
        ranks: processes, started by the ``composer`` launcher; 0 starts ``python train.py``.
        environment: further variables.
        launcher: forks the processes from one that has imported torch; without it each start is a command of its own, and takes several times as long.
    """

    def __init__(self, folder: Path, config: dict[str, Any], ranks: int = 2, environment: dict[str, str] | None = None, launcher: WarmLauncher | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.ranks, self.launcher = folder, ranks, launcher
        self.config = {'save_folder': str(folder / 'ckpt'), **config}
        self.mark = uuid.uuid4().hex
        tmp = folder / 'tmp'
        tmp.mkdir(exist_ok=True)
        self.variables = {_MARK: self.mark, 'TMPDIR': str(tmp), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', **(environment or {})}
        self.pid = 0
        self.output = ''

    def start(self) -> None:
        """Starts the command in a session of its own."""
        path = self.folder / 'config.yaml'
        path.write_text(json.dumps({**self.config, 'loggers': {'jsonl': {'path': str(self.folder / 'metrics.jsonl')}}}))
        self._begin = (self.folder / 'out.txt').stat().st_size if (self.folder / 'out.txt').exists() else 0
        if self.launcher is not None:
            self._warm = self.launcher.start(self.folder, [str(path)], self.ranks or None, **self.variables)
            self.pid = self._warm.pid
            return
        start = [str(Path(sys.executable).parent / 'composer'), '-n', str(self.ranks)] if self.ranks else [sys.executable]
        with (self.folder / 'out.txt').open('a') as out:
            self._process = subprocess.Popen(
                [*start, str(ROOT / 'scripts/train/train.py'), str(path)], cwd=self.folder, env=command_environment(**self.variables), stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def code(self) -> int | None:
        """Exit code of the command, as a shell says it; None while it runs."""
        if self.launcher is not None:
            return self._warm.poll()
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def wait(self) -> int:
        """Waits for the end of the run and of every process of it; returns the exit code of the command.

        Raises:
            JobFailed: it did not end in time.
        """
        deadline = time.monotonic() + START_TIMEOUT_S + END_TIMEOUT_S
        while (code := self.code()) is None or self.pids():
            if time.monotonic() > deadline:
                said = self.said()[-1500:]
                left = self.pids()
                self.kill_everything()
                raise JobFailed(f'processes {left} of the run did not end (exit code {code}); it said ...{said}')
            time.sleep(0.05)
        self.output = self.said()
        return code

    def kill_everything(self) -> None:
        """SIGKILL to every process, as when a machine goes away."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def said(self) -> str:
        """The output since the last start."""
        with (self.folder / 'out.txt').open() as out:
            out.seek(self._begin)
            return out.read()

    def step(self) -> int:
        """The last step that was logged since the folder was made, -1 before the first."""
        return max(losses_in(self.folder), default=-1)

    def wait_until(self, condition: Callable[[], Any], what: str) -> Any:
        """Polls as fast as it can until ``condition`` holds; returns its value.

        Raises:
            NotInjected: the run ended first.
            JobFailed: neither happened in time.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (value := condition()):
            if (code := self.code()) is not None:
                raise NotInjected(f'the run ended with {code} before {what}: {self.said()[-800:]}')
            if time.monotonic() > deadline:
                raise JobFailed(f'{what} never came: {self.said()[-1500:]}')
            time.sleep(0.001)
        return value

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.step() >= step, f'step {step}')

    def sleep(self, seconds: float) -> None:
        """Waits while the run runs.

        Raises:
            NotInjected: it ended first.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (code := self.code()) is not None:
                raise NotInjected(f'the run ended with {code} within {seconds:.1f} s')
            time.sleep(0.01)

    def pids(self) -> list[int]:
        """Every process of this job that is alive: those of its session, and those that carry its mark."""
        found = []
        for entry in Path('/proc').iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, IndexError):
                    state, _, _, session = (entry / 'stat').read_text().rpartition(')')[2].split()[:4]
                    if state != 'Z' and (int(session) == self.pid or self.mark.encode() in (entry / 'environ').read_bytes()):
                        found.append(int(entry.name))
        return found

    def rank_pid(self, rank: int) -> int:
        """The process of a rank; the launcher starts them in order.

        Raises:
            NotInjected: there is none.
        """
        if not self.ranks:
            return self.pid
        found = sorted(pid for pid in self.pids() if parent_of(pid) == self.pid)
        if len(found) <= rank:
            raise NotInjected(f'no process of rank {rank}')
        return found[rank]

    def leftovers(self) -> list[str]:
        """What a finished run should have taken with it: processes, shared memory, lock files, unfinished checkpoints."""
        deadline = time.monotonic() + LEFTOVER_GRACE_S
        while (found := self._leftovers()) and time.monotonic() < deadline:
            time.sleep(0.5)
        return found

    def _leftovers(self) -> list[str]:
        found = [f'process {pid}' for pid in self.pids()]
        runs = list((self.folder / 'tmp').glob('llmfoundry-runs-*/*'))
        for owner in (path / 'owner.json' for path in runs):
            if owner.exists():
                prefixes = json.loads(owner.read_text() or '{}').get('prefixes', [])
                found += [f'shared memory {block.name}' for prefix in prefixes for block in Path('/dev/shm').glob(f'{prefix:06d}_*')]
        found += [f'lock file {path.name}' for path in (self.folder / 'tmp').rglob('*filelock*')]
        save_folder = Path(self.config['save_folder'])
        if save_folder.is_dir():
            found += [f'unfinished {path.name}' for path in save_folder.rglob('*') if path.name.startswith('.incomplete')]
        return found


def parent_of(pid: int) -> int:
    """The parent of a process, -1 if it has ended."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[1])
    return -1


def final_digest(folder: Path, sharded: bool) -> str:
    """sha256 over the weights and the optimizer of the checkpoint after ``STEPS`` steps, read by our safe readers."""
    from llmfoundry.checkpoint.reader import open_checkpoint
    from llmfoundry.checkpoint.safe_load import load_checkpoint_file

    digest = hashlib.sha256()
    if sharded:
        path = next(folder.glob(f'ep*-ba{STEPS}'))
        with open_checkpoint(str(path)) as checkpoint:
            for name in sorted(checkpoint.weights):
                digest.update(name.encode() + checkpoint.weights[name].load().numpy().tobytes())
        return digest.hexdigest()
    path = next(folder.glob(f'ep*-ba{STEPS}-rank0.pt'))
    state = load_checkpoint_file(path)['state']
    _update(digest, {'model': state['model'], 'optimizers': state['optimizers']})
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _update(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _update(digest, item)
    elif hasattr(value, 'numpy'):
        digest.update(value.detach().contiguous().numpy().tobytes())
    else:
        digest.update(repr(value).encode())
