"""What can be known about the save folder before the first step, and which checkpoint to resume from.

A run that fails at its first save has wasted all the time before it. So rank 0 writes and removes a probe file, looks for checkpoints that the run would
collide with, and compares the free space with the weights. For ``autoresume`` it makes sure that ``latest`` names a complete checkpoint: a file
cut short by a crash or a full disk is set aside, with a message, and the newest complete one takes its place.
Remote folders (``s3://...``) are left to Composer, whose uploads are whole or absent.
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
from llmfoundry.checkpoint.integrity import damage
from llmfoundry.errors import ConfigError, ConfigProblem

__all__ = ['SaveNames', 'check_free_space', 'local_folder', 'prepare_save_folder', 'repair_latest']

# Composer's name for the folder of a sharded checkpoint.
SHARDED_FOLDER = 'ep{epoch}-ba{batch}'
SET_ASIDE_PREFIX = 'damaged-'


@dataclass(frozen=True)
class SaveNames:
    """File name patterns of a run's checkpoints (Composer's ``{epoch}``, ``{rank}``, ... fields)."""

    filename: str
    latest: str
    sharded: bool


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
    existing = _checkpoints(folder, names)
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


def repair_latest(folder: Path, names: SaveNames, rank: int = 0) -> list[str]:
    """Makes ``latest`` point to the newest complete checkpoint; damaged ones are renamed to ``damaged-...``.

    Returns:
        Sentences about what was found wrong and done; empty when all was well.
    """
    latest = folder / names.latest.replace('{rank}', str(rank))
    if '{' in latest.name or not folder.is_dir():
        return []
    if latest.exists() and damage(latest.resolve()) is None:
        return []
    notes = []
    for candidate in _checkpoints(folder, names):
        reason = damage(candidate)
        if reason is None:
            latest.unlink(missing_ok=True)
            latest.symlink_to(os.path.relpath(candidate, latest.parent))
            notes.append(f'autoresume: {latest.name} now names {candidate.name}, the newest complete checkpoint')
            return notes
        aside = candidate.with_name(SET_ASIDE_PREFIX + candidate.name)
        candidate.rename(aside)
        notes.append(f'autoresume: {candidate.name} is damaged ({reason}); renamed to {aside.name}')
    if latest.is_symlink() or latest.exists():
        latest.unlink()
        notes.append(f'autoresume: no complete checkpoint is left in {folder}; the run starts from the beginning')
    return notes


def _checkpoints(folder: Path, names: SaveNames) -> list[Path]:
    """The run's checkpoints, newest first by batch (by time where the pattern has no batch)."""
    pattern = SHARDED_FOLDER if names.sharded else names.filename
    parts = re.split(r'(\{\w+\})', pattern)
    regex = re.compile(''.join(_field_regex(p, parts[:i]) if p.startswith('{') else re.escape(p) for i, p in enumerate(parts)))
    depth = pattern.count('/')
    found = []
    for path in folder.glob('/'.join(['*'] * (depth + 1))):
        match = regex.fullmatch(str(path.relative_to(folder)))
        if match and not path.is_symlink():
            found.append((int(match.groupdict().get('batch') or 0), path.stat().st_mtime, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _field_regex(field: str, before: list[str]) -> str:
    name = field[1:-1]
    numeric = name != 'run_name'
    value = r'\d+' if numeric else r'[^/]+'
    return f'(?P<{name}>{value})' if field not in before else f'(?P={name})'


def _problem(message: str) -> ConfigError:
    return ConfigError([ConfigProblem('save_folder', message)])
