"""Shared memory of dead runs is removed at the next start; that of live runs is not touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

from llmfoundry.data import shm_hygiene
from llmfoundry.data.text_data import StreamingTextDataset
from llmfoundry.tokenizers import build_tokenizer
from tests.helpers.processes import run_in_processes

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not Path('/dev/shm').is_dir(), reason='shared memory cannot be listed here')

JOB = """
import sys, time
from llmfoundry.data.text_data import build_text_dataloader
from llmfoundry.tokenizers import build_tokenizer
if __name__ == '__main__':
    dataset = {'remote': sys.argv[1], 'local': sys.argv[2], 'split': 'train', 'max_seq_len': 16}
    loader = build_text_dataloader(build_tokenizer('llmfoundry://gpt2', {}), 4, dataset, True, 2, pin_memory=False).dataloader
    batches = iter(loader)
    next(batches)
    print(loader.dataset._shm_prefix_int, flush=True)
    if sys.argv[3] == 'stay':
        time.sleep(300)
"""


def start(data: Path, local: Path, runs: Path, what: str) -> tuple[subprocess.Popen, int]:
    """A job in a process group of its own, and the number of its shared memory."""
    env = {**os.environ, 'TMPDIR': str(runs), 'OMP_NUM_THREADS': '1'}
    job = subprocess.Popen([sys.executable, '-c', JOB, str(data), str(local), what], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert job.stdout is not None and job.stderr is not None
    line = job.stdout.readline()
    assert line.strip().isdigit(), job.stderr.read()
    return job, int(line)


def blocks(prefix: int) -> set[tuple[str, int]]:
    """Names and inodes, since another job of the machine may take a freed number at once."""
    return {(path.name, path.stat().st_ino) for path in Path('/dev/shm').glob(f'{prefix:06d}_*')}


def kill_group(job: subprocess.Popen) -> None:
    """Kills all of a job and waits until all of it is gone: its workers hold the owner's lock, too, and die a moment after their parent."""
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    deadline = time.monotonic() + 60
    while any(is_running_in_group(stat, job.pid) for stat in Path('/proc').glob('[0-9]*/stat')):
        assert time.monotonic() < deadline, 'processes survived SIGKILL'
        time.sleep(0.05)


def is_running_in_group(stat: Path, group: int) -> bool:
    try:
        state, _, process_group = stat.read_text().rpartition(')')[2].split()[:3]
    except OSError:
        return False
    return int(process_group) == group and state not in 'ZX'


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    monkeypatch.setattr(shm_hygiene, '_current', None)
    yield tmp_path
    if shm_hygiene._current is not None:
        shm_hygiene._remove_at_exit(shm_hygiene._current)


