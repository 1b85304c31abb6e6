"""Checkpoints are read without running anything from them."""

from __future__ import annotations

import datetime
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from llmfoundry.checkpoint.safe_load import load_checkpoint_file
from llmfoundry.errors import CheckpointError, UnsafeCheckpointError
from tests.helpers.composer_checkpoints import TrainedRun


class Exploit:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class OwnState:
    """State of somebody's callback."""

    def __init__(self) -> None:
        self.count = 3


def test_a_real_checkpoint_loads_whole(alibi_run: TrainedRun) -> None:
    ours = load_checkpoint_file(alibi_run.path)
    free = torch.load(alibi_run.path, weights_only=False)
    assert set(ours) == set(free) == {'state', 'rng'}
    assert set(ours['state']) == set(free['state'])
    assert ours['state']['timestamp'] == free['state']['timestamp']
    for name, tensor in free['state']['model'].items():
        assert torch.equal(ours['state']['model'][name], tensor)


def test_tensors_are_mapped_not_copied(tmp_path: Path) -> None:
    size = 64 * 2**20
    torch.save({'state': {'model': {'w': torch.ones(size // 4)}}}, tmp_path / 'big.pt')
    before = _private_bytes()
    loaded = load_checkpoint_file(tmp_path / 'big.pt')
    assert float(loaded['state']['model']['w'].sum()) == size // 4
    assert _private_bytes() - before < size // 4


def _private_bytes() -> int:
    """Memory of this process that no file backs."""
    with open('/proc/self/status', encoding='ascii') as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith('RssAnon'))


def test_values_of_composer_and_numpy_load(tmp_path: Path) -> None:
    from composer.core import Time, TimeUnit

    content = {
        'delta': datetime.timedelta(seconds=3), 'array': np.arange(3), 'scalar': np.float32(2.5), 'bool': np.bool_(True), 'int': np.int64(7),
        'time': Time(3, 'ba'), 'unit': TimeUnit.EPOCH, 'set': {1, 2}, 'version': torch.__version__,
    }
    torch.save(content, tmp_path / 'x.pt')
    loaded = load_checkpoint_file(tmp_path / 'x.pt')
    assert (loaded['array'] == content['array']).all()
    assert {k: v for k, v in loaded.items() if k != 'array'} == {k: v for k, v in content.items() if k != 'array'}


def test_a_command_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    witness = tmp_path / 'witness'
    torch.save({'state': Exploit(f'touch {witness}')}, tmp_path / 'evil.pt')
    with pytest.raises(UnsafeCheckpointError, match=r'(posix|os)\.system') as error:
        load_checkpoint_file(tmp_path / 'evil.pt')
    assert 'evil.pt' in str(error.value)
    assert not witness.exists()


def test_legacy_pickles_are_refused_too(tmp_path: Path) -> None:
    witness = tmp_path / 'witness'
    (tmp_path / 'evil.pt').write_bytes(pickle.dumps({'state': Exploit(f'touch {witness}')}, protocol=2))
    with pytest.raises(CheckpointError):
        load_checkpoint_file(tmp_path / 'evil.pt')
    assert not witness.exists()


def test_own_classes_need_to_be_allowed_by_name(tmp_path: Path) -> None:
    name = f'{OwnState.__module__}.OwnState'
    torch.save({'state': OwnState()}, tmp_path / 'own.pt')
    with pytest.raises(UnsafeCheckpointError, match=f'--allow_class {name}'):
        load_checkpoint_file(tmp_path / 'own.pt')
    assert load_checkpoint_file(tmp_path / 'own.pt', extra_classes=[name])['state'].count == 3


def test_functions_cannot_be_allowed(tmp_path: Path) -> None:
    torch.save({}, tmp_path / 'x.pt')
    with pytest.raises(ValueError, match='only classes may be allowed'):
        load_checkpoint_file(tmp_path / 'x.pt', extra_classes=['os.system'])
    with pytest.raises(ValueError, match='cannot be imported as package.module.Class'):
        load_checkpoint_file(tmp_path / 'x.pt', extra_classes=['nowhere.Thing'])


@pytest.mark.parametrize('kept', [0.3, 0.9, 0.999])
def test_a_truncated_file_says_so(kept: float, alibi_run: TrainedRun, tmp_path: Path) -> None:
    data = alibi_run.path.read_bytes()
    (tmp_path / 'cut.pt').write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CheckpointError, match=r'cut\.pt.*bytes\) cannot be read as a checkpoint.*Cause: '):
        load_checkpoint_file(tmp_path / 'cut.pt')


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / 'text.pt').write_text('hello')
    (tmp_path / 'empty.pt').write_bytes(b'')
    with zipfile.ZipFile(tmp_path / 'zip.pt', 'w') as z:
        z.writestr('a.txt', 'a')
    for name in ('text.pt', 'empty.pt', 'zip.pt'):
        with pytest.raises(CheckpointError, match='cannot be read as a checkpoint'):
            load_checkpoint_file(tmp_path / name)
    torch.save([1], tmp_path / 'list.pt')
    with pytest.raises(CheckpointError, match='holds a list'):
        load_checkpoint_file(tmp_path / 'list.pt')
    with pytest.raises(FileNotFoundError, match='No checkpoint file'):
        load_checkpoint_file(tmp_path / 'absent.pt')


class _Getattr:
    """Pickles as a call of ``getattr``, as Python before 3.11.4 pickles members of enums."""

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple:
        return getattr, (self.owner, self.name)


def test_members_of_enums_load_as_old_pythons_wrote_them(tmp_path: Path) -> None:
    from composer.core.time import TimeUnit

    torch.save({'state': {'unit': _Getattr(TimeUnit, 'BATCH')}}, tmp_path / 'x.pt')
    assert load_checkpoint_file(tmp_path / 'x.pt')['state']['unit'] is TimeUnit.BATCH


@pytest.mark.parametrize(('owner', 'name'), [(dict, 'fromkeys'), (dict, '__subclasses__')])
def test_getattr_of_anything_else_is_refused(tmp_path: Path, owner: type, name: str) -> None:
    torch.save({'state': {'unit': _Getattr(owner, name)}}, tmp_path / 'x.pt')
    with pytest.raises(UnsafeCheckpointError, match=f"it holds a call of getattr\\(<class 'dict'>, '{name}'\\), which no checkpoint needs"):
        load_checkpoint_file(tmp_path / 'x.pt')
