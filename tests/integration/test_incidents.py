"""Two real processes under Composer's launcher, of which one misbehaves: each time one summary with the right rank, class and setting, its exit code, in time, and nothing left."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.disks import small_disk
from tests.helpers.train_runs import make_data, tiny_config
from tests.helpers.warm_launcher import Job, WarmLauncher

TIMEOUT_S = 10
# Between the fault and the end of the launcher; on top of the time limit where something hangs. A machine that does other work at the same time needs the larger part of it.
PROMPT_S = 12.0
STEP = 3

PLUGIN = """
import glob, json, os, resource, signal, time
from pathlib import Path
import torch
import torch.distributed as td
from composer.core import Callback
from streaming.base.format.mds.reader import MDSReader
from llmfoundry.registry import callbacks

RANK = int(os.environ.get('RANK', 0))
decode = MDSReader.decode_sample


class Misbehave(Callback):
    '''Does something bad on one rank at one step, and writes down when.'''
    def __init__(self, how, rank, folder, step):
        self.how, self.rank, self.folder, self.step = how, rank, Path(folder), step

    def _mark(self, name='fault'):
        owners = [json.loads(Path(p).read_text()) for p in glob.glob(os.environ['TMPDIR'] + '/llmfoundry-runs-*/run-*/owner.json')]
        mark = {'time': time.time(), 'pid': os.getpid(), 'prefixes': [p for o in owners for p in o['shm_prefixes']]}
        (self.folder / f'{name}.{RANK}').write_text(json.dumps(mark))
        os.replace(self.folder / f'{name}.{RANK}', self.folder / f'{name}.json')

    def batch_start(self, state, logger):
        if int(state.timestamp.batch) != self.step:
            return
        if self.how == 'mismatched collective':
            self._mark()
            if RANK != self.rank:
                td.all_reduce(torch.ones(7))
        elif RANK == self.rank:
            self._mark()
            getattr(self, self.how.replace(' ', '_'))(state)

    def exception(self, state):
        raise RuntimeError('boom in user code')

    def left_early(self, state):
        raise SystemExit(3)

    def killed(self, state):
        os.kill(os.getpid(), signal.SIGKILL)

    def crash(self, state):
        os.kill(os.getpid(), signal.SIGSEGV)

    def hang(self, state):
        time.sleep(1000)

    def frozen(self, state):
        os.kill(os.getpid(), signal.SIGSTOP)

    def memory(self, state):
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
        torch.empty(2**31)

    def stall(self, state):
        MDSReader.decode_sample = lambda reader, data: time.sleep(1000)

    def nan(self, state):
        next(m for m in state.model.modules() if isinstance(m, torch.nn.Linear)).register_forward_hook(lambda m, i, o: o * float('nan'))

    def nothing(self, state):
        pass

    def wait(self, state):
        for _ in range(600):
            time.sleep(0.1)

callbacks.register('misbehave', func=Misbehave)
"""


@dataclass
class Case:
    """One run: what goes wrong on which rank, and what must come of it. ``code`` is the launcher's exit code as a shell says it."""

    how: str
    kind: str
    code: int
    rank: int = 1
    ranks: int | None = 2
    seen: str = ''
    setting: str = ''
    hangs: bool = False
    step: int = STEP  # after which it is noticed
    outside: int | None = None  # a signal that the test sends to the launcher
    config: dict[str, Any] = field(default_factory=dict)


