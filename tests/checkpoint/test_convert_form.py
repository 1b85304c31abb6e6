"""Checkpoints in one form and the other hold the same, and cannot be half there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmfoundry.checkpoint.convert_form import convert_form, read_state
from llmfoundry.checkpoint.integrity import SEAL_FILE, damage
from llmfoundry.command_utils import convert_checkpoint as command
from llmfoundry.errors import CheckpointError
from tests.checkpoint.test_sharded import Exploit, save_exploit
from tests.helpers.composer_checkpoints import TrainedRun
from tests.helpers.processes import run_in_processes
from tests.helpers.small_tokenizer import small_tokenizer_files


@pytest.fixture(scope='module')
def monolithic(alibi_run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained run with a small tokenizer."""
    state = torch.load(alibi_run.path, weights_only=False)
    state['state']['integrations']['huggingface']['tokenizer'] = {
        **small_tokenizer_files(50257), 'merges.txt': {'file_extension': '.txt', 'content': ['#version: 0.2', 'a b', '']},
    }
    path = tmp_path_factory.mktemp('forms') / 'one.pt'
    torch.save(state, path)
    return path


@pytest.fixture(scope='module')
def sharded(monolithic: Path) -> Path:
    folder = monolithic.with_name('shards')
    convert_form(monolithic, folder, sharded=True)
    return folder


def _is_empty(value: Any) -> bool:
    return isinstance(value, dict | list) and all(_is_empty(v) for v in (value.values() if isinstance(value, dict) else value))


def _differences(a: Any, b: Any, path: str = '') -> list[str]:
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and torch.equal(a, b) and a.dtype == b.dtype else [path]
    if type(a) is not type(b) and not (isinstance(a, dict) and isinstance(b, dict)):
        return [f'{path}: {type(a)} {type(b)}']
    if isinstance(a, dict):
        # What is empty has no values, so a sharded checkpoint does not hold it.
        keys = {k for k in {*a, *b} if not _is_empty(a.get(k, b.get(k)))}
        return [d for k in sorted(keys, key=str) for d in (_differences(a[k], b[k], f'{path}/{k}') if k in a and k in b else [f'{path}/{k} is in one only'])]
    if isinstance(a, list | tuple):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in _differences(x, y, f'{path}/{i}')]
    return [] if str(a) == str(b) else [path]


def test_there_and_back_is_the_same(monolithic: Path, sharded: Path, tmp_path: Path) -> None:
    assert damage(sharded) is None and (sharded / SEAL_FILE).exists()
    convert_form(sharded, tmp_path / 'back.pt', sharded=False)
    assert _differences(torch.load(monolithic, weights_only=False), torch.load(tmp_path / 'back.pt', weights_only=False)) == []


def test_weights_only(sharded: Path, monolithic: Path, tmp_path: Path) -> None:
    for source in (sharded, monolithic):
        state = read_state(source, weights_only=True)
        assert set(state) == {'state'} and set(state['state']) == {'model', 'integrations', 'metadata'}
    convert_form(sharded, tmp_path / 'weights.pt', sharded=False, weights_only=True)
    assert (tmp_path / 'weights.pt').stat().st_size < monolithic.stat().st_size / 2


def test_damaged_unsafe_or_existing(sharded: Path, monolithic: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sharded, tmp_path / 'copy'))
    shard = next(copy.glob('*.distcp'))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match='is damaged'):
        convert_form(copy, tmp_path / 'out.pt', sharded=False)
    witness = tmp_path / 'witness'
    torch.save({'state': {'model': {}, 'x': Exploit(f'touch {witness}')}}, tmp_path / 'evil.pt')
    run_in_processes(save_exploit, 1, str(tmp_path / 'evil'), f'touch {witness}')
    for source in (tmp_path / 'evil.pt', tmp_path / 'evil'):
        with pytest.raises(CheckpointError, match=r'system.*LLMFOUNDRY_SAFE_CLASSES'):
            convert_form(source, tmp_path / 'out', sharded=source.suffix == '.pt')
    with pytest.raises(FileExistsError, match='exists already'):
        convert_form(sharded, monolithic, sharded=False)
    assert not witness.exists()
    assert {p.name for p in tmp_path.iterdir()} == {'copy', 'evil', 'evil.pt'}


def test_the_command(monolithic: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / 'latest-rank0.pt').symlink_to(monolithic)
    assert command.main([str(tmp_path / 'latest-rank0.pt'), str(tmp_path / 'out'), '--to', 'sharded', '--weights_only']) == 0
    assert damage(tmp_path / 'out') is None
    assert command.main([str(tmp_path / 'nowhere.pt'), str(tmp_path / 'out2'), '--to', 'sharded']) == 1
    out = capsys.readouterr()
    assert 'Wrote ' in out.out and "nowhere.pt' does not exist" in out.err and "holds 'latest-rank0.pt', 'out'" in out.err
