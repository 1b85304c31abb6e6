"""Carries the proof of what was trained on in the checkpoint, and checks it before a resumed run makes its first step.

Nothing is communicated during training: each rank keeps eight bytes and a count for each step, and the ranks add them up when a checkpoint is saved. See ``data.sample_chain`` for the mathematics.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import numpy as np
import torch
from composer.core import Callback, State
from composer.loggers import Logger

from llmfoundry import dist
from llmfoundry.data.sample_chain import ChainRecord, combine, digest_of_ids, explain_difference, words
from llmfoundry.data.sample_ids import flat_ids
from llmfoundry.errors import DataError

__all__ = ['SampleChain']

log = logging.getLogger(__name__)

# Steps that a run without checkpoints keeps before the ranks add them up.
_MOST_PENDING = 4096
IGNORE_VARIABLE = 'LLMFOUNDRY_IGNORE_SAMPLE_CHAIN'


class SampleChain(Callback):
    """Records the samples of every step, and compares them on resumption with those that the present data, settings and ranks would have given.

    Raises:
        DataError: (a ValueError) where a run is resumed in mid-epoch: the first step that differs, and what changed. Between epochs data may change, and a warning tells.
    """

    def __init__(self) -> None:
        self.record: ChainRecord | None = None
        self._loaded: ChainRecord | None = None
        self._pending: list[tuple[int, int]] = []
        self._plan: Any = None
        self._is_off = False

    def fit_start(self, state: State, logger: Logger) -> None:
        """Checks the record of the checkpoint, and goes on with it."""
        del logger
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        plan = _plan_of(state)
        if plan is None or loaded.last_step != int(state.timestamp.batch):
            log.info('The checkpoint has a chain of sample ids up to step %d, which is not where this run begins or not of this kind of data: it is not compared', loaded.last_step)
            return
        difference, is_ignored = dist.on_rank_zero(lambda: (explain_difference(loaded, plan), bool(os.environ.get(IGNORE_VARIABLE))))
        self.record, self._plan = loaded, plan
        if difference is None:
            if loaded.skipped is not None:
                log.info('Samples: steps %d to %d were trained on the samples that the %d ranks of this run would have taken', loaded.first_step + 1, loaded.last_step, dist.get_world_size())
        elif int(state.timestamp.batch_in_epoch) == 0:
            # No epoch is left half done, so none is repeated; curricula, and callbacks that exchange the data, resume like this.
            log.warning('The epoch that begins has other samples than the one before the checkpoint had: %s', difference)
        elif is_ignored:
            log.warning('%s is set, so training goes on in mid-epoch with other samples: %s', IGNORE_VARIABLE, difference)
            self.record = ChainRecord(loaded.epoch, loaded.last_step, None, loaded.value, facts=_facts(plan))
        else:
            raise DataError(
                f'train_loader: the samples are not those that the checkpoint was trained on: {difference}\n'
                f'To go on exactly, restore what changed. To go on with other samples on purpose, set the environment variable {IGNORE_VARIABLE}=1 (training goes on at the same position in the data), '
                'or use load_path and load_weights_only: true (the data begin anew)',
            )

    def batch_end(self, state: State, logger: Logger) -> None:
        """Keeps the digest of this rank's part of the step."""
        del logger
        if self._is_off:
            return
        ids, plan = flat_ids(state.batch), _plan_of(state)
        if ids is None or plan is None:
            self._turn_off()
            return
        in_epoch = int(state.timestamp.batch_in_epoch)
        # Callbacks may exchange the data in mid-epoch.
        if self.record is None or in_epoch == 1 or plan is not self._plan:
            self._begin(plan, first_step=int(state.timestamp.batch) - 1, skipped=0 if in_epoch == 1 else None)
        # Of ranks that read the same samples, one counts.
        counts = dist.get_global_rank() % (getattr(plan, 'replication', None) or 1) == 0
        self._pending.append((digest_of_ids(ids), len(ids)) if counts else (0, 0))
        if len(self._pending) >= _MOST_PENDING:
            self._add_up()

    def _turn_off(self) -> None:
        if dist.get_global_rank() == 0:
            log.warning(
                'train_loader: no chain of sample ids is kept, so a resumed run cannot check that it goes on with the same samples: the batches have no sample_ids (a loader or collator of a plug-in), or '
                'their samples depend on the number of ranks (a batching_method other than random)',
            )
        self._is_off, self.record, self._pending = True, None, []

    def _begin(self, plan: Any, first_step: int, skipped: int | None) -> None:
        """Begins the record of an epoch, which continues the chain."""
        self._add_up()
        before = self.record.value if self.record is not None else '00' * 16
        self.record, self._plan = ChainRecord(plan.epoch_at_hand(), first_step, skipped, before, facts=_facts(plan)), plan

    def _add_up(self) -> None:
        """Adds up the steps of all ranks. Collective where there is something to add, which every rank knows alike."""
        if self.record is None or not self._pending:
            return
        digests, counts = zip(*self._pending, strict=True)
        self._pending = []
        self.record.extend(*combine(_sum_over_ranks(words(digests, counts))))

    def state_dict(self) -> dict[str, Any]:
        """One text, whatever there is to save. Called by every rank, as the rest of the state is."""
        self._add_up()
        if self.record is not None and hasattr(self._plan, 'probes') and dist.get_local_rank() == 0:
            self.record.probes = self._plan.probes()
        return {'record': self.record.to_text() if self.record is not None else ''}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the record until the data are at hand.

        Raises:
            DataError: the record is damaged.
        """
        try:
            self._loaded = ChainRecord.from_text(state['record']) if state.get('record') else None
        except (ValueError, KeyError, TypeError) as e:
            raise DataError(f"the chain of sample ids in the checkpoint is damaged: {e}. Resume from another checkpoint, or name this one as load_path with load_ignore_keys: ['state/callbacks/SampleChain*']") from e


def _facts(plan: Any) -> dict[str, Any]:
    """What the samples depend on, with the settings of the checkpoint where they win over the config's."""
    return {**plan.facts(), **getattr(plan, 'in_force', {})}


def _plan_of(state: State) -> Any:
    """The data set of the training loader, if it can say which samples it gives."""
    dataset = getattr(state.train_dataloader, 'dataset', None)
    known = hasattr(dataset, 'sample_order') and getattr(dataset, 'is_elastic', True)
    return dataset if known else None


def _sum_over_ranks(values: np.ndarray) -> np.ndarray:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    device = 'cuda' if torch.distributed.get_backend() == 'nccl' else 'cpu'
    tensor = torch.from_numpy(values).to(device)
    torch.distributed.all_reduce(tensor)
    return tensor.cpu().numpy()
