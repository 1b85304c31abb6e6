"""Rows of a token store in batches: which examples share a row, which rows make a global batch, and where a resumed run goes on.

Everything is decided from indices by pure functions of the seed and the epoch, in the main process; loader workers are handed row numbers and only fetch them. So every example comes exactly once per
epoch, and the global batches are the same for any number of ranks and workers and after an interruption. The rows are packed once, for all epochs; an epoch shuffles rows, not examples, which keeps
its number of batches constant.
"""

from __future__ import annotations

import logging
import zlib
from typing import Any, Iterator, Protocol

import numpy as np
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from llmfoundry import dist
from llmfoundry.data.batch_stats import CROSS_ENTROPY_IGNORE_INDEX
from llmfoundry.data.finetuning.collator import Document, PackedRow
from llmfoundry.data.packing import DEFAULT_WINDOW, Bins, best_fit, pack_in_batches

__all__ = ['ExampleStore', 'GlobalBatchSampler', 'PackedDataset', 'PackedLoader', 'batch_of_rank', 'epoch_order', 'num_batches', 'plan_rows']

log = logging.getLogger(__name__)

# Seeds the order in which examples are packed; apart from those of the epochs, which are 0 or more.
_PACKING_STREAM = 1 << 32


class ExampleStore(Protocol):
    """What is needed of a ``TokenStore``."""

    lengths: np.ndarray
    digest: str
    source: str

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and targets of an example."""
        ...


def epoch_order(num_rows: int, shuffle: bool, seed: int, epoch: int) -> np.ndarray:
    """The order of rows in an epoch, int64 ``(rows,)``: a permutation that depends on nothing but the arguments."""
    if not shuffle:
        return np.arange(num_rows)
    return np.random.default_rng([seed, epoch]).permutation(num_rows)


def num_batches(num_rows: int, global_rows: int, drop_last: bool) -> int:
    """Batches that ``num_rows`` rows make."""
    return num_rows // global_rows if drop_last else -(-num_rows // global_rows)


def batch_of_rank(order: np.ndarray, batch: int, global_rows: int, rank: int, world_size: int) -> list[int]:
    """The rows of one rank in a global batch; -1 stands for a row without documents.

    A last batch that is not full is spread over all ranks, so that none is left without work; they differ by at most one row, which is filled up with -1.
    """
    rows = order[batch * global_rows : (batch + 1) * global_rows]
    if len(rows) == global_rows:
        share = global_rows // world_size
        return rows[rank * share : (rank + 1) * share].tolist()
    mine = np.array_split(rows, world_size)[rank].tolist()
    return mine + [-1] * (-(-len(rows) // world_size) - len(mine))


def plan_rows(lengths: np.ndarray, capacity: int, packing: float | str | None, global_rows: int, shuffle: bool, seed: int, window: int = DEFAULT_WINDOW) -> Bins:
    """Which examples share a row.

    Args:
        lengths: tokens of each example.
        capacity: tokens of a row.
        packing: None for one example in each row; ``'full'`` for as many as fit, by best fit; a number for that many examples per row and batch (see ``pack_in_batches``).
        global_rows: rows of a batch over all devices; matters only for a number.
        shuffle: pack neighbours of a random order, rather than of the source's.
        seed: of that order.
        window: examples packed together.
    """
    if packing is None:
        return Bins.singles(len(lengths))
    order = epoch_order(len(lengths), shuffle, seed, _PACKING_STREAM)
    if packing == 'full':
        bins = best_fit(lengths[order], capacity, window)
    else:
        ratio = float(packing)
        plan = pack_in_batches(lengths[order], capacity, global_rows, ratio)
        if plan.ratio < 0.98 * int(global_rows * ratio) / global_rows:
            log.warning(
                'dataset.packing_ratio: %g examples per row do not fit into %d tokens; %.2f do. Nothing is dropped: what does not fit goes into the next batch, so an epoch has more batches. '
                'Set packing: true to fill rows as far as possible without a number', ratio, capacity, plan.ratio,
            )  # fmt: skip
        bins = plan.bins
    return Bins(order[bins.order], bins.offsets)


class PackedDataset(Dataset):
    """Rows of examples, by number.

    Args:
        store: the examples.
        bins: the examples of each row.
        max_seq_len: tokens of a row, which Composer asks a dataset for.
        as_examples: items are ``{'input_ids', 'labels'}`` with -100 in the labels, one example each, for the collators of plug-ins.
    """

    def __init__(self, store: ExampleStore, bins: Bins, max_seq_len: int, as_examples: bool = False) -> None:
        self.store = store
        self.bins = bins
        self.max_seq_len = max_seq_len
        self.as_examples = as_examples
        self.sampler: GlobalBatchSampler | None = None

    def __len__(self) -> int:
        """Rows of an epoch over all ranks."""
        return len(self.bins)

    def __getitem__(self, row: int) -> PackedRow | dict[str, np.ndarray]:
        examples = self.example_ids(row)
        documents = tuple(Document(*self.store.row(example)) for example in examples)
        if not self.as_examples:
            return PackedRow(documents, tuple(examples))
        # A plug-in knows no row without documents; it gets an example without a target.
        ids, targets = documents[0] if documents else Document(self.store.row(0)[0][:1], np.zeros(1, dtype=bool))
        return {'input_ids': ids.astype(np.int64), 'labels': np.where(targets, ids, CROSS_ENTROPY_IGNORE_INDEX).astype(np.int64)}

    def example_ids(self, row: int) -> list[int]:
        """Numbers, in the store, of the examples of a row; none for -1."""
        return self.bins.bin(row).tolist() if row >= 0 else []

    def sample_order(self, epoch: int) -> np.ndarray:
        """Numbers of the examples of an epoch in the order of training, int64: row by row."""
        assert self.sampler is not None
        rows = epoch_order(len(self), self.sampler.shuffle, self.sampler.seed, epoch)
        starts = self.bins.offsets[rows]
        sizes = self.bins.offsets[rows + 1] - starts
        # (examples,): begin of the row in the plan, plus how many examples of the row come before.
        return self.bins.order[np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))]

    def epoch_at_hand(self) -> int:
        """Number of the epoch that is being read."""
        assert self.sampler is not None
        return self.sampler.epoch

    def facts(self) -> dict[str, Any]:
        """What the examples of a step depend on, under the names of the config."""
        assert self.sampler is not None
        return {
            'data source': 'token store', 'data digest': self.store.digest, 'examples': len(self.store.lengths), 'max_seq_len': self.max_seq_len, 'shuffle': self.sampler.shuffle, 'shuffle_seed': self.sampler.seed,
            'rows per epoch': len(self), 'packing plan': self.digest.partition('-')[2], 'rows per step': self.sampler.global_rows,
        }  # fmt: skip

    @property
    def fill(self) -> float:
        """Share of the positions of all rows that hold a token."""
        return float(self.store.lengths.sum()) / max(1, len(self) * self.max_seq_len)

    @property
    def digest(self) -> str:
        """Changes with the examples and with which of them share a row."""
        return f'{self.store.digest}-{zlib.crc32(self.bins.offsets.tobytes(), zlib.crc32(self.bins.order.tobytes())):08x}'

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Where training stands, for a checkpoint; called by Composer.

        Args:
            num_samples: rows trained, over all ranks.
            from_beginning: counted from the beginning of the epoch, rather than of the present iteration.
        """
        assert self.sampler is not None
        return self.sampler.state_dict(num_samples, from_beginning)

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Makes the next iteration go on where ``state`` was saved; called by Composer."""
        assert self.sampler is not None
        self.sampler.load_state_dict(state)


class GlobalBatchSampler(DistributedSampler):
    """The row numbers of this rank's batches, batch by batch.

    Composer sets the epoch of a DistributedSampler, and asks for nothing else of one. Without Composer, epochs follow each other.

    Args:
        dataset: the rows.
        device_rows: rows of a batch on each device.
        shuffle: another order each epoch.
        seed: of the order.
        drop_last: leave out a last batch that is not full.
        rank: of this process; of this run by default.
        world_size: of the run; of this run by default.
    """

    def __init__(self, dataset: PackedDataset, device_rows: int, shuffle: bool, seed: int, drop_last: bool, rank: int | None = None, world_size: int | None = None) -> None:
        world_size = dist.get_world_size() if world_size is None else world_size
        rank = dist.get_global_rank() if rank is None else rank
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        # Nothing is repeated to fill ranks up, so Composer has nothing to take off again in evaluation.
        self.total_size = len(dataset)
        self.rows = dataset
        self.global_rows = device_rows * world_size
        dataset.sampler = self
        self._epoch_was_set = False
        # The iteration at hand: its first row, and how many batches the loader has handed out (workers ask for more in advance).
        self._first_row = 0
        self._batches_out: int | None = None
        self._loaded: dict[str, int] | None = None
        self._was_resumed = False

    def __len__(self) -> int:
        """Batches of a whole epoch, the same in every epoch and on every rank."""
        return num_batches(len(self.rows), self.global_rows, self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next iteration."""
        if self._was_resumed and self._batches_out is not None and epoch == self.epoch and not self._is_finished():
            # Composer skips what it has trained when it fits again in mid-epoch, but not after a resumption, where it leaves that to the dataset.
            self._loaded = {'epoch': epoch, 'row': self._first_row + self._batches_out * self.global_rows}
        self.epoch = epoch
        self._epoch_was_set = True

    def __iter__(self) -> Iterator[list[int]]:
        if not self._epoch_was_set:
            if self._loaded is not None:
                self.epoch = self._loaded['epoch']
            elif self._batches_out is not None and self._is_finished():
                self.epoch += 1
        self._epoch_was_set = False
        loaded, self._loaded = self._loaded, None
        self._first_row = min(loaded['row'], len(self.rows)) if loaded is not None and loaded['epoch'] == self.epoch else 0
        self._batches_out = 0
        order = epoch_order(len(self.rows), self.shuffle, self.seed, self.epoch)[self._first_row :]
        for batch in range(num_batches(len(order), self.global_rows, self.drop_last)):
            yield batch_of_rank(order, batch, self.global_rows, self.rank, self.num_replicas)

    def count_batch(self) -> None:
        """Notes that the loader hands out a batch."""
        self._batches_out = (self._batches_out or 0) + 1

    def _is_finished(self) -> bool:
        return (self._batches_out or 0) >= num_batches(len(self.rows) - self._first_row, self.global_rows, self.drop_last)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """See ``PackedDataset.state_dict``."""
        row = num_samples if from_beginning else self._first_row + num_samples
        # At the end of an epoch Composer counts from 0 again, before it sets the next epoch.
        ended = row == 0 and self._batches_out is not None and self._is_finished()
        return {'epoch': self.epoch + 1 if ended else self.epoch, 'row': row, 'rows': len(self.rows), 'digest': self.rows.digest, 'shuffle': self.shuffle, 'seed': self.seed}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """See ``PackedDataset.load_state_dict``. The state of other data, or of other rows, is a position in nothing: the epoch begins anew, with a warning."""
        self._was_resumed = True
        present = self.state_dict(0, True)
        differing = [key for key in ('rows', 'digest', 'shuffle', 'seed') if (state or {}).get(key) != present[key]]
        if state is None or 'row' not in state or differing:
            was = f'{differing[0]} was {state.get(differing[0])!r} and is {present[differing[0]]!r}' if state and 'row' in state else 'it holds no position of a finetuning dataset'
            log.warning(
                'The checkpoint was saved with other data, or with other rows of the same data (%s), so its position does not apply: this epoch begins with its first row. '
                'To go on exactly, keep the data, max_seq_len, shuffle, shuffle_seed and the packing as they were%s', was, ', and with a packing_ratio also the global batch size',
            )  # fmt: skip
            return
        self._loaded = {'epoch': int(state['epoch']), 'row': int(state['row'])}
        self.epoch = self._loaded['epoch']


class PackedLoader(DataLoader):
    """A DataLoader over a ``GlobalBatchSampler`` that tells it what has been handed out.

    Args:
        dataset: the rows; its sampler makes the batches.
        **arguments: every other argument of a DataLoader.
    """

    def __init__(self, dataset: PackedDataset, **arguments: Any) -> None:
        assert dataset.sampler is not None
        self._sampler = dataset.sampler
        super().__init__(dataset, batch_sampler=dataset.sampler, **arguments)
        # Composer's search for a microbatch size starts from it; torch leaves it None beside a batch_sampler, and refuses to have it set later.
        object.__setattr__(self, 'batch_size', dataset.sampler.global_rows // dataset.sampler.num_replicas)

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            self._sampler.count_batch()
            yield batch
