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
from typing import Any, Callable, Iterator

from tests.helpers.train_runs import losses_in, make_data, tiny_config
from tests.helpers.workspace import command_environment

__all__ = ['SAVE_EVERY', 'STEPS', 'Job', 'JobFailed', 'NotInjected', 'base_config', 'final_digest', 'make_campaign_data']

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
    """

    def __init__(self, folder: Path, config: dict[str, Any], ranks: int = 2, environment: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.ranks = folder, ranks
        self.config = {'save_folder': str(folder / 'ckpt'), **config}
        self.mark = uuid.uuid4().hex
        tmp = folder / 'tmp'
        tmp.mkdir(exist_ok=True)
        self.environment = command_environment(**{_MARK: self.mark, 'TMPDIR': str(tmp), 'OMP_NUM_THREADS': '1', **(environment or {})})
        self.process: subprocess.Popen | None = None
        self.output = ''

    def start(self) -> None:
        """Starts the command in a process group of its own."""
        path = self.folder / 'config.yaml'
        path.write_text(json.dumps({**self.config, 'loggers': {'jsonl': {'path': str(self.folder / 'metrics.jsonl')}}}))
        start = [str(Path(sys.executable).parent / 'composer'), '-n', str(self.ranks)] if self.ranks else [sys.executable]
        self._begin = (self.folder / 'out.txt').stat().st_size if (self.folder / 'out.txt').exists() else 0
        with (self.folder / 'out.txt').open('a') as out:
            self.process = subprocess.Popen(
                [*start, str(ROOT / 'scripts/train/train.py'), str(path)], cwd=self.folder, env=self.environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )

    def wait(self) -> int:
        """Waits for the end of the run and of every process of it; returns the exit code of the command.

        Raises:
            JobFailed: it did not end in time.
        """
        assert self.process is not None
        try:
            code = self.process.wait(END_TIMEOUT_S + START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            said = self.said()[-1500:]
            self.kill_everything()
            raise JobFailed(f'the run did not end; it said ...{said}') from None
        deadline = time.monotonic() + END_TIMEOUT_S
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.2)
        self.output = self.said()
        return code

    def kill_everything(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

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
        assert self.process is not None
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (value := condition()):
            if self.process.poll() is not None:
                raise NotInjected(f'the run ended with {self.process.returncode} before {what}: {self.said()[-800:]}')
            if time.monotonic() > deadline:
                raise JobFailed(f'{what} never came: {self.said()[-1500:]}')
            time.sleep(0.001)
        return value

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.step() >= step, f'step {step}')

    def pids(self) -> list[int]:
        """Every process of this job that is alive, whoever its parent is now."""
        return [pid for pid, _ in self._processes()]

    def rank_pid(self, rank: int) -> int:
        """The process of a rank (not its loader workers).

        Raises:
            NotInjected: there is none.
        """
        found = [pid for pid, environ in self._processes() if environ.get('RANK') == str(rank) and _is_training(pid)]
        if not found:
            raise NotInjected(f'no process of rank {rank}')
        return min(found)

    def _processes(self) -> Iterator[tuple[int, dict[str, str]]]:
        for entry in Path('/proc').iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError, IndexError):
                environ = dict(item.split('=', 1) for item in (entry / 'environ').read_bytes().decode(errors='replace').split('\0') if '=' in item)
                state = (entry / 'stat').read_text().rpartition(')')[2].split()[0]
                if environ.get(_MARK) == self.mark and state != 'Z':
                    yield int(entry.name), environ

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


def _is_training(pid: int) -> bool:
    command = Path(f'/proc/{pid}/cmdline').read_bytes().split(b'\0')
    return any(part.endswith(b'train.py') for part in command) and b'composer' not in command[1]


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
