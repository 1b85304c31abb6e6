"""Which checkpoint a run starts from: the newest whole one of its own (``autoresume``), else ``load_path``, else none.

Decided once, before data and model are built, by all ranks together: rank 0 lists, all share the reading of checksums, and every rank gets the same answer or the same error. A rank that fails
alone, or takes another checkpoint than the rest, would leave the others waiting until ``dist_timeout``. Composer's own search, which trusts the link ``latest``, is not used. Local
checkpoints that are damaged are renamed to ``damaged-...``; nothing is deleted.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from llmfoundry import dist
from llmfoundry.checkpoint.integrity import damage_over_ranks
from llmfoundry.checkpoint.local_path import fill_ranks, follow, unreadable
from llmfoundry.checkpoint.safe_load import SAFE_CLASSES_VARIABLE, allowed_classes
from llmfoundry.command_utils import remote_resumption as remote
from llmfoundry.command_utils.save_folder import SaveNames, find_checkpoints, local_folder, point_latest, set_aside
from llmfoundry.config.train import TrainConfig
from llmfoundry.errors import CheckpointError, ConfigError, ConfigProblem

__all__ = ['newest_local', 'settle_start']


def settle_start(cfg: TrainConfig, names: SaveNames) -> tuple[TrainConfig, list[str]]:
    """The config with ``load_path`` set to what the run starts from, and notes to print; a collective call.

    A checkpoint of the run itself is loaded in full: ``load_weights_only`` and ``load_ignore_keys`` are about the start of the run, not about its continuation.

    Raises:
        ConfigError: ``load_path`` does not exist, or the nodes have no checkpoint in common.
        CheckpointError: the checkpoint in ``load_path`` is damaged.
        UnsafeCheckpointError: it would have to run code to be read.
    """
    _check_safe_classes()
    if cfg.autoresume and cfg.save_folder is not None:
        folder = local_folder(cfg.save_folder, cfg.run_name)
        found, notes = newest_local(folder, names) if folder is not None else remote.newest_remote(cfg.save_folder, cfg.run_name, names)
        if found is not None:
            return cfg.model_copy(update={'load_path': str(found), 'load_weights_only': False, 'load_ignore_keys': None}), notes
        cfg, more = _settle_load_path(cfg, names)
        return cfg, notes + more
    return _settle_load_path(cfg, names)


def _check_safe_classes() -> None:
    try:
        with allowed_classes():
            return
    except ValueError as e:
        raise ConfigError([ConfigProblem(SAFE_CLASSES_VARIABLE, str(e).partition(': ')[2])]) from e


def newest_local(folder: Path, names: SaveNames) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in ``folder`` that is whole on every node, and sentences about what was found wrong and done.

    Raises:
        ConfigError: the nodes' folders are not the same one, and no checkpoint is on all of them.
        UnsafeCheckpointError: a checkpoint would have to run code to be read.
    """
    listings = _listings(folder, names)
    same = listings is None
    own = [path.relative_to(folder).as_posix() for path in find_checkpoints(folder, names)] if folder.is_dir() else []
    candidates = dist.on_rank_zero(lambda: own)
    notes = []
    if listings is not None:
        on_any = sorted({name for listing in listings for name in listing})
        candidates = [name for name in candidates if all(name in listing for listing in listings)]
        if on_any and not candidates:
            raise ConfigError([ConfigProblem(
                'save_folder', f'{str(folder)!r} is another folder on each node, and none of the {len(on_any)} checkpoints in them ({", ".join(on_any[-3:])}) is on all {len(listings)} nodes. '
                'Use a folder on a shared file system or a remote one (s3://...), or copy the newest checkpoint to every node.',
            )])
        if on_any:
            notes.append(f'autoresume: save_folder is not shared by the {len(listings)} nodes; of {len(on_any)} checkpoints {len(candidates)} are on all of them, and the newest of these counts')
    chosen = None
    for name in candidates:
        reason = damage_over_ranks(folder / name, same_files=same)
        if reason is None:
            chosen = folder / name
            break
        notes.append(f'autoresume: {name} is damaged ({reason}); renamed to {_set_aside_everywhere(folder / name, same)}')
    changed = dist.on_rank_zero(lambda: folder.is_dir() and point_latest(folder, names, chosen))
    if chosen is not None and changed:
        notes.append(f'autoresume: {names.latest} now names {chosen.name}, the newest whole checkpoint'.replace('{rank}', '0'))
    if chosen is None and notes:
        notes.append(f'autoresume: no whole checkpoint is left in {folder}; the run starts from the beginning')
    return chosen, notes


def _listings(folder: Path, names: SaveNames) -> list[list[str]] | None:
    """The checkpoints that each node sees; None if all see the same folder (or there is one node)."""
    nodes = max(1, dist.get_world_size() // max(1, dist.get_local_world_size()))
    if nodes == 1 or not dist.is_initialized():
        return None
    probe = dist.on_rank_zero(lambda: _leave_probe(folder))
    listing = [path.relative_to(folder).as_posix() for path in find_checkpoints(folder, names)] if folder.is_dir() else []
    views = dist.all_gather_objects((dist.get_node_rank(), probe.exists(), listing))
    dist.on_rank_zero(lambda: probe.unlink(missing_ok=True))
    if all(sees for _, sees, _ in views):
        return None
    return list({node: listing for node, _, listing in views}.values())


def _leave_probe(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.is-shared-{uuid.uuid4().hex}'
    probe.touch()
    return probe


def _set_aside_everywhere(path: Path, same_files: bool) -> str:
    """Renames a checkpoint, on every node if each has its own; returns the new name."""
    new = set_aside(path).name if (dist.get_global_rank() if same_files else dist.get_local_rank()) == 0 else None
    return next(name for name in dist.all_gather_objects(new) if name is not None)


def _settle_load_path(cfg: TrainConfig, names: SaveNames) -> tuple[TrainConfig, list[str]]:
    """Checks that ``load_path`` exists and is whole; a remote sharded folder is fetched where Composer cannot read it from afar."""
    if cfg.load_path is None:
        return cfg, []
    path = cfg.load_path.replace('{run_name}', cfg.run_name or '{run_name}')
    if remote.is_remote(path):
        local, notes = remote.fetch_named(path, names)
        return cfg.model_copy(update={'load_path': local}), notes
    path = fill_ranks(path)
    problem = next((p for p in dist.all_gather_objects(unreadable(path)) if p), None)
    if problem is not None:
        raise ConfigError([ConfigProblem('load_path', problem)])
    target = Path(follow(path))
    reason = damage_over_ranks(target, same_files=False)
    if reason is not None:
        raise CheckpointError(f'load_path: {path!r} is damaged: {reason}. Copy it again, or name an older checkpoint.')
    return cfg.model_copy(update={'load_path': str(target)}), []
