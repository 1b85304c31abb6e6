"""Saving in the background: the checkpoint is that of the step at which it was taken, however long its writing takes, and failures reach every rank."""

from __future__ import annotations

import collections
import copy
import io
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.utils import checkpoint as composer_checkpoint

from llmfoundry.callbacks.checkpoint_saver import AtomicCheckpointSaver
from llmfoundry.checkpoint.integrity import damage
from llmfoundry.checkpoint.output_mirror import LIST_NAME, OutputMirror
from llmfoundry.checkpoint.remote_store import RemoteStore
from llmfoundry.checkpoint.staging import Stager, staged_bytes
from llmfoundry.config.load import load_train_config
from llmfoundry.errors import CheckpointError, ConfigError
from tests.helpers.train_runs import losses_in, make_data, run_config, tiny_config
from tests.helpers.warm_launcher import Job, WarmLauncher

SHARDED = {'state_dict_type': 'sharded', 'mixed_precision': 'FULL'}


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp('async'))


def _bytes_of(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _state() -> dict[str, Any]:
    weight = torch.randn(40, 30)
    whole = torch.arange(100.0)
    model = collections.OrderedDict(wte=weight, lm_head=weight, view=whole[10:20], other_view=whole[50:], parameter=torch.nn.Parameter(torch.ones(3)), step=torch.tensor(3))
    model._metadata = {'': {'version': 1}}  # type: ignore[attr-defined]
    return {'state': {'model': model, 'lists': [1, (2, torch.zeros(2))], 'object': {'threshold': 1.5, 'seen': {1, 2}}, 'integrations': {'x': 'y'}}, 'rng': [{'python': (3, (1, 2), None)}]}


def test_the_copy_is_the_state_to_the_byte_and_does_not_change_with_it() -> None:
    state = _state()
    before = _bytes_of(state)
    stager = Stager()
    staged = stager.stage(state, fresh=('integrations',))
    assert _bytes_of(staged) == before, 'tied weights, views, parameters and attributes are kept'
    assert staged_bytes(state) == stager.held_bytes == 40 * 30 * 4 + 400 + 12 + 8 + 8
    model = state['state']['model']
    for tensor in model.values():
        tensor.data.add_(1)
    state['state']['lists'].append(7)
    state['state']['object']['seen'].add(3)
    assert _bytes_of(staged) == before
    assert staged['state']['integrations'] is state['state']['integrations']
    first = staged['state']['model']['wte'].data_ptr()
    again = stager.stage(state)
    assert again['state']['model']['wte'].data_ptr() == first, 'buffers are used again'
    assert _bytes_of(again) == _bytes_of(state)


class _Gate:
    """Holds the writing of checkpoints until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.started: list[str] = []
        write = composer_checkpoint._write_checkpoint_file

        def held(state_dict: Any, path: str) -> None:
            self.started.append(os.path.basename(path))
            assert self.opened.wait(120), 'training waits for the checkpoint'
            write(state_dict, path)

        monkeypatch.setattr(composer_checkpoint, '_write_checkpoint_file', held)


def test_training_goes_on_and_the_file_holds_the_step_of_the_save(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write of step 2's checkpoint is held until step 5; the file equals the one of a run that waits."""
    waiting = run_config(tiny_config(data, save_folder=str(tmp_path / 'blocking'), save_interval='2ba', save_async=False, max_duration='6ba'))
    gate = _Gate(monkeypatch)
    batch_end = AtomicCheckpointSaver.batch_end
    in_flight: dict[int, bool] = {}

    def watch(self: AtomicCheckpointSaver, state: Any, logger: Any) -> None:
        batch = int(state.timestamp.batch)
        in_flight[batch] = self.is_saving
        if batch == 3:
            assert not (tmp_path / 'ckpt' / 'latest-rank0.pt').exists()
            gate.opened.set()
        batch_end(self, state, logger)

    monkeypatch.setattr(AtomicCheckpointSaver, 'batch_end', watch)
    trainer = run_config(tiny_config(data, save_folder=str(tmp_path / 'ckpt'), save_interval='2ba', max_duration='6ba'))
    assert in_flight[3] and trainer.saved_checkpoints == [str(tmp_path / f'ckpt/ep0-ba{b}-rank0.pt') for b in (2, 4, 6)]
    assert len(waiting.saved_checkpoints) == 3
    for batch in (2, 4, 6):
        ours, theirs = (torch.load(tmp_path / kind / f'ep0-ba{batch}-rank0.pt', weights_only=False)['state'] for kind in ('ckpt', 'blocking'))
        assert ours['timestamp']['Timestamp']['batch'] == batch
        for part in ('model', 'optimizers'):
            assert _bytes_of(ours[part]) == _bytes_of(theirs[part])
    assert os.readlink(tmp_path / 'ckpt/latest-rank0.pt') == 'ep0-ba6-rank0.pt'


def test_too_little_memory_for_the_copy_blocks_with_one_note(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr('llmfoundry.command_utils.own_callbacks.available_cpu_bytes', lambda: 1000)
    monkeypatch.setattr(AtomicCheckpointSaver, 'batch_end', lambda self, state, logger: pytest.fail('in the background') if self.is_saving else None)
    run_config(tiny_config(data, save_folder=str(tmp_path / 'ckpt'), save_interval='2ba', max_duration='4ba'))
    assert capsys.readouterr().out.count('save_async: a copy of the checkpoint needs') == 1
    assert sorted(os.listdir(tmp_path / 'ckpt')) == ['ep0-ba2-rank0.pt', 'ep0-ba4-rank0.pt', 'latest-rank0.pt']


def test_retention_counts_what_the_resumed_run_had_saved(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, save_folder=str(tmp_path / 'ckpt'), run_name='r', save_interval='1ba', save_num_checkpoints_to_keep=3)
    run_config(config, 'max_duration=4ba')
    (tmp_path / 'ckpt' / 'ep0-ba1-mine.pt').write_text('not of this run')
    run_config(config, 'max_duration=6ba')
    assert sorted(os.listdir(tmp_path / 'ckpt')) == ['ep0-ba1-mine.pt', 'ep0-ba4-rank0.pt', 'ep0-ba5-rank0.pt', 'ep0-ba6-rank0.pt', 'latest-rank0.pt']


def _mirror(folder: Path, *targets: str) -> OutputMirror:
    return OutputMirror(folder, targets, attempts=2, first_pause_s=0.01)


def test_copies_follow_the_folder_and_move_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, path, memory = tmp_path / 'ckpt', str(tmp_path / 'copy'), f'memory://mirror-{os.getpid()}'
    sent: list[str] = []
    for name in ('upload', 'write_text', 'link'):
        call = getattr(RemoteStore, name)
        monkeypatch.setattr(RemoteStore, name, lambda self, a, b, call=call, name=name: (sent.append(b if name == 'upload' and 'llmfoundry-' not in str(a) else a if name != 'upload' else ''), call(self, a, b))[1])
    (folder / 'ep0-ba2').mkdir(parents=True)
    for name in ('ep0-ba2/.metadata', 'ep0-ba2/__0_0.distcp', '.incomplete-x', 'config.txt'):
        (folder / name).write_text(name)
    (folder / 'latest').symlink_to('ep0-ba2')
    mirror = _mirror(folder, path, memory)
    mirror.sync()
    first = [name for name in sent if name]
    assert first[:5] == ['config.txt', 'ep0-ba2/__0_0.distcp', 'ep0-ba2/.metadata', 'latest', LIST_NAME], 'the link comes last'
    assert os.readlink(Path(path) / 'latest') == 'ep0-ba2' and (Path(path) / 'ep0-ba2/.metadata').read_text() == 'ep0-ba2/.metadata'
    assert RemoteStore(memory).list() == [LIST_NAME, 'config.txt', 'ep0-ba2/.metadata', 'ep0-ba2/__0_0.distcp', 'latest.symlink']
    assert RemoteStore(memory).read_text('latest.symlink').endswith('ep0-ba2')
    sent.clear()
    (folder / 'config.txt').write_text('changed!')
    (folder / 'ep0-ba2/.metadata').unlink()
    (folder / 'ep0-ba2/__0_0.distcp').unlink()
    _mirror(folder, path).sync(removed=['ep0-ba2'])  # as after a resume: it knows from the list what is there
    assert [name for name in sent if name] == ['config.txt', LIST_NAME]
    assert RemoteStore(path).list() == [LIST_NAME, 'config.txt', 'latest']


def test_a_copy_that_fails_never_stops_training_and_is_reported_at_the_end(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / 'file').write_text('')
    good, bad = str(tmp_path / 'copy'), str(tmp_path / 'file' / 'below')
    config = tiny_config(data, save_folder=str(tmp_path / 'ckpt'), save_interval='2ba', max_duration='4ba', save_num_checkpoints_to_keep=1, additional_output_paths=[good, bad])
    with pytest.raises(CheckpointError, match=r'additional_output_paths: training is complete and its checkpoints are in .*not up to date:\n  .*file/below: .*NotADirectory|Not a directory'):
        run_config(config)
    assert 'Training goes on; it is tried again at the next save.' in capsys.readouterr().err
    assert sorted(os.listdir(good)) == [LIST_NAME, 'ep0-ba4-rank0.pt', 'latest-rank0.pt'] and damage(Path(good) / 'latest-rank0.pt') is None


def test_copies_need_a_local_folder(data: Path) -> None:
    with pytest.raises(ConfigError, match="additional_output_paths: copies a local save_folder, which is 's3://b/c'"):
        load_train_config(tiny_config(data, save_folder='s3://b/c', additional_output_paths=['/x']), [])


# Rank 1 takes its time over the shards of step 4, so that a kill finds the save in flight.
SLOW_SHARDS = """
import time
from torch.distributed.checkpoint import FileSystemWriter
from llmfoundry import dist
write = FileSystemWriter.write_data
def slow(self, plan, planner):
    if dist.get_global_rank() == 1 and 'ba4' in str(self.path):
        print('RANK 1 IS SLOW', flush=True)
        time.sleep(1000)
    return write(self, plan, planner)
FileSystemWriter.write_data = slow
"""


def _start(launcher: WarmLauncher, folder: Path, config: dict[str, Any]) -> Job:
    folder.mkdir(exist_ok=True)
    (folder / 'config.yaml').write_text(json.dumps({**copy.deepcopy(config), 'loggers': {'jsonl': {'path': str(folder / 'metrics.jsonl')}}}))
    return launcher.start(folder, [str(folder / 'config.yaml')], 2)


def test_two_ranks_killed_while_shards_are_written(launcher: WarmLauncher, data: Path, tmp_path: Path) -> None:
    """Training goes on while rank 1 writes; the killed save has no metadata, and the run resumes from the one before."""
    (tmp_path / 'slow.py').write_text(SLOW_SHARDS)
    config = tiny_config(data, max_duration='7ba', fsdp_config=SHARDED)
    assert _start(launcher, tmp_path / 'whole', config).wait(300) == 0
    saving = {**config, 'run_name': 'r', 'save_folder': str(tmp_path / 'ckpt'), 'save_interval': '2ba'}
    job = _start(launcher, tmp_path / 'run', {**saving, 'code_paths': [str(tmp_path / 'slow.py')]})
    deadline = time.monotonic() + 300
    while max(losses_in(tmp_path / 'run'), default=-1) < 4:  # step 5 is done while the save of step 4 is not
        job.server.collect(0.02)
        assert job.code is None and time.monotonic() < deadline, job.output()[-3000:]
    os.killpg(job.pid, signal.SIGKILL)
    job.wait(60)
    assert damage(tmp_path / 'ckpt/ep0-ba2') is None and not (tmp_path / 'ckpt/ep0-ba4/.metadata').exists()
    assert os.readlink(tmp_path / 'ckpt/latest-sharded-rank0') == 'ep0-ba2'
    resumed = _start(launcher, tmp_path / 'run', saving)
    assert resumed.wait(300) == 0, resumed.output()[-3000:]
    assert losses_in(tmp_path / 'run') == losses_in(tmp_path / 'whole') and len(losses_in(tmp_path / 'whole')) == 7
    assert damage(tmp_path / 'ckpt/ep0-ba6') is None
