"""Checkpoint files are whole or absent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmfoundry.callbacks.checkpoint_saver import INCOMPLETE_PREFIX, write_atomically
from llmfoundry.checkpoint.integrity import damage
from llmfoundry.errors import CheckpointError
from tests.helpers.train_runs import ROOT, make_data, run_config, tiny_config
from tests.helpers.workspace import command_environment


def _write(state: object, path: str) -> None:
    with open(path, 'wb') as f:
        torch.save(state, f)


def test_the_name_appears_only_when_the_file_is_whole(tmp_path: Path) -> None:
    target = tmp_path / 'ep0-ba1-rank0.pt'

    def check_and_write(state: object, path: str) -> None:
        assert not target.exists() and path.endswith('.pt')
        _write(state, path)

    write_atomically(check_and_write, {'a': torch.ones(3)}, str(target))
    assert os.listdir(tmp_path) == [target.name]
    assert torch.load(target)['a'].sum() == 3


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), RuntimeError('PytorchStreamWriter failed writing file data/0: file write failed')])
def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / 'latest.pt'
    _write({'old': 1}, str(target))

    def fail(state: object, path: str) -> None:
        Path(path).write_bytes(b'half')
        raise error

    with pytest.raises(CheckpointError, match=r'save_folder: .*4 bytes in, [\d,]+ bytes free.*Earlier checkpoints are untouched'):
        write_atomically(fail, {}, str(target))
    assert os.listdir(tmp_path) == ['latest.pt'] and torch.load(target) == {'old': 1}


LIMITED = """
import resource, sys
from llmfoundry.callbacks.checkpoint_saver import write_atomically
from llmfoundry.errors import CheckpointError
import torch
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    write_atomically(lambda s, p: torch.save(s, open(p, 'wb')), {'w': torch.zeros(1 << 20)}, sys.argv[1])
except CheckpointError as e:
    print('CHECKPOINT', e)
"""


def test_a_write_that_the_system_cuts_short(tmp_path: Path) -> None:
    """A real failed write in the middle of torch.save, by a limit on file sizes; a full disk takes the same way."""
    done = subprocess.run([sys.executable, '-c', LIMITED, str(tmp_path / 'x.pt')], env=command_environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=200, check=False)
    assert 'CHECKPOINT save_folder: the checkpoint' in done.stdout, done.stderr[-2000:]
    assert os.listdir(tmp_path) == []


KILLED = """
import sys, time, torch
from llmfoundry.callbacks.checkpoint_saver import write_atomically
def slow(state, path):
    with open(path, 'wb') as f:
        torch.save(state, f)
        f.truncate(1000); f.flush(); print('half', flush=True); time.sleep(100)
write_atomically(slow, {'w': torch.zeros(1000)}, sys.argv[1])
"""


def test_a_kill_in_the_middle_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, '-c', KILLED, str(tmp_path / 'x.pt')], env=command_environment(PYTHONPATH=str(ROOT)), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == 'half\n'
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.listdir(tmp_path) == [f'{INCOMPLETE_PREFIX}x.pt']


def test_training_saves_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, 'replace', lambda a, b: (renamed.append(os.path.basename(a)), replace(a, b)))
    run_config(tiny_config(make_data(tmp_path / 'data'), save_folder=str(tmp_path / 'ckpt'), save_interval='2ba', max_duration='4ba', save_num_checkpoints_to_keep=1))
    names = ('ep0-ba2-rank0.pt', 'latest-rank0.pt', 'ep0-ba4-rank0.pt', 'latest-rank0.pt')
    assert [n for n in renamed if n.endswith('.pt')] == [INCOMPLETE_PREFIX + name for name in names], 'each file, then the link to it'
    assert sorted(os.listdir(tmp_path / 'ckpt')) == ['ep0-ba4-rank0.pt', 'latest-rank0.pt']
    assert damage(tmp_path / 'ckpt/ep0-ba4-rank0.pt') is None
