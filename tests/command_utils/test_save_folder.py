"""What is found out about the save folder before the first step, and the choice of the checkpoint to resume."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from llmfoundry.checkpoint.integrity import damage
from llmfoundry.command_utils.resumption import newest_local
from llmfoundry.command_utils.save_folder import SaveNames, check_free_space, local_folder, prepare_save_folder
from llmfoundry.errors import ConfigError

NAMES = SaveNames('ep{epoch}-ba{batch}-rank{rank}.pt', 'latest-rank{rank}.pt', sharded=False)


def _checkpoint(folder: Path, batch: int, keep_bytes: int | None = None) -> Path:
    path = folder / f'ep0-ba{batch}-rank0.pt'
    torch.save({'state': torch.arange(1000)}, path)
    if keep_bytes is not None:
        os.truncate(path, keep_bytes)
    return path


def _link(folder: Path, target: str) -> Path:
    latest = folder / 'latest-rank0.pt'
    latest.symlink_to(target)
    return latest


def test_local_folder() -> None:
    assert local_folder('a/{run_name}/b', 'r1') == Path('a/r1/b')
    assert local_folder('{run_name}-{world_size}/rank{rank}', 'r1') == Path('r1-1/rank0')
    assert local_folder('s3://bucket/{run_name}', 'r1') is None
    assert local_folder('dbfs:/Volumes/a/{run_name}', 'r1') is None
    assert local_folder(None, None) is None


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match=r'save_folder: .*file/ckpt. cannot be written to \(NotADirectoryError'):
        prepare_save_folder(tmp_path / 'file' / 'ckpt', NAMES, overwrite=False, may_resume=False)


def test_existing_checkpoints_are_a_collision_unless_resumed_or_overwritten(tmp_path: Path) -> None:
    (tmp_path / '.incomplete-ep0-ba4-rank0.pt').write_text('left by a killed run')
    prepare_save_folder(tmp_path, NAMES, overwrite=False, may_resume=False)
    assert list(tmp_path.iterdir()) == []
    _checkpoint(tmp_path, 4)
    _checkpoint(tmp_path, 10)
    with pytest.raises(ConfigError, match=r"already holds 2 checkpoint\(s\), the newest 'ep0-ba10-rank0.pt'.*autoresume: true.*save_overwrite: true"):
        prepare_save_folder(tmp_path, NAMES, overwrite=False, may_resume=False)
    prepare_save_folder(tmp_path, NAMES, overwrite=True, may_resume=False)
    prepare_save_folder(tmp_path, NAMES, overwrite=False, may_resume=True)


def test_free_space(tmp_path: Path) -> None:
    check_free_space(tmp_path, 1)
    with pytest.raises(ConfigError, match='bytes free, and the weights alone take 1,152,921,504,606,846,976 bytes'):
        check_free_space(tmp_path, 1 << 60)


def test_a_truncated_latest_is_set_aside_for_the_newest_whole_one(tmp_path: Path) -> None:
    _checkpoint(tmp_path, 2)
    good = _checkpoint(tmp_path, 9)
    _checkpoint(tmp_path, 10, keep_bytes=100)
    bad = _checkpoint(tmp_path, 12, keep_bytes=500)
    latest = _link(tmp_path, bad.name)
    found, notes = newest_local(tmp_path, NAMES)
    assert found == good and latest.resolve() == good
    assert [n.split(' (')[0] for n in notes] == [
        'autoresume: ep0-ba12-rank0.pt is damaged', 'autoresume: ep0-ba10-rank0.pt is damaged', 'autoresume: latest-rank0.pt now names ep0-ba9-rank0.pt, the newest whole checkpoint',
    ]
    assert sorted(p.name for p in tmp_path.glob('damaged-*')) == ['damaged-ep0-ba10-rank0.pt', 'damaged-ep0-ba12-rank0.pt']
    assert newest_local(tmp_path, NAMES) == (good, [])


@pytest.mark.parametrize('link', [None, 'ep0-ba99-rank0.pt', 'ep0-ba1-rank0.pt'])
def test_a_missing_dangling_or_stale_latest_is_made_new(tmp_path: Path, link: str | None) -> None:
    """A run killed between the two leaves a link to the checkpoint before the newest."""
    _checkpoint(tmp_path, 1)
    good = _checkpoint(tmp_path, 3)
    if link:
        _link(tmp_path, link)
    found, notes = newest_local(tmp_path, NAMES)
    assert found == good and len(notes) == 1
    assert (tmp_path / 'latest-rank0.pt').resolve() == good


def test_a_second_damaged_checkpoint_of_a_name_does_not_replace_the_first(tmp_path: Path) -> None:
    for _ in range(3):
        _checkpoint(tmp_path, 3, keep_bytes=7)
        newest_local(tmp_path, NAMES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['damaged-2-ep0-ba3-rank0.pt', 'damaged-3-ep0-ba3-rank0.pt', 'damaged-ep0-ba3-rank0.pt']


def test_nothing_whole_starts_from_the_beginning(tmp_path: Path) -> None:
    _link(tmp_path, _checkpoint(tmp_path, 3, keep_bytes=7).name)
    found, notes = newest_local(tmp_path, NAMES)
    assert found is None and notes[-1].endswith('the run starts from the beginning')
    assert not os.path.lexists(tmp_path / 'latest-rank0.pt')
    assert newest_local(tmp_path / 'absent', NAMES) == (None, [])


def test_sharded_checkpoints_are_complete_with_their_metadata_and_every_byte(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    names = SaveNames(NAMES.filename, 'latest-sharded-rank{rank}', sharded=True)
    for batch in (2, 4, 6):
        dcp.save({'w': torch.arange(100.0)}, storage_writer=dcp.FileSystemWriter(tmp_path / f'ep0-ba{batch}'), no_dist=True)
    assert damage(tmp_path / 'ep0-ba6') is None
    (tmp_path / 'ep0-ba6' / '.metadata').unlink()
    shard = next((tmp_path / 'ep0-ba4').glob('*.distcp'))
    os.truncate(shard, shard.stat().st_size // 4)
    found, notes = newest_local(tmp_path, names)
    assert 'its .metadata is missing' in notes[0] and 'of' in notes[1]
    assert found == (tmp_path / 'latest-sharded-rank0').resolve() == tmp_path / 'ep0-ba2'
