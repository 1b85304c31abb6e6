"""What can be known about the save folder before the first step, and what it holds.

A run that fails at its first save has wasted all the time before it. So rank 0 writes and removes a probe file, looks for checkpoints that the run would
collide with, and compares the free space with the weights. Which checkpoint a run continues is decided in ``resumption``.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llmfoundry import dist
from llmfoundry.callbacks.checkpoint_saver import INCOMPLETE_PREFIX
from llmfoundry.errors import ConfigError, ConfigProblem

__all__ = ['SHARDED_FOLDER', 'SaveNames', 'batch_of', 'check_free_space', 'find_checkpoints', 'local_folder', 'point_latest', 'prepare_save_folder', 'set_aside']

# Composer's name for the folder of a sharded checkpoint.
SHARDED_FOLDER = 'ep{epoch}-ba{batch}'
SET_ASIDE_PREFIX = 'damaged-'


@dataclass(frozen=True)
class SaveNames:
    """File name patterns of a run's checkpoints (Composer's ``{epoch}``, ``{rank}``, ... fields)."""

    filename: str
    latest: str | None
    sharded: bool

    @property
    def patterns(self) -> tuple[str, str]:
        """Of files and of sharded folders: a run whose number of processes has changed may find the other form."""
        return self.filename, SHARDED_FOLDER


def local_folder(save_folder: str | None, run_name: str | None) -> Path | None:
    """The folder of this rank as a path with Composer's fields filled in; None when there is none or it is remote (``s3://...``, also ``dbfs:/...``)."""
    if save_folder is None or '://' in save_folder or save_folder.startswith('dbfs:/'):
        return None
    fields = {
        'run_name': run_name or '', 'rank': dist.get_global_rank(), 'local_rank': dist.get_local_rank(), 'node_rank': dist.get_node_rank(),
        'world_size': dist.get_world_size(), 'local_world_size': dist.get_local_world_size(),
    }  # fmt: skip
    for name, value in fields.items():
        save_folder = save_folder.replace(f'{{{name}}}', str(value))
    return Path(save_folder)


def prepare_save_folder(folder: Path, names: SaveNames, *, overwrite: bool, may_resume: bool) -> None:
    """Creates the folder and checks that checkpoints can be written to it.

    Args:
        folder: the local save folder.
        names: patterns of the checkpoints.
        overwrite: ``save_overwrite``.
        may_resume: the run starts from a checkpoint (``autoresume``, ``load_path``), so files of earlier steps are no collision.

    Raises:
        ConfigError: not writable, or checkpoints that would be overwritten.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b'\0' * 65536)
            probe.flush()
    except OSError as e:
        raise _problem(f'{str(folder)!r} cannot be written to ({type(e).__name__}: {e.strerror or e}). Choose a folder that this user may write to, on a disk with space.') from e
    for leftover in folder.glob(f'{INCOMPLETE_PREFIX}*'):  # of a run killed while it saved
        leftover.unlink(missing_ok=True)
    existing = find_checkpoints(folder, names)
    if existing and not overwrite and not may_resume:
        raise _problem(
            f'{str(folder)!r} already holds {len(existing)} checkpoint(s), the newest {existing[0].name!r}, which this run would overwrite. Continue that run with autoresume: true, '
            'choose another save_folder or run_name, or set save_overwrite: true.',
        )


def check_free_space(folder: Path, weights_bytes: int) -> None:
    """Compares the free space with one checkpoint's weights, the least that a checkpoint takes.

    Raises:
        ConfigError: less than that is free.
    """
    free = shutil.disk_usage(folder).free
    if free < weights_bytes:
        raise _problem(
            f'{str(folder)!r} has {free:,} bytes free, and the weights alone take {weights_bytes:,} bytes per checkpoint. Free some space or choose another folder.',
        )


def find_checkpoints(folder: Path, names: SaveNames) -> list[Path]:
    """The run's checkpoints in a local folder, files and sharded ones, newest first by batch (by time where the pattern has no batch)."""
    found = []
    for pattern in names.patterns:
        for path in folder.glob('/'.join(['*'] * (pattern.count('/') + 1))):
            batch = batch_of(path.relative_to(folder).as_posix(), pattern)
            if batch is not None and not path.is_symlink() and path.is_dir() == (pattern == SHARDED_FOLDER):
                found.append((batch, path.stat().st_mtime, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def batch_of(name: str, pattern: str) -> int | None:
    """The batch in the name of a checkpoint, 0 where the pattern has none; None for other names."""
    parts = re.split(r'(\{\w+\})', pattern)
    regex = ''.join(_field_regex(p, parts[:i]) if p.startswith('{') else re.escape(p) for i, p in enumerate(parts))
    match = re.fullmatch(regex, name)
    return int(match.groupdict().get('batch') or 0) if match else None


def _field_regex(field: str, before: list[str]) -> str:
    name = field[1:-1]
    numeric = name != 'run_name'
    value = r'\d+' if numeric else r'[^/]+'
    return f'(?P<{name}>{value})' if field not in before else f'(?P={name})'


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint to ``damaged-...``, so that nothing takes it for a good one and nothing is lost; returns the new path."""
    aside = path.with_name(SET_ASIDE_PREFIX + path.name)
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f'{SET_ASIDE_PREFIX}{number}-{path.name}')
    return path.rename(aside)


def point_latest(folder: Path, names: SaveNames, target: Path | None) -> bool:
    """Makes the link ``latest`` name ``target``, or removes it; returns whether it was another before."""
    if names.latest is None:
        return False
    latest = folder / names.latest.replace('{rank}', '0')
    if '{' in latest.name or (not latest.is_symlink() and (target is None or latest.exists())):
        return False
    wanted = None if target is None else os.path.relpath(target, latest.parent)
    if latest.is_symlink() and os.readlink(latest) == wanted:
        return False
    latest.unlink(missing_ok=True)
    if wanted is not None:
        latest.parent.mkdir(parents=True, exist_ok=True)
        latest.symlink_to(wanted)
    return True


def _problem(message: str) -> ConfigError:
    return ConfigError([ConfigProblem('save_folder', message)])
