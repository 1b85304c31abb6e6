"""A disk that fills up while a run saves: one clear error, nothing that looks whole and is not, and the run goes on once there is room."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Iterator

import pytest

from llmfoundry.checkpoint.integrity import damage
from llmfoundry.errors import ConfigError
from tests.helpers.disks import resize_disk, small_disk
from tests.helpers.train_runs import losses_in, make_data, run_config, start_training, tiny_config, train_losses


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / 'disk', '2m') as folder:
        yield folder


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp('full_disk'))


def test_no_room_for_the_weights_is_found_before_the_first_step(data: Path, disk: Path) -> None:
    with pytest.raises(ConfigError, match=r'save_folder: .* bytes free, and the weights alone take 3,2\d\d,\d{3} bytes per checkpoint\. Free some space or choose another folder'):
        run_config(tiny_config(data, save_folder=str(disk / 'ckpt'), save_interval='1ba'))
    assert not [p for p in disk.rglob('*') if p.is_file()]


def test_full_in_mid_training_then_room(data: Path, disk: Path, tmp_path: Path) -> None:
    """One checkpoint of this model and its optimizer fits, a second does not."""
    config = tiny_config(data, run_name='r', save_folder=str(disk / 'ckpt'), save_interval='2ba')
    resize_disk(disk, '20m')
    assert start_training(config, tmp_path / 'run', launcher=False).wait(300) == 1
    out = (tmp_path / 'run' / 'out.txt').read_text()
    assert re.search(
        r"ERROR: CheckpointError\nsave_folder: the checkpoint '.*ep0-ba4-rank0\.pt' could not be written \([\d,]+ bytes in, [\d,]+ bytes free\): .*"
        r'Earlier checkpoints are untouched\. Free some space or choose another save_folder .*, then rerun with autoresume: true\.', out,
    ), out[-3000:]
    assert 'Traceback' not in out
    assert sorted(p.name for p in (disk / 'ckpt').iterdir() if p.name != 'incidents') == ['ep0-ba2-rank0.pt', 'latest-rank0.pt']
    assert damage(disk / 'ckpt' / 'latest-rank0.pt') is None

    resize_disk(disk, '100m')
    before = losses_in(tmp_path / 'run')
    resumed = train_losses(run_config(config))
    assert len(resumed) == 4 and resumed[0] == before[2]


def test_full_while_two_ranks_save_shards(data: Path, disk: Path, tmp_path: Path) -> None:
    """Every rank says the same, although the write of one has failed, and the unfinished folder is gone."""
    sharded = {'state_dict_type': 'sharded', 'mixed_precision': 'FULL'}
    config = tiny_config(data, run_name='r', save_folder=str(disk / 'ckpt'), save_interval='2ba', fsdp_config=sharded)
    resize_disk(disk, '20m')
    assert start_training(config, tmp_path / 'run', ranks=2).wait(300) != 0
    out = (tmp_path / 'run' / 'out.txt').read_text()
    assert re.search(
        r"CheckpointError: save_folder: the checkpoint '.*ep0-ba4' could not be written.*: (OSError: \[Errno 28\] No space left on device|RuntimeError: .*inline_container.*)\. Earlier checkpoints are", out,
    ), out[-3000:]
    assert 'Traceback' not in out
    assert sorted(p.name for p in (disk / 'ckpt').iterdir() if p.name != 'incidents') == ['ep0-ba2', 'latest-sharded-rank0']
    assert damage(disk / 'ckpt' / 'latest-sharded-rank0') is None
