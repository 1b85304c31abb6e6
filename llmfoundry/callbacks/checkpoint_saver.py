"""Composer's checkpoint saver, with writes that are whole or absent and that training does not wait for.

Composer writes straight to the final name, so a run killed in that moment leaves a file that looks like a checkpoint and fails when it is needed; and it trains on only when the last byte
is on the disk. Here training waits for a copy of the state in host memory; a thread writes it to a hidden name, flushes, renames, moves ``latest``, uploads and deletes what is not to be
kept, in that order (see docs/saving.md). Names and layout stay Composer's.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, Callable, Sequence

import torch
from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import Logger
from composer.utils import checkpoint as composer_checkpoint
from composer.utils import format_name_with_dist, reproducibility
from composer.utils.misc import ParallelismType

from llmfoundry import dist, phases
from llmfoundry.callbacks.save_target import SaveTarget, remove_staged
from llmfoundry.checkpoint.atomic_files import INCOMPLETE_PREFIX, write_atomically
from llmfoundry.checkpoint.output_mirror import OutputMirror
from llmfoundry.checkpoint.save_job import SaveJob
from llmfoundry.checkpoint.sharded_save import ShardedSave
from llmfoundry.checkpoint.staging import Stager, staged_bytes

__all__ = ['INCOMPLETE_PREFIX', 'AtomicCheckpointSaver', 'write_atomically']

# The copy, and room for what pickling and the rest of the process take meanwhile.
ROOM_FACTOR = 1.2


class AtomicCheckpointSaver(CheckpointSaver):
    """``CheckpointSaver`` for local and remote folders.

    Args:
        in_background: train on while a checkpoint is written.
        free_bytes: says how much host memory this process may still take.
        remote: URI that checkpoints are uploaded to; ``folder`` then holds them only until they are there.
        mirrors: ``additional_output_paths``.
        patience_s: how long rank 0 waits for news of the other ranks.
        kwargs: Composer's arguments.
    """

    def __init__(
        self, *, in_background: bool = True, free_bytes: Callable[[], int] | None = None, remote: str | None = None, mirrors: Sequence[str] = (), patience_s: float = 600.0, **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.in_background, self.free_bytes, self.patience_s = in_background, free_bytes, patience_s
        self._remote, self._mirrors = remote, mirrors
        self.target: SaveTarget | None = None
        self._stager = Stager()
        self._job: SaveJob | None = None
        self._saving = ''
        self._fitting = False
        self._told: set[str] = set()

    def init(self, state: State, logger: Logger) -> None:
        if self._remote is not None and dist.get_local_rank() == 0:
            remove_staged(Path(self.folder))  # of a run that was killed in an upload
        dist.barrier()
        super().init(state, logger)
        folder = Path(format_name_with_dist(self.folder, state.run_name))
        remote = None if self._remote is None else format_name_with_dist(self._remote, state.run_name)
        mirror = OutputMirror(folder, [format_name_with_dist(m, state.run_name) for m in self._mirrors]) if self._mirrors else None
        self.target = SaveTarget(folder, remote, logger, self.num_checkpoints_to_keep, mirror)
        dist.on_rank_zero(self.target.prepare)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.target is not None:
            self.target.adopt(self.all_saved_checkpoints_to_timestamp)

    def fit_start(self, state: State, logger: Logger) -> None:
        super().fit_start(state, logger)
        if self._remote is not None and not self.overwrite and state.timestamp.batch == 0:
            assert self.target is not None
            dist.on_rank_zero(self.target.refuse_used_folder)
        self._fitting = True

    @property
    def is_saving(self) -> bool:
        """Whether a save is in flight, as far as this rank has noticed."""
        return self._job is not None

    def batch_end(self, state: State, logger: Logger) -> None:
        """Looks whether the save in flight has ended; if it failed, every rank raises here."""
        del state, logger
        if self._job is not None and self._job.ended():
            self._settle()

    def fit_end(self, state: State, logger: Logger) -> None:
        del state, logger
        with phases.phase('checkpoint'):
            self._settle()
        self._fitting = False

    def close(self, state: State, logger: Logger) -> None:
        """Also called when training has failed: waits for what is in flight."""
        del state, logger
        self.wait()
        if self.target is not None:
            self.target.close()

    def wait(self) -> None:
        """Waits for the save in flight, if there is one, without asking the other ranks, who may be gone."""
        if self._job is not None:
            self._job.wait()

    def post_close(self) -> None:
        """Nothing is left to do, and Composer's own would look for its uploader."""

    def finish(self) -> None:
        """Waits for the save in flight, then for the copies in ``additional_output_paths``, at the end of a run; every rank must call it.

        Raises:
            CheckpointError: on every rank, the last checkpoint or a copy is not where it should be.
        """
        with phases.phase('checkpoint'):
            self._settle()
            if self.target is not None and self.target.mirror is not None:
                dist.on_rank_zero(self.target.finish)

    def _settle(self) -> None:
        """Waits for the save in flight and takes note of it; every rank must be here.

        Raises:
            CheckpointError: it failed; the same on every rank.
        """
        job, self._job = self._job, None
        if job is None:
            return
        job.wait()
        job.raise_if_failed()
        assert self.target is not None
        if self._saving:
            self.saved_checkpoints.append(self._saving)
        for key in self.target.take_removed():
            self.all_saved_checkpoints_to_timestamp.pop(key, None)
        self.saved_checkpoints[:] = [path for path in self.saved_checkpoints if self.target.is_remote or Path(path).exists()]

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        with phases.phase('checkpoint'):
            self._settle()
            torch.cuda.empty_cache()
            self.last_checkpoint_batch = state.timestamp.batch
            pattern = self.filename.format(state, keep_placeholders=True)
            path = composer_checkpoint.get_save_filename(state, pattern)
            assert self.target is not None
            # Before saving, so that a checkpoint knows of itself.
            key = self.target.key_of(path)
            self.all_saved_checkpoints_to_timestamp[key] = state.timestamp
            state_dict = _state_dict(state, self.weights_only, self.ignore_keys)
            saves, group = _who_saves(state)
            staged = self._stage(state_dict) if saves else {}
            in_background = dist.all_reduce_min(int(staged is not None)) == 1
            latest = self.latest_filename.format(state) if self.latest_filename is not None else None
            self._job = self._start(state, path, (key, latest), (staged if in_background else state_dict) if saves else None, group)
            self._saving = path if saves else ''
            if not in_background:
                self._settle()

    def _start(self, state: State, path: str, names: tuple[str, str | None], state_dict: dict[str, Any] | None, group: Any) -> SaveJob:
        """The parts of a save, as the ranks' threads run them. ``names``, key and link, were made before, since the time goes on."""
        assert self.target is not None
        target = self.target
        if state.fsdp_sharded_state_dict_enabled:
            assert state.fsdp_config is not None
            folder = Path(path).parent
            save = None if state_dict is None else ShardedSave(folder, state_dict, state.fsdp_config.save_planner, group)

            def write_shards() -> Any:
                if save is None:
                    return None
                written = save.write()
                target.send_parts(sorted({folder / info.storage_data.relative_path for info in written}))
                return written

            def complete(reports: list[Any]) -> None:
                assert save is not None
                save.complete(reports)
                target.publish(folder, *names)

            return SaveJob(write_shards, complete, lambda: save.remove() if save is not None else None, self.patience_s)

        def write_file() -> None:
            if state_dict is not None:
                write_atomically(composer_checkpoint._write_checkpoint_file, state_dict, path)
                target.send_parts([Path(path)])

        return SaveJob(write_file, lambda reports: target.publish(Path(path), *names), lambda: None, self.patience_s)

    def _stage(self, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """A copy to write in the background; None if the save is to block."""
        if not self.in_background or not self._fitting:
            return None
        needed, free = staged_bytes(state_dict) * ROOM_FACTOR - self._stager.held_bytes, self.free_bytes() if self.free_bytes is not None else None
        if free is not None and needed > free:
            self._say(f'save_async: a copy of the checkpoint needs {int(needed):,} bytes of host memory and {free:,} are free, so saving blocks training.')
            return None
        try:
            return self._stager.stage(state_dict, fresh=('integrations', 'metadata'))
        except (RuntimeError, TypeError, ValueError, copy.Error, pickle.PicklingError, MemoryError) as e:  # a plug-in's state that cannot be copied
            self._say(f'save_async: the state cannot be copied ({type(e).__name__}: {e}), so saving blocks training.')
            return None

    def _say(self, note: str) -> None:
        """Prints a note once per rank and kind."""
        kind = note.partition(':')[2][:20]
        if kind not in self._told:
            self._told.add(kind)
            print(note, flush=True)


def _state_dict(state: State, weights_only: bool, ignore_keys: Any) -> dict[str, Any]:
    """What Composer's ``save_checkpoint`` saves; every rank must be here, since a sharded model is gathered."""
    if weights_only:
        state_dict = {'state': {'model': state.get_model_state_dict(), 'integrations': state._get_integrations_state_dict(), 'metadata': state._get_state_metadata()}}
    else:
        state_dict = {'state': state.state_dict(), 'rng': reproducibility.get_rng_state()}
    if ignore_keys:
        (ignore_keys if callable(ignore_keys) else composer_checkpoint.glob_filter(ignore_keys))(state_dict)
        state_dict.setdefault('state', {})
    if state.fsdp_sharded_state_dict_enabled and not weights_only and dist.get_global_rank() > 0:
        state_dict.pop('rng', None)  # rank 0's holds those of all
    return state_dict


def _who_saves(state: State) -> tuple[bool, Any]:
    """Whether this rank writes, and with whom it plans: rank 0 alone; for shards all ranks, or of a hybrid mesh the first replica."""
    if not state.fsdp_sharded_state_dict_enabled:
        return dist.get_global_rank() == 0, None
    mesh = state.device_mesh
    replicate = ParallelismType.DATA_PARALLEL_REPLICATE.value
    if mesh is None or mesh.mesh_dim_names is None or replicate not in mesh.mesh_dim_names:
        return True, None
    first = mesh.get_local_rank(mesh_dim=mesh.mesh_dim_names.index(replicate)) == 0
    return first, mesh.get_group(1) if first else None
