"""A sharded checkpoint in two parts: planning, which needs all ranks at the same time, and writing, which does not.

The steps are those of ``torch.distributed.checkpoint.save`` and use its planner and writer, so the folder is the same. That function runs them in one call with collectives at both ends;
its own ``async_save`` runs those in a thread, which is not sound while the main thread uses the same group.
"""

from __future__ import annotations

import contextlib
import inspect
import shutil
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.utils import _DistWrapper

from llmfoundry.checkpoint.atomic_files import failed_write
from llmfoundry.checkpoint.integrity import seal, unseal
from llmfoundry.checkpoint.metadata_file import METADATA_FILE
from llmfoundry.whole_files import flush_folder

__all__ = ['ShardedSave']


class ShardedSave:
    """Plans at once; every rank of ``group`` must be here. What goes wrong then is raised by ``write``, in the rank's own time.

    Args:
        folder: of the checkpoint; local to the rank or shared.
        state_dict: this rank's part; must not change until ``write`` has returned.
        planner: torch's planner; by default one that stores replicated values once.
        group: the ranks that save; None for all.
    """

    def __init__(self, folder: Path, state_dict: dict[str, Any], planner: Any = None, group: ProcessGroup | None = None) -> None:
        self.folder = folder
        self.planner = planner or DefaultSavePlanner(dedup_save_to_lowest_rank=True)
        self.writer = dcp.FileSystemWriter(folder)
        self.metadata: Any = None
        self.plan: Any = None
        self.error: BaseException | None = None
        ranks = _DistWrapper(group, True, 0)

        def local_plan() -> Any:
            if ranks.is_coordinator:
                # Without these two, a kill while an older checkpoint of that name is written over would leave its metadata beside new bytes.
                unseal(folder)
                (folder / METADATA_FILE).unlink(missing_ok=True)
            kwargs = {'storage_meta': self.writer.storage_meta()} if 'storage_meta' in inspect.signature(self.planner.set_up_planner).parameters else {}
            self.planner.set_up_planner(state_dict=state_dict, is_coordinator=ranks.is_coordinator, **kwargs)
            with_ranks = 'kwargs' in inspect.signature(self.writer.set_up_storage_writer).parameters
            self.writer.set_up_storage_writer(ranks.is_coordinator, **({'rank': ranks.rank, 'use_collectives': True} if with_ranks else {}))
            return self.writer.prepare_local_plan(self.planner.create_local_plan())

        def global_plan(plans: list[Any]) -> list[Any]:
            plans, self.metadata = self.planner.create_global_plan(plans)
            return self.writer.prepare_global_plan(plans)

        try:
            self.plan = ranks.reduce_scatter('plan', local_plan, global_plan)
        except CheckpointException as e:
            self.error = e

    def write(self) -> list[Any]:
        """Writes this rank's files and flushes them; returns where each item lies.

        Raises:
            CheckpointError: full disk and the like.
        """
        try:
            if self.error is not None:
                raise self.error
            written = self.writer.write_data(self.planner.finish_plan(self.plan), self.planner)
            written.wait()
            return list(written.value())
        except CheckpointException as e:  # torch's, which every rank gets when the plan of one has failed
            causes = [cause for cause, _ in e.failures.values()]
            if not all(isinstance(cause, OSError | RuntimeError) for cause in causes):
                raise
            raise failed_write(str(self.folder), causes[0]) from e
        except (OSError, RuntimeError) as e:
            raise failed_write(str(self.folder), e, self._size()) from e

    def complete(self, written: list[list[Any]]) -> None:
        """Writes ``.metadata``, which makes the folder a checkpoint; called by the rank that planned, with what all have written.

        Raises:
            CheckpointError: full disk and the like.
        """
        try:
            self.writer.finish(self.metadata, [results for results in written if results is not None])
            seal(self.folder)
            flush_folder(self.folder)
        except (OSError, RuntimeError) as e:
            raise failed_write(str(self.folder), e, self._size()) from e

    def remove(self) -> None:
        """Removes the folder, when no rank writes to it any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _size(self) -> int:
        with contextlib.suppress(OSError):
            return sum(p.stat().st_size for p in self.folder.iterdir() if p.is_file())
        return 0
