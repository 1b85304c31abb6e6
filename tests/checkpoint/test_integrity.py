"""What is not whole is found: cut short, flipped, missing, in each form of a checkpoint."""

from __future__ import annotations

import bz2
import gzip
import io
import os
import re
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from llmfoundry.checkpoint.integrity import SEAL_FILE, damage, damage_over_ranks, seal, unseal
from llmfoundry.checkpoint.metadata_file import METADATA_FILE

CONTENT = {'a': torch.arange(10), 'b': 3, 'c': torch.linspace(0, 1, 5)}


def _saved(path: Path, content: Any = None) -> Path:
    torch.save(CONTENT if content is None else content, path)
    return path


def _flip(path: Path, position: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bit
    path.write_bytes(data)


def _loads_as_written(data: bytes) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            loaded = torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # noqa: BLE001 - torch raises all kinds for damaged files
        return False
    return isinstance(loaded, dict) and list(loaded) == list(CONTENT) and torch.equal(loaded['a'], CONTENT['a']) and loaded['b'] == 3 and torch.equal(loaded['c'], CONTENT['c'])


def test_every_flip_that_changes_what_torch_reads_is_found(tmp_path: Path) -> None:
    """Byte by byte, headers and directory included."""
    data = _saved(tmp_path / 'x.pt').read_bytes()
    missed, found = [], 0
    for position in range(len(data)):
        if data[position - 1 : position + 1] == b'ZZ':  # padding before a record
            continue
        flipped = bytearray(data)
        flipped[position] ^= 128 if position % 2 else 1
        (tmp_path / 'flipped.pt').write_bytes(flipped)
        if damage(tmp_path / 'flipped.pt') is not None:
            found += 1
        elif not _loads_as_written(bytes(flipped)):
            missed.append(position)
    assert missed == [] and found > len(data) // 3


def test_every_cut_is_found(tmp_path: Path) -> None:
    path = _saved(tmp_path / 'x.pt')
    size = path.stat().st_size
    assert damage(path) is None
    for kept in (*range(0, size, 97), size - 1):
        os.truncate(_saved(path), kept)
        assert damage(path), kept
    assert damage(tmp_path / 'none.pt') == 'the file is missing'
    path.write_bytes(b'')
    assert damage(path) == 'the file is empty'


def test_the_record_is_named_with_both_checksums(tmp_path: Path) -> None:
    path = _saved(tmp_path / 'x.pt', {'w': torch.ones(3 << 20)})
    _flip(path, path.stat().st_size // 2)
    assert (reason := damage(path)) is not None
    assert 'the record data/0 (12,582,912 bytes) has the CRC32' in reason and f'{path.stat().st_size:,} bytes; ' in reason


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / 'text.pt').write_text('hello ' * 100)
    with zipfile.ZipFile(tmp_path / 'zip.pt', 'w') as z:
        z.writestr('a/b.txt', 'a')
    assert 'another kind of file' in str(damage(tmp_path / 'text.pt'))
    assert 'no record data.pkl' in str(damage(tmp_path / 'zip.pt'))
    torch.save(CONTENT, tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
    assert damage(tmp_path / 'old.pt') is None, 'the format before torch 1.6 has no checksums'


@pytest.mark.parametrize('suffix', ['.pt.gz', '.pt.bz2', '.tar', '.tar.gz'])
def test_compressed_forms(tmp_path: Path, suffix: str) -> None:
    plain = _saved(tmp_path / 'composer_states.pt', {'w': torch.rand(5000)})
    path = tmp_path / f'ep0-ba1-rank0{suffix}'
    if 'tar' in suffix:
        with tarfile.open(path, 'w:gz' if suffix.endswith('gz') else 'w') as tar:
            tar.add(plain, 'composer_states.pt')
    else:
        path.write_bytes((gzip if suffix.endswith('gz') else bz2).compress(plain.read_bytes()))
    assert damage(path) is None
    whole = path.read_bytes()
    _flip(path, len(whole) // 2)
    assert damage(path)
    path.write_bytes(whole[: len(whole) // 2])
    assert damage(path)


def test_a_tar_that_would_write_outside_its_folder_is_damaged(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / 'x.tar', 'w') as tar:
        tar.add(_saved(tmp_path / 'y.pt'), '../../evil.pt')
    assert "holds '../../evil.pt'" in str(damage(tmp_path / 'x.tar'))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    state = {'state': {'w': torch.arange(600.0).view(20, 30), 'n': {'a': 1, 'b': 'text'}}, 'rng': [{'torch': torch.arange(9)}]}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / 'ep0-ba6'), no_dist=True)
    return tmp_path / 'ep0-ba6'


def test_flips_in_shards_are_found_and_the_item_is_named(sharded: Path) -> None:
    shard = next(sharded.glob('*.distcp'))
    whole = shard.read_bytes()
    assert damage(sharded) is None
    found = 0
    for position in range(0, len(whole), 41):
        _flip(shard, position)
        reason = damage(sharded)
        found += reason is not None and reason.startswith(f'{shard.name}: ')
        shard.write_bytes(whole)
    assert found > len(range(0, len(whole), 41)) / 3, 'the rest is padding and timestamps'
    _flip(shard, whole.index(torch.arange(600.0).numpy().tobytes()) + 1000)
    assert 'state.w at byte' in str(damage(sharded))
    shard.write_bytes(whole[:-1])
    assert f'{len(whole) - 1:,} of' in str(damage(sharded))
    shard.unlink()
    assert damage(sharded) == f'{shard.name} is missing'
    (sharded / METADATA_FILE).unlink()
    assert damage(sharded) == 'its .metadata is missing'


def test_every_flip_in_sealed_metadata_is_found(sharded: Path) -> None:
    seal(sharded)
    assert damage(sharded) is None
    path = sharded / METADATA_FILE
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        _flip(path, position)
        assert 'the checksums differ' in str(damage(sharded))
        path.write_bytes(whole)
    os.system(f'cd {sharded} && sha256sum --quiet -c {SEAL_FILE} > checked')
    assert (sharded / 'checked').read_text() == '', 'the seal is in the form of sha256sum'
    unseal(sharded)
    unseal(sharded)
    assert damage(sharded) is None


def test_metadata_without_a_seal_is_compared_with_itself(sharded: Path) -> None:
    """Numbers and names that do not agree; never an exception, whatever the flipped byte makes of the pickle."""
    path = sharded / METADATA_FILE
    whole = path.read_bytes()
    found = 0
    for position in range(0, len(whole), 3):
        _flip(path, position, 4)
        try:
            found += damage(sharded) is not None
        except RuntimeError as e:  # a class of another name is refused
            assert re.search('which no (sharded )?checkpoint needs', str(e))  # the shorter text for members of enums, which older Pythons pickle by name
            found += 1
        path.write_bytes(whole)
    assert found > len(range(0, len(whole), 3)) / 2


def test_ranks_share_the_reading(sharded: Path, tmp_path: Path) -> None:
    """Every damaged place is in the share of exactly one rank, in a folder and in a file."""
    shard = next(sharded.glob('*.distcp'))
    _saved(tmp_path / 'file.pt')
    for path, inside, values in ((sharded, shard, torch.arange(600.0)), (sharded, shard, torch.arange(9)), (tmp_path / 'file.pt', tmp_path / 'file.pt', CONTENT['c'])):
        whole = inside.read_bytes()
        _flip(inside, whole.index(values.numpy().tobytes()) + 5)
        assert sorted(damage(path, (rank, 3)) is not None for rank in range(3)) == [False, False, True]
        assert damage_over_ranks(path, same_files=True) == damage(path)
        inside.write_bytes(whole)