@pytest.mark.slow
def test_kill_9_of_a_process_group_leaves_nothing_for_the_next_start_and_spares_the_living(shared_tokens: Path, runs: Path, tmp_path: Path) -> None:
    living, living_prefix = start(shared_tokens, tmp_path / 'living', runs, 'stay')
    try:
        doomed, doomed_prefix = start(shared_tokens, tmp_path / 'doomed', runs, 'stay')
        before = blocks(living_prefix)
        kill_group(doomed)
        left = blocks(doomed_prefix)
        assert left, 'the kill left nothing, so this test shows nothing'
        # The same local folder again: Streaming would refuse it while the dead run's blocks name it.
        successor, _ = start(shared_tokens, tmp_path / 'doomed', runs, 'end')
        assert successor.wait(240) == 0
        assert not left & blocks(doomed_prefix)
        assert blocks(living_prefix) == before and before
        assert living.poll() is None
        folders = list(shm_hygiene.runs_folder().glob('run-*'))
        assert len(folders) == 1, 'the folders of the dead run and of the one that ended are gone'
    finally:
        kill_group(living)
    # The lock is free once the last process of the group is gone, a moment after its leader.
    deadline = time.monotonic() + 30
    while not (freed := shm_hygiene.clean_dead_runs()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert freed == [living_prefix]
    assert not before & blocks(living_prefix) and not list(shm_hygiene.runs_folder().glob('run-*'))


def test_leftovers_that_are_not_ours_do_not_stop_a_start(gpt2: Any, shared_tokens: Path, runs: Path, tmp_path: Path) -> None:
    """Blocks of a run that nobody recorded, which even name the same local folder: kept, and not in the way."""
    from streaming.base.shared.prefix import _pack_locals

    local = tmp_path / 'copy'
    prefix = next(p for p in range(1000) if p not in shm_hygiene.prefixes_in_use())
    stray = Path(f'/dev/shm/{prefix:06d}_locals')
    stray.write_bytes(_pack_locals([str(local / 'train')], prefix))
    try:
        started = time.monotonic()
        dataset = StreamingTextDataset(gpt2, 16, remote=str(shared_tokens), local=str(local), split='train', batch_size=4)
        assert dataset._shm_prefix_int != prefix and stray.exists()
        assert time.monotonic() - started < 30
        assert len(list(dataset)) == 100
    finally:
        stray.unlink()


def test_the_number_is_recorded_and_the_environment_unchanged(gpt2: Any, shared_tokens: Path, runs: Path) -> None:
    import json
    import tempfile

    saved = tempfile.tempdir
    dataset = StreamingTextDataset(gpt2, 16, local=str(shared_tokens), split='train', batch_size=4)
    (owner,) = shm_hygiene.runs_folder().glob('run-*/owner.json')
    record = json.loads(owner.read_text())
    assert record['shm_prefixes'] == [dataset._shm_prefix_int] and record['pid'] == os.getpid()
    assert tempfile.tempdir == saved and os.environ['TMPDIR'] == str(runs)
    assert shm_hygiene.clean_dead_runs() == [], 'a live run, this one, is not cleaned'
    assert owner.exists() and blocks(dataset._shm_prefix_int)


def _start_both_nodes(data: str, local: str, runs: str) -> tuple[int, int, float]:
    """The rank of a node of its own, whose launcher shares the machine, the temp folder and the data with the other's."""
    import torch.distributed as dist

    os.environ.update(LOCAL_RANK='0', LOCAL_WORLD_SIZE='1', TMPDIR=runs)
    tokenizer = build_tokenizer('llmfoundry://gpt2', {})
    dist.barrier()
    started = time.monotonic()
    dataset = StreamingTextDataset(tokenizer, 16, remote=data, local=local, split='train', batch_size=4)
    dist.barrier()
    return dataset._shm_prefix_int, len(dataset), time.monotonic() - started


def test_two_launchers_of_one_job_do_not_wait_for_each_other(shared_tokens: Path, runs: Path, tmp_path: Path) -> None:
    (first, length, seconds), (second, other_length, _) = run_in_processes(_start_both_nodes, 2, str(shared_tokens), str(tmp_path / 'local'), str(runs))
    assert first != second and length == other_length
    assert seconds < 50, 'one waited for a lock of the other'


def _reserve_and_wait(runs: str, turns: int) -> list[int]:
    """Reserves numbers in a race with the other processes and makes their first blocks."""
    import torch.distributed as dist

    os.environ['TMPDIR'] = runs
    taken = []
    for _ in range(turns):
        dist.barrier()
        with shm_hygiene._next_prefix(shm_hygiene._run_folder(None)) as prefix:
            Path(f'/dev/shm/{prefix:06d}_locals').touch(exist_ok=False)
            Path(os.environ['TMPDIR'], f'{prefix}').touch(exist_ok=False)
        taken.append(prefix)
        shm_hygiene.clean_dead_runs()
    dist.barrier()
    assert not [prefix for prefix in taken if Path(f'/dev/shm/{prefix:06d}_reserved').exists()]
    dist.barrier()
    for prefix in taken:
        Path(f'/dev/shm/{prefix:06d}_locals').unlink()
    return taken


def test_numbers_are_reserved_for_one_only(runs: Path) -> None:
    taken = [prefix for each in run_in_processes(_reserve_and_wait, 3, str(runs), 20) for prefix in each]
    assert len(set(taken)) == len(taken) == 60


def test_a_reservation_outlives_its_owner_until_the_next_start(runs: Path) -> None:
    code = 'import os; from llmfoundry.data import shm_hygiene as s; m = s._next_prefix(s._run_folder(None)); print(m.__enter__(), flush=True); os.kill(os.getpid(), 9)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env={**os.environ, 'TMPDIR': str(runs)}, capture_output=True, text=True, check=False)
    marker = Path(f'/dev/shm/{int(done.stdout):06d}_reserved')
    assert marker.exists() and int(done.stdout) in shm_hygiene.prefixes_in_use()
    with shm_hygiene._next_prefix(shm_hygiene._run_folder(None)) as held:
        shm_hygiene.clean_dead_runs()
        assert not marker.exists() and held in shm_hygiene.prefixes_in_use()
    assert held not in shm_hygiene.prefixes_in_use()


def test_a_folder_that_lost_its_owner_file_is_removed_when_it_is_old(runs: Path) -> None:
    """A worker that ends after its parent can put a lock file back into the folder that the parent is removing."""
    old, young = (shm_hygiene.runs_folder() / name for name in ('run-old', 'run-young'))
    for folder in (old, young):
        folder.mkdir(parents=True)
        (folder / '000001_cache_filelock').touch()
    os.utime(old, (time.time() - 3600, time.time() - 3600))
    assert shm_hygiene.clean_dead_runs() == []
    assert not old.exists() and young.exists()


def test_a_failure_is_seen_by_other_processes(tmp_path: Path) -> None:
    here, there = shm_hygiene.SharedFailure(str(tmp_path / 'failure')), shm_hygiene.SharedFailure(str(tmp_path / 'failure'))
    assert not there.is_set()
    here.publish('first')
    here.publish('second')
    time.sleep(0.15)
    assert there.is_set() and there.reason() == 'first'
    assert [p.name for p in tmp_path.iterdir()] == ['failure']
