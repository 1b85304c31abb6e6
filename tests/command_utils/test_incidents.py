"""The parts of incident reports that need no training run: records, faults, causes, stacks, places."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llmfoundry import phases
from llmfoundry.command_utils.incidents import bundle, classify, courier, faults, guard, inquiry, leftovers, procs, record, stacks
from llmfoundry.command_utils.incidents.faults import Fault
from llmfoundry.command_utils.incidents.report import report
from llmfoundry.command_utils.incidents.summary import summarize
from llmfoundry.command_utils.incidents.watchdog import Watchdog, limit_for
from llmfoundry.errors import CheckpointError, ConfigError, ConfigProblem, DataError, NaNLossError, RemoteStoreError, UnsafeCheckpointError
from tests.helpers.disks import small_disk

MEMORY = {'rss': 1, 'machine_total': 100, 'machine_available': 50}


def _bundle(rank: int = 0, fault: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    base = {
        'rank': rank, 'world_size': 2, 'host': f'h{rank}', 'time': f'2026-01-01T00:00:0{rank}', 'phase': 'forward', 'seconds_in_phase': 9.0, 'memory': MEMORY, 'waiting_in': None, 'reading': {},
        'main_stack': [], 'error': None, 'peers': [], 'master': 'm:1', 'pid': 1, 'ticks': 1, 'exit_code': 1,
        'progress': {'step': 3, 'epoch': 0, 'batch_in_epoch': 3, 'sample_in_epoch': 24, 'samples': 24, 'tokens': 1, 'source': '/data'},
        'fault': {'rank': 0, 'host': 'h0', 'kind': 'exception', 'code': 1, 'time': 1.0, 'detected_by': 0, 'note': '', 'cause': '', **(fault or {})},
    }  # fmt: skip
    return {**base, **changes}


def _error_bundle(error: BaseException, explained: bool = False, file: str = '/site-packages/torch/x.py', **changes: Any) -> dict[str, Any]:
    described = bundle.describe_error(error, explained)
    described['innermost'] = f'{file}:1 f'
    return _bundle(error=described, **changes)


def _raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    error.__cause__ = cause
    return error


class ClientError(Exception):
    """Stands for botocore's, by module name."""


ClientError.__module__ = 'botocore.exceptions'