CASES = {
    'exception': Case('exception', 'user code', 1, seen='RuntimeError: boom in user code', setting='plugin.py:'),
    'exception, single process': Case('exception', 'user code', 1, rank=0, ranks=None, seen='boom in user code'),
    'exit in user code': Case('left_early', 'user code', 3, setting='plugin.py:'),
    'kill -9 of rank 1': Case('killed', 'killed', 137, seen='killed', setting='autoresume'),
    # Composer's launcher hands on the -9 of rank 0 itself, which a shell reads as 247.
    'kill -9 of rank 0': Case('killed', 'killed', 247, rank=0, seen='killed'),
    'kill -9, single process': Case('killed', 'killed', 137, rank=0, ranks=None, seen='killed'),
    'segmentation fault': Case('crash', 'native crash', 139, seen='SIGSEGV'),
    'memory': Case('memory', 'out of host memory', 1, seen='allocate', setting='num_workers'),
    'NaN': Case('nan', 'NaN', 1, seen='nan at batch 4 on rank 1', setting='optimizer.lr'),
    'hang in a callback': Case('hang', 'hang', 124, seen='phase callback', setting='plugin.py:', hangs=True),
    'frozen process': Case('frozen', 'hang', 124, seen='does not answer', hangs=True),
    'stalled reader': Case('stall', 'data stall', 124, seen='sample', setting='download_timeout', hangs=True, step=STEP + 1),
    'mismatched collective': Case('mismatched collective', 'mismatched collective', 124, seen='all_reduce', setting='same collective calls', hangs=True),
    'kill -9 of the launcher': Case('wait', 'launcher gone', 137, seen='launcher', outside=signal.SIGKILL, rank=1),
    'SIGTERM to the launcher': Case('wait', 'launcher gone', 143, seen='launcher', outside=signal.SIGTERM, rank=1),
}
TOGETHER = 3


@dataclass
class Outcome:
    """A finished run."""

    case: Case
    job: Job
    folder: Path

    @property
    def fault(self) -> dict[str, Any]:
        return json.loads((self.folder / 'fault.json').read_text())

    @property
    def summary(self) -> dict[str, str]:
        """Field -> text, of the one summary in the output."""
        output = self.job.output()
        assert output.count('llmfoundry: this run failed') == 1, output[-4000:]
        block = output.split('llmfoundry: this run failed')[1].split('=' * 100)[0]
        return dict(re.findall(r'^(\w[\w ]*):\s+(.*)$', block, re.MULTILINE))

    def bundle(self, rank: int) -> dict[str, Any]:
        return json.loads((self.folder / f'ckpt/incidents/r/rank{rank}.json').read_text())


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp('incidents-data'))


def _start(launcher: WarmLauncher, data: Path, folder: Path, case: Case) -> Job:
    (folder / 'tmp').mkdir(parents=True)
    (folder / 'plugin.py').write_text(PLUGIN)
    config = tiny_config(
        data, code_paths=[str(folder / 'plugin.py')], callbacks={'misbehave': {'how': case.how, 'rank': case.rank, 'folder': str(folder), 'step': STEP}}, save_folder=str(folder / 'ckpt'),
        run_name='r', save_interval='100ba', dist_timeout=TIMEOUT_S, loggers={}, **case.config,
    )
    (folder / 'config.yaml').write_text(json.dumps(config))
    return launcher.start(folder, [str(folder / 'config.yaml')], case.ranks, TMPDIR=str(folder / 'tmp'))


def _finish(case: Case, job: Job, folder: Path) -> Outcome:
    job.wait(150)
    _wait_for(lambda: not _left_of(job, folder), 15, job)
    return Outcome(case, job, folder)


def _wait_for(condition: Any, seconds: float, job: Job) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f'{_left_of(job, job.folder)}\n{job.output()[-3000:]}'
        job.server.collect(0.05)


def _left_of(job: Job, folder: Path) -> list[str]:
    """Processes of the job's session, watchers of its folder, live folders and run folders, and shared memory that the run has written down as its own."""
    left = []
    for entry in Path('/proc').glob('[0-9]*'):
        try:
            fields = (entry / 'stat').read_text().rpartition(')')[2].split()
            arguments = (entry / 'cmdline').read_bytes().decode(errors='replace')
        except OSError:
            continue
        if fields[0] != 'Z' and (int(fields[3]) == job.pid or f'{folder}/' in arguments):
            left.append(f'{entry.name} {arguments[:80]}')
    left += [str(p) for pattern in ('llmfoundry-incidents-*/live-*', 'llmfoundry-runs-*/run-*') for p in (folder / 'tmp').glob(pattern)]
    if (folder / 'fault.json').exists():
        mark = json.loads((folder / 'fault.json').read_text())
        blocks = [p for prefix in mark['prefixes'] for p in Path('/dev/shm').glob(f'{prefix:06d}_*')]
        left += [str(p) for p in blocks if p.exists() and p.stat().st_mtime < mark['time']]
    return left


