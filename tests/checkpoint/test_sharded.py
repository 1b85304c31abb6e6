"""Sharded checkpoints: pieces of several ranks are put together, exported, and read without running anything from them."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from llmfoundry.checkpoint.composer_to_hf import ExportOptions, convert_checkpoint
from llmfoundry.checkpoint.reader import open_checkpoint
from llmfoundry.checkpoint.sharded import METADATA_FILE, ShardedCheckpoint
from llmfoundry.errors import CheckpointError, UnsafeCheckpointError
from tests.helpers.composer_checkpoints import TrainedRun
from tests.helpers.processes import run_in_processes
from tests.helpers.small_tokenizer import small_tokenizer_files


class Exploit:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def save_in_shards(composer_file: str, folder: str) -> list[str]:
    """Saves a monolithic checkpoint as Composer saves a sharded one: weights spread over the ranks, everything else as values."""
    loaded = torch.load(composer_file, weights_only=False)
    mesh = init_device_mesh('cpu', (torch.distributed.get_world_size(),))
    state = loaded['state']
    state['model'] = {k: distribute_tensor(v, mesh, [Shard(0)]) for k, v in state['model'].items()}
    # A real tokenizer would be saved as 100,000 values.
    state['integrations']['huggingface']['tokenizer'] = small_tokenizer_files(50257)
    dcp.save({'state': {k: state[k] for k in ('model', 'integrations', 'timestamp', 'metadata')}}, checkpoint_id=folder)
    return [k for k, v in state['model'].items() if isinstance(v, DTensor)]


@pytest.fixture(scope='module')
def sharded(alibi_run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('sharded') / 'ep0-ba2'
    names = run_in_processes(save_in_shards, 2, str(alibi_run.path), str(folder))[0]
    assert names and len(list(folder.glob('*.distcp'))) == 2
    return folder


@pytest.fixture
def copied(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / 'copy'))


def test_pieces_of_two_ranks_make_the_whole_tensors(sharded: Path, alibi_run: TrainedRun) -> None:
    wanted = torch.load(alibi_run.path, weights_only=False)['state']
    with open_checkpoint(str(sharded)) as checkpoint:
        assert set(checkpoint.weights) == {k.removeprefix('model.') for k in wanted['model']}
        for name, weight in checkpoint.weights.items():
            assert torch.equal(weight.load(), wanted['model'][f'model.{name}'])
            assert weight.shape == tuple(wanted['model'][f'model.{name}'].shape)
        assert checkpoint.config == wanted['integrations']['huggingface']['model']['config']['content']
        assert checkpoint.huggingface['tokenizer'] == small_tokenizer_files(50257)


def test_export_equals_that_of_the_single_file(sharded: Path, alibi_folder: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(str(sharded), tmp_path / 'hf')
    assert report is not None
    assert (tmp_path / 'hf' / 'model.safetensors').read_bytes() == (alibi_folder / 'model.safetensors').read_bytes()
    assert (tmp_path / 'hf' / 'config.json').read_text() == (alibi_folder / 'config.json').read_text()


def test_a_symlink_note_is_followed(sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded, tmp_path / 'ep0-ba2')
    (tmp_path / 'latest-sharded-rank0.symlink').write_text(f'some/bucket/{folder.name}')
    with open_checkpoint(str(tmp_path / 'latest-sharded-rank0.symlink')) as checkpoint:
        assert checkpoint.weights


def test_a_missing_or_short_file_is_named(copied: Path) -> None:
    shard = sorted(copied.glob('*.distcp'))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=rf'{shard.name}.*it is truncated'):
        ShardedCheckpoint(str(copied))
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks the file '{shard.name}'"):
        ShardedCheckpoint(str(copied))
    (copied / METADATA_FILE).unlink()
    with pytest.raises(CheckpointError, match='has no .metadata file'):
        ShardedCheckpoint(str(copied))


def test_metadata_cannot_run_code(copied: Path, tmp_path: Path) -> None:
    witness = tmp_path / 'witness'
    (copied / METADATA_FILE).write_bytes(pickle.dumps(Exploit(f'touch {witness}')))
    with pytest.raises(UnsafeCheckpointError, match=r'an object of (posix|os)\.system'):
        ShardedCheckpoint(str(copied))
    (copied / METADATA_FILE).write_bytes(b'garbage')
    with pytest.raises(CheckpointError, match='truncated or damaged'):
        ShardedCheckpoint(str(copied))
    assert not witness.exists()


def save_exploit(folder: str, command: str) -> None:
    dcp.save({'state': {'model': {'w': torch.ones(2)}, 'integrations': {'huggingface': {'model': Exploit(command)}}}}, checkpoint_id=folder)


def test_values_cannot_run_code(tmp_path: Path) -> None:
    witness = tmp_path / 'witness'
    run_in_processes(save_exploit, 1, str(tmp_path / 'evil'), f'touch {witness}')
    with pytest.raises(UnsafeCheckpointError, match=r'huggingface\.model.*system'), open_checkpoint(str(tmp_path / 'evil')):
        pass
    assert not witness.exists()


def test_without_a_model_or_integration(tmp_path: Path) -> None:
    run_in_processes(save_without_integration, 1, str(tmp_path / 'plain'))
    with pytest.raises(RuntimeError, match='"integrations.huggingface" is not an available key'):
        convert_checkpoint(str(tmp_path / 'plain'), tmp_path / 'hf', ExportOptions())


def save_without_integration(folder: str) -> None:
    dcp.save({'state': {'model': {'w': torch.ones(2)}}}, checkpoint_id=folder)