ERRORS = {
    'CUDA': (RuntimeError('CUDA out of memory. Tried to allocate 2.00 GiB'), 'out of memory'),
    'MemoryError': (MemoryError(), 'out of host memory'),
    'torch on the CPU': (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes."), 'out of host memory'),
    'a worker was killed': (RuntimeError('DataLoader worker (pid 17) is killed by signal: Killed. '), 'out of host memory'),
    'shared memory': (RuntimeError('DataLoader worker (pid 17) is killed by signal: Bus error. It is possible that insufficient shared memory'), 'shared memory full'),
    'disk': (OSError(28, 'No space left on device'), 'disk full'),
    'disk, behind another error': (_raised(RuntimeError('could not save'), OSError(28, 'No space left on device')), 'disk full'),
    "disk, as torch's writer says it": (RuntimeError('[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0'), 'disk full'),
    'gloo, sizes': (RuntimeError('[enforce fail at ../third_party/gloo/gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 400 vs 28'), 'mismatched collective'),
    'gloo, closed': (RuntimeError('[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:17'), 'node lost'),
    'gloo, timeout': (RuntimeError('[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete'), 'node lost'),
    'NCCL, watchdog': (RuntimeError('[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9, OpType=ALLREDUCE)'), 'node lost'),
    'store': (ClientError('An error occurred (503) when calling the GetObject operation'), 'network or object store'),
    'connection of a reader': (_raised(RuntimeError('shard 3 could not be read'), ConnectionResetError(104, 'Connection reset by peer')), 'network or object store'),
}


@pytest.mark.parametrize('name', ERRORS)
def test_class_of_an_error(name: str) -> None:
    error, expected = ERRORS[name]
    cause = classify.classify([_error_bundle(error)])
    assert cause.kind == expected
    assert cause.setting and str(error)[:20] in cause.sign.replace('\n', ' ')


def test_a_checkpoint_or_a_shard_that_the_network_lost_is_not_a_bad_one() -> None:
    for error, otherwise in ((CheckpointError, 'bad checkpoint'), (DataError, 'bad data')):
        for cause, kind in ((RemoteStoreError('gone'), 'network or object store'), (ValueError('damaged'), otherwise)):
            assert classify.classify([_error_bundle(_raised(error('it failed'), cause), explained=True)]).kind == kind


def test_explained_errors_have_their_class() -> None:
    for error, kind in (
        (NaNLossError(4, 1, float('nan')), 'NaN'), (CheckpointError('damaged'), 'bad checkpoint'), (UnsafeCheckpointError('os.system'), 'bad checkpoint'),
        (ConfigError([ConfigProblem('seed', 'is bad')]), 'config'),
    ):  # fmt: skip
        assert classify.classify([_error_bundle(error, explained=True)]).kind == kind


def test_an_error_with_a_users_frame_is_the_users() -> None:
    try:
        raise KeyError('x')
    except KeyError as e:
        found = bundle.describe_error(e, False)
    assert found['in_user_code'] and 'test_incidents.py' in found['place']
    assert classify.classify([_bundle(error=found)]).kind == 'user code'


@pytest.mark.parametrize(
    ('memory', 'counted', 'kind'),
    [
        ({}, True, 'out of host memory'), ({'machine_available': 3}, False, 'out of host memory'), ({'cgroup_limit': 1000, 'cgroup_used': 990}, False, 'out of host memory'), ({}, False, 'killed'),
        ({'cgroup_limit': 1000, 'cgroup_used': 500}, False, 'killed'),
    ],
)
def test_a_kill_is_blamed_on_memory_only_with_a_sign(memory: dict[str, int], counted: bool, kind: str) -> None:
    found = _bundle(fault={'kind': 'killed', 'code': 137}, memory={**MEMORY, **memory})
    assert classify.classify([found], memory_killed=counted).kind == kind


def test_hangs() -> None:
    hang = {'kind': 'hang', 'code': 124}
    waiting = 'all_reduce, called at /home/u/plugin.py:7 batch_end'
    assert classify.classify([_bundle(0, hang, phase='data'), _bundle(1, hang, waiting_in=waiting)]).kind == 'data stall'
    assert classify.classify([_bundle(0, hang, phase='checkpoint'), _bundle(1, hang, waiting_in=waiting)]).kind == 'slow storage'
    mismatch = classify.classify([_bundle(0, hang, waiting_in='broadcast, called at /site-packages/composer/x.py:1 f'), _bundle(1, hang, waiting_in=waiting)])
    assert mismatch.kind == 'mismatched collective' and '/home/u/plugin.py:7' in mismatch.setting
    cut = classify.classify([_bundle(0, hang, waiting_in=waiting, node_rank=0), _bundle(1, hang, waiting_in=waiting, node_rank=1)])
    assert cut.kind == 'node lost' and 'does not arrive' in cut.sign
    lost = {'rank': 3, 'host': 'h3', 'lost': True, 'silent_s': 12.0}
    gone = classify.classify([_bundle(0, hang, waiting_in=waiting, peers=[lost]), _bundle(1, hang, waiting_in=waiting)])
    assert gone.kind == 'node lost' and 'rank 3 on h3 for 12 s' in gone.sign


def test_a_fault_on_another_node_is_told_by_its_note() -> None:
    text = summarize([_bundle(0, {'rank': 3, 'host': 'h3', 'note': 'RuntimeError: boom', 'cause': 'user code'})])
    assert 'rank 3 of 2 on h3, noticed by rank 0' in text and 'class:   user code' in text and 'boom' in text


def test_the_first_fault_stands(tmp_path: Path) -> None:
    faults_of = [Fault(r, 'h', 'exception', r + 1, float(r), r) for r in range(20)]
    threads = [threading.Thread(target=faults.publish, args=(tmp_path, f)) for f in faults_of]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    first = faults.first_fault(tmp_path)
    assert first in faults_of and faults.publish(tmp_path, faults_of[7]) == first
    assert [p.name for p in tmp_path.iterdir()] == ['fault.json']


SLEEPER = """
import sys, time
from pathlib import Path
from llmfoundry import phases
from llmfoundry.command_utils.incidents.record import LiveRecord
r = LiveRecord(Path(sys.argv[1]))
phases.enter('backward')
phases.report(step=41, epoch=2)
print('ready', flush=True)
time.sleep(100)
"""


@pytest.fixture
def sleeper(tmp_path: Path) -> Any:
    """A rank (number 1 of 2) in phase backward after step 41."""
    environment = {**os.environ, 'RANK': '1', 'LOCAL_RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2'}
    process = subprocess.Popen([sys.executable, '-c', SLEEPER, str(tmp_path / 'live')], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'ready\n'
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_record_outlives_kill_9(sleeper: subprocess.Popen, tmp_path: Path) -> None:
    state = record.read_records(tmp_path / 'live')[0]
    assert state.alive and (state.rank, state.step, state.phase, state.epoch, state.pid) == (1, 41, 'backward', 2, sleeper.pid)
    assert faults.fault_of_dead_rank(state, 0) is None
    sleeper.kill()
    found = faults.wait_for_fault_of_another(tmp_path / 'live', 0, 5.0)  # the exit code of a child that nobody has waited for
    assert (found.rank, found.kind, found.code, found.note) == (1, 'killed', 137, '')
    assert record.read_records(tmp_path / 'live')[0].step == 41


@pytest.mark.parametrize(('number', 'kind', 'code'), [(signal.SIGTERM, 'stopped', 143), (signal.SIGSEGV, 'crashed', 139)])
def test_what_a_signal_says(sleeper: subprocess.Popen, tmp_path: Path, number: int, kind: str, code: int) -> None:
    os.kill(sleeper.pid, number)
    found = faults.wait_for_fault_of_another(tmp_path / 'live', 0, 5.0)
    assert (found.kind, found.code) == (kind, code)


def test_a_rank_that_does_not_answer_is_the_culprit(sleeper: subprocess.Popen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacks, '_left', 'all_reduce')
    found = inquiry.find_culprit(tmp_path / 'live', 'h', [])
    assert (found.rank, found.kind, found.code) == (1, 'hang', 124) and 'does not answer' in found.note


def test_a_rank_whose_collective_has_just_timed_out_still_counts_as_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether another rank's fault is known already or not: else a mismatched collective looks like a hang where the two time limits end in the same moments."""
    for name, value in {'RANK': '1', 'LOCAL_RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'TMPDIR': str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stacks, '_left', None)  # what the guard sets is undone
    own = guard.Guard()
    own.live.mkdir(parents=True)
    faults.publish(own.live, faults.Fault(0, 'h', 'hang', 124, 1.0, 0))
    try:
        raise torch.distributed.DistBackendError('wait timeout after 10000ms')
    except torch.distributed.DistBackendError as e:
        error = e
    assert own._settle(error, explained=False).rank == 0
    (own.live / 'question').touch()
    inquiry.answer_if_asked(own.live)
    places = bundle.Places(tmp_path / 'bundles', tmp_path / 'bundles')
    bundle.write_bundle(places, fault=faults.Fault(0, 'h', 'hang', 124, 1.0, 0), code=124, live=own.live, error=error)
    assert 'called at' in json.loads((own.live / 'rank1.answer').read_text())['waiting_in']
    assert 'called at' in bundle.read_bundles([tmp_path / 'bundles'])[0]['waiting_in']


def test_a_signal_meant_for_a_dead_process_hits_no_other() -> None:
    process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])
    procs.kill_same(process.pid, procs.start_ticks(process.pid) + 1, signal.SIGKILL)
    assert process.poll() is None
    procs.kill_same(process.pid, procs.start_ticks(process.pid), signal.SIGKILL)
    assert process.wait(10) == -9


def test_phases_nest_and_say_where_an_error_came_from() -> None:
    phases.enter('start')
    before = phases.beats()
    with pytest.raises(ValueError, match='x') as caught, phases.phase('eval'), phases.phase('checkpoint'):
        assert phases.current() == 'checkpoint'
        raise ValueError('x')
    assert phases.current() == 'start' and phases.beats() > before and phases.phase_of(caught.value) == 'checkpoint'
    assert phases.phase_of(_raised(RuntimeError(), caught.value)) == 'checkpoint'
    assert {'eval', 'checkpoint'} <= set(phases.spent())
    thread = threading.Thread(target=phases.enter, args=('forward',))
    thread.start()
    thread.join()
    assert phases.current() == 'start'
    with pytest.raises(ValueError, match="'fly' is not a phase"):
        phases.phase('fly')


def test_limits() -> None:
    assert limit_for(600, 'forward') == 590 and limit_for(10, 'data') == 9 and limit_for(600, 'checkpoint') == 3 * 590
    assert limit_for(600, 'start') == float('inf')


def test_the_end_of_a_long_start_is_not_taken_for_a_hang_in_what_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The phase changes while the watchdog looks: between its look at the progress and its look at the limits."""
    looks, ended = [], threading.Event()

    def look(folder: Path) -> None:
        looks.append(folder)
        if len(looks) == 6:
            phases._beats += 1
            phases._phase = 'callback'

    monkeypatch.setattr(phases, '_phase', 'start')
    monkeypatch.setattr(phases, '_beats', 0)
    monkeypatch.setattr(inquiry, 'answer_if_asked', look)
    fault = Fault(0, 'here', 'hang', 124, 0.0, 0, '')
    watchdog = Watchdog(tmp_path, 1.0, None, lambda _: ended.set(), lambda: fault, None)
    watchdog.start()
    while len(looks) < 8:
        time.sleep(0.01)
    assert not ended.is_set()
    assert ended.wait(10), 'without progress from then on it is one'
    watchdog.close()


def test_a_wait_for_others_is_told_from_work(tmp_path: Path) -> None:
    """By the files on the stack: a wait in torch.distributed below user code, and user code that is called by torch.distributed's own frames."""
    found: dict[str, str | None] = {}

    def look() -> None:
        frames = list(stacks._frames(sys._getframe()))[1:]
        found[found_key] = stacks.waiting_in(frames)

    library = "def all_reduce(f):\n    f()\n"
    scope: dict[str, Any] = {}
    exec(compile(library, '/x/site-packages/torch/distributed/distributed_c10d.py', 'exec'), scope)  # noqa: S102
    work = "def work(f):\n    f()\n"
    exec(compile(work, '/home/u/plugin.py', 'exec'), scope)  # noqa: S102
    found_key = 'waits'
    scope['work'](lambda: scope['all_reduce'](look))
    # The lambda of this file lies between; what counts is that all_reduce is innermost but for the probe.
    found_key = 'works'
    scope['all_reduce'](lambda: scope['work'](look))
    assert found['waits'] is not None and found['waits'].startswith('all_reduce, called at')
    assert found['works'] is None


def test_an_abort_within_a_collective_is_a_mismatch() -> None:
    text = (
        'Fatal Python error: Aborted\n\nThread 0x1 (most recent call first):\n  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 9 in all_reduce\n'
        '  File "/x/site-packages/torch/distributed/c10d_logger.py", line 81 in wrapper\n  File "/home/u/plugin.py", line 31 in batch_start\n'
    )
    waiting = stacks.waiting_in_crash(text)
    assert waiting == 'all_reduce, called at /home/u/plugin.py:31 batch_start'
    cause = classify.classify([_bundle(0, {'kind': 'crashed', 'code': 134}, waiting_in=waiting)])
    assert cause.kind == 'mismatched collective' and 'plugin.py:31' in cause.setting
    assert classify.classify([_bundle(0, {'kind': 'crashed', 'code': 134})]).kind == 'native crash' and stacks.waiting_in_crash('') is None


def test_bundles_go_to_the_temp_folder_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('TMPDIR', str(tmp_path / 'tmp'))
    (tmp_path / 'tmp').mkdir()
    with small_disk(tmp_path / 'disk', '64k') as disk:
        (disk / 'filler').write_bytes(b'x' * 40000)
        with pytest.raises(OSError, match='No space'):
            (disk / 'more').write_bytes(b'x' * 200000)
        places = bundle.places_for(str(disk), 'r')
        written = bundle.write_bundle(places, fault=Fault(0, 'h', 'exception', 1, 1.0, 0), code=1, live=tmp_path, error=MemoryError())
        assert written is not None and str(written).startswith(str(tmp_path / 'tmp')), written
        assert not list(disk.rglob('*.json'))
    content = json.loads(written.read_text())
    assert content['memory']['rss_peak'] > 0 and content['host'] == socket.gethostname() and 'test_incidents.py' in written.with_suffix('.stacks.txt').read_text()


def test_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert bundle.places_for('/runs/{run_name}/rank{rank}', 'a').folder == Path('/runs/a/rank/incidents/a')
    assert bundle.places_for('s3://b/x', 'a').folder == record.incidents_root() / 'a'
    monkeypatch.setenv('LLMFOUNDRY_INCIDENTS', str(tmp_path))
    assert bundle.places_for('/runs', 'a').folder == tmp_path


def test_the_command_finds_bundles_below_a_save_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = bundle.places_for(str(tmp_path), 'r')
    bundle.write_bundle(places, fault=Fault(0, 'h', 'exception', 1, 1.0, 0), code=1, live=tmp_path, error=_raised(MemoryError('no more')))
    assert report(str(tmp_path), None) == 0 and 'out of host memory' in capsys.readouterr().out
    assert report(str(places.folder), 0) == 0 and 'MemoryError: no more' in capsys.readouterr().out
    assert report(str(places.folder), 7) == 1 and report(str(tmp_path / 'no'), None) == 1
    bundle.set_older_aside(places)
    assert report(str(tmp_path), None) == 1


def test_a_silent_node_is_lost_and_an_unreachable_master_accuses_only_itself(tmp_path: Path) -> None:
    now = time.time()
    ranks = [{'rank': r, 'host': f'h{r}', 'ended': False} for r in range(3)]
    nodes = {str(r): {'changed': now - (60 if r == 2 else 1), 'ranks': [ranks[r]]} for r in range(3)}
    (tmp_path / 'news.json').write_text(json.dumps({'heard': now, 'interval_s': 1.0, 'nodes': nodes}))
    assert [r['lost'] for r in courier.remote_ranks(tmp_path)] == [False, False, True]
    nodes = {k: {**v, 'changed': now - 60} for k, v in nodes.items()}
    (tmp_path / 'news.json').write_text(json.dumps({'heard': now - 60, 'interval_s': 1.0, 'nodes': nodes}))
    assert [r['lost'] for r in courier.remote_ranks(tmp_path)] == [True, False, False]


def test_what_dead_runs_left_is_removed_and_what_live_ones_hold_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setenv('TMPDIR', str(tmp_path))
    monkeypatch.setattr(leftovers, '_SHARED_MEMORY', tmp_path)
    for name, prefix in (('dead', 3), ('live', 4)):
        folder = tmp_path / f'llmfoundry-runs-{os.getuid()}/run-{name}'
        folder.mkdir(parents=True)
        (folder / 'owner.json').write_text(json.dumps({'pid': 1, 'shm_prefixes': [prefix]}))
        (tmp_path / f'{prefix:06d}_locals').touch()
    with open(tmp_path / f'llmfoundry-runs-{os.getuid()}/run-live/owner.json') as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        leftovers.remove_of_dead_runs(set())
    assert sorted(p.name for p in tmp_path.glob('0*')) == ['000004_locals']
    assert [p.name for p in (tmp_path / f'llmfoundry-runs-{os.getuid()}').iterdir()] == ['run-live']