@pytest.fixture(scope='module')
def outcomes(launcher: WarmLauncher, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    found: dict[str, Outcome] = {}
    names = list(CASES)
    for i in range(0, len(names), TOGETHER):
        started = []
        for name in names[i:i + TOGETHER]:
            folder = tmp_path_factory.mktemp('incident')
            started.append((name, folder, _start(launcher, data, folder, CASES[name])))
        for name, folder, job in started:
            if (number := CASES[name].outside) is not None:
                _wait_for(lambda folder=folder: (folder / 'fault.json').exists(), 120, job)
                os.kill(job.pid, number)
        for name, folder, job in started:
            found[name] = _finish(CASES[name], job, folder)
    return found


@pytest.mark.parametrize('name', CASES)
def test_cause_and_exit_code(outcomes: dict[str, Outcome], name: str) -> None:
    outcome, case = outcomes[name], CASES[name]
    summary = outcome.summary
    if case.kind == 'killed' and 'GiB of the' in summary['seen']:  # a machine whose memory is nearly full in this moment, as the summary rightly says
        assert summary['class'] == 'out of host memory'
    else:
        assert summary['class'] == case.kind and case.setting in summary['to set'], outcome.job.output()[-4000:]
    assert case.seen in summary['seen'], summary
    who = f'rank {case.rank} of 2' if case.ranks else 'the process'
    if case.kind in ('launcher gone', 'mismatched collective'):  # all ranks are in the same position
        who = 'rank '
    assert summary['first'].startswith(who), summary
    assert f'after step {case.step}' in summary['first'], summary
    assert outcome.job.code == case.code, outcome.job.output()[-4000:]


@pytest.mark.parametrize('name', CASES)
def test_ends_in_time_and_leaves_nothing(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert outcome.job.ended_at - outcome.fault['time'] < PROMPT_S + (TIMEOUT_S if outcome.case.hangs else 0)
    assert _left_of(outcome.job, outcome.folder) == []


@pytest.mark.parametrize('name', CASES)
def test_every_rank_leaves_a_bundle(outcomes: dict[str, Outcome], name: str) -> None:
    outcome = outcomes[name]
    for rank in range(outcome.case.ranks or 1):
        bundle = outcome.bundle(rank)
        assert bundle['rank'] == rank and bundle['progress']['step'] == outcome.case.step and bundle['memory']['rss'] > 2**20
        assert bundle['progress']['sample_in_epoch'] == outcome.case.step * 8 and bundle['pid'] > 0
    stacks = outcome.folder / f'ckpt/incidents/r/rank{outcome.case.rank}.stacks.txt'
    if outcome.case.how not in ('killed', 'frozen'):
        assert 'batch_start' in stacks.read_text() or 'train_loop' in stacks.read_text() or outcome.bundle(outcome.case.rank)['error'] is not None


def test_a_stalled_reader_names_the_shard(outcomes: dict[str, Outcome]) -> None:
    bundle = outcomes['stalled reader'].bundle(1)
    assert bundle['phase'] == 'data' and bundle['reading']['sample_id'] >= 0 and bundle['progress']['source'].endswith('/train')
    assert bundle['waiting_in'] is None and 'all_reduce' in outcomes['stalled reader'].bundle(0)['waiting_in']


def test_a_broken_connection_is_no_cause(outcomes: dict[str, Outcome]) -> None:
    """Rank 0 sees its peer's connection close; it says whose fault that was, and prints no traceback of its own."""
    outcome = outcomes['exception']
    assert outcome.bundle(0)['fault']['rank'] == 1 and outcome.bundle(0)['exit_code'] == 1
    assert outcome.job.output().count('Traceback') == 1
    assert outcomes['kill -9 of rank 1'].job.output().count('Traceback') == 0


def test_one_block_for_an_error_of_the_config(launcher: WarmLauncher, data: Path, tmp_path: Path) -> None:
    """Found while the config is read, and while the run is built: both ranks have it, one says it, and there is no summary."""
    jobs = [
        _start(launcher, data, tmp_path / 'a', Case('wait', '', 1, config={'max_duraton': '1ba'})),
        _start(launcher, data, tmp_path / 'b', Case('wait', '', 1, config={'precision': 'amp_fp16'})),
    ]
    for job, message in zip(jobs, ('max_duraton', 'amp_fp16'), strict=True):
        assert job.wait(150) == 1
        _wait_for(lambda job=job: not _left_of(job, job.folder), 15, job)
        assert job.output().count('ERROR (rank') == 1 and message in job.output(), job.output()[-3000:]
        assert 'this run failed' not in job.output() and 'Traceback' not in job.output(), job.output()[-3000:]


def test_a_full_disk(launcher: WarmLauncher, data: Path, tmp_path: Path) -> None:
    """The save folder's disk takes neither the checkpoint nor the bundles; these go to the temp folder."""
    with small_disk(tmp_path / 'disk', '16m') as disk:
        case = Case('nothing', 'disk full', 1, config={})
        (tmp_path / 'run/tmp').mkdir(parents=True)
        config = tiny_config(data, save_folder=str(disk), run_name='r', save_interval='1ba', dist_timeout=TIMEOUT_S, loggers={})
        (tmp_path / 'run/config.yaml').write_text(json.dumps(config))
        job = launcher.start(tmp_path / 'run', [str(tmp_path / 'run/config.yaml')], 2, TMPDIR=str(tmp_path / 'run/tmp'))
        assert job.wait(150) == 1, job.output()[-3000:]
        _wait_for(lambda: not _left_of(job, tmp_path / 'run'), 15, job)
        outcome = Outcome(case, job, tmp_path)
        assert outcome.summary['class'] == 'disk full', job.output()[-4000:]
        assert 'save_num_checkpoints_to_keep' in outcome.summary['to set']


def test_a_run_that_ends_well_says_nothing_and_leaves_nothing(launcher: WarmLauncher, data: Path, tmp_path: Path) -> None:
    job = _start(launcher, data, tmp_path / 'a', Case('nothing', '', 0))
    alone = _start(launcher, data, tmp_path / 'b', Case('nothing', '', 0, ranks=None))
    for one in (job, alone):
        assert one.wait(150) == 0, one.output()[-3000:]
        _wait_for(lambda one=one: not _left_of(one, one.folder), 15, one)
        assert 'this run failed' not in one.output() and not (one.folder / 'ckpt/incidents').exists()


@pytest.mark.parametrize(('how', 'kind', 'word'), [('exception', 'user code', 'boom'), ('hang', 'hang', 'no progress'), ('wait', 'node lost', '')])
def test_two_nodes(launcher: WarmLauncher, data: Path, tmp_path: Path, how: str, kind: str, word: str) -> None:
    """Each node has a launcher and a watcher of its own, on one machine. One node's fault is told on the other; a node whose processes are all killed at once is lost."""
    (tmp_path / 'plugin.py').write_text(PLUGIN)
    config = tiny_config(
        data, code_paths=[str(tmp_path / 'plugin.py')], callbacks={'misbehave': {'how': how, 'rank': 1, 'folder': str(tmp_path), 'step': STEP}}, save_folder=str(tmp_path / 'ckpt'),
        run_name='r', save_interval='100ba', dist_timeout=TIMEOUT_S, loggers={},
    )
    (tmp_path / 'config.yaml').write_text(json.dumps(config))
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    jobs = []
    (tmp_path / 'tmp').mkdir()
    for node in (0, 1):
        jobs.append(launcher.start(
            tmp_path / f'node{node}', [str(tmp_path / 'config.yaml')], 1, TMPDIR=str(tmp_path / 'tmp'), WORLD_SIZE='2', LOCAL_WORLD_SIZE='1', NODE_RANK=str(node),
            MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
        ))  # fmt: skip
    if how == 'wait':
        _wait_for(lambda: (tmp_path / 'fault.json').exists(), 120, jobs[0])
        os.killpg(jobs[1].pid, signal.SIGKILL)
    code = jobs[0].wait(150)
    fault = json.loads((tmp_path / 'fault.json').read_text())
    for job in jobs:
        job.wait(60)
        _wait_for(lambda job=job: not _left_of(job, tmp_path), 20, job)
    summary = Outcome(Case(how, kind, 1), jobs[0], tmp_path / 'node0').summary
    assert summary['class'] == kind and word in summary['seen'], jobs[0].output()[-4000:]
    assert how == 'wait' or summary['first'].startswith('rank 1 of 2'), summary
    assert code == (124 if how == 'hang' else 1) and jobs[0].ended_at - fault['time'] < PROMPT_S + TIMEOUT_S
