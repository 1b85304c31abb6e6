"""A StreamingDataset whose global batches are the same for any number of nodes, ranks and workers, down to the last one of an epoch.

Streaming fixes the order of samples and then cuts it up by ranks and workers. Where an epoch is no whole number of batches, what it repeats to give every rank as many samples depends on their number:
103 samples in batches of 8 make 12 full batches for one rank and 13 for four. Here the order is made once, without ranks, cut into global batches, and only these are dealt to the ranks. The order itself
is Streaming's, so checkpoints of either go on with the other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from typing import Any, Iterator, NamedTuple

import numpy as np
from filelock import FileLock
from streaming.base.partition import get_partitions
from streaming.base.shuffle import get_shuffle

from llmfoundry.data import shard_checks
from llmfoundry.data.checked_streaming import CheckedStreamingDataset
from llmfoundry.data.sample_ids import Sample

__all__ = ['ElasticStreamingDataset', 'Seat', 'repeats_per_worker', 'share_of_worker']

log = logging.getLogger(__name__)

# Other batching methods choose a batch from one stream, by rules of their own.
_ELASTIC_BATCHING, _ELASTIC_PARTITIONS = 'random', ('orig', 'relaxed')
_PROBED_BYTES = 1 << 16
_MOST_PROBED_SHARDS = 64


class Seat(NamedTuple):
    """A worker's place among those that share the batches: ``rank`` of ``num_ranks``, and ``worker`` of the ``num_workers`` that this rank has."""

    rank: int
    num_ranks: int
    worker: int
    num_workers: int


def share_of_worker(order: np.ndarray, global_batch: int, drop_last: bool, seat: Seat) -> tuple[np.ndarray, np.ndarray]:
    """Deals global batches: sample ``q`` of a batch goes to rank ``q % num_ranks``, batch ``b`` to worker ``b % num_workers`` of each rank.

    Every rank gets as many samples of a batch; where there are not as many, some are idle.

    Args:
        order: the samples that are left of an epoch, in the order of training.
        global_batch: samples of a step over all ranks.
        drop_last: leave out a last batch that is not full.
        seat: whose share.

    Returns:
        The samples of the worker, batch by batch, and bool of the same length: True where the sample is another rank's, and stands there only to keep this one busy.
    """
    rank, num_ranks, worker, num_workers = seat
    full = len(order) // global_batch
    batches = [order[: full * global_batch].reshape(full, global_batch)[worker::num_workers]]
    if not drop_last and len(order) > full * global_batch and full % num_workers == worker:
        batches.append(order[full * global_batch :][None])
    shares, idle = [], []
    for block in batches:
        missing = -block.shape[1] % num_ranks
        # (batches, samples per rank), the missing ones standing at the end of the batch.
        share = np.pad(block, ((0, 0), (0, missing)), constant_values=-1)[:, rank::num_ranks]
        is_idle = share < 0
        shares.append(np.where(is_idle, block[:, :1], share).reshape(-1))
        idle.append(is_idle.reshape(-1))
    return np.concatenate(shares), np.concatenate(idle)


def repeats_per_worker(work: np.ndarray, expected: int) -> np.ndarray | None:
    """Which samples Streaming repeats to give every rank as many: bool, of the shape of ``work``; None if there are none.

    Args:
        work: sample ids of an epoch, (nodes, ranks, workers, batches, batch); -1 is padding.
        expected: samples left in the epoch.
    """
    ids = work.reshape(-1)
    if int((ids >= 0).sum()) <= expected:
        return None
    # In the order of training: the later occurrence is the repeated one.
    in_turn = np.arange(work.size).reshape(work.shape).transpose(3, 2, 0, 1, 4).reshape(-1)
    in_turn = in_turn[ids[in_turn] >= 0]
    _, first = np.unique(ids[in_turn], return_index=True)
    if len(first) != expected:
        return None  # streams that are repeated on purpose hide which ones they are
    again = np.ones(len(in_turn), dtype=bool)
    again[first] = False
    marks = np.zeros(work.size, dtype=bool)
    marks[in_turn[again]] = True
    return marks.reshape(work.shape)


class _Idle(int):
    """A sample id that only keeps its rank busy."""


class ElasticStreamingDataset(CheckedStreamingDataset):
    """Deals whole global batches.

    Attributes:
        global_batch: samples of a step over all ranks; ``batch_size`` times the ranks unless set.
        drop_last: leave out a last batch of the epoch that is not full.
    """

    global_batch: int | None = None
    drop_last: bool = False
    _idle: np.ndarray | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._configured = {'shuffle_seed': self.shuffle_seed, 'num_canonical_nodes': self.num_canonical_nodes}
        # Those of the checkpoint, which replace them when the first epoch begins.
        self.in_force: dict[str, Any] = {}
        self._probes: dict[str, int] = {}
        self._index_digests: dict[int, str] = {}

    def idle_sample(self) -> Any:
        """What keeps a rank busy that has no sample: it counts for nothing and has no loss."""
        raise NotImplementedError

    @property
    def is_elastic(self) -> bool:
        """Whether the samples of a step are the same for any number of ranks."""
        return self.batching_method == _ELASTIC_BATCHING and self.partition_algo in _ELASTIC_PARTITIONS and isinstance(self.batch_size, int)

    @property
    def samples_per_step(self) -> int:
        """Samples of a step over all ranks."""
        return self.global_batch or int(self.batch_size or 1) * self._parallel_rank_world.num_ranks

    @property
    def num_batches(self) -> int:
        """Steps of an epoch."""
        return self.epoch_size // self.samples_per_step if self.drop_last else -(-self.epoch_size // self.samples_per_step)

    def sample_order(self, epoch: int) -> np.ndarray:
        """Sample ids of an epoch in the order of training, int64 ``(epoch_size,)``: the same for any number of nodes, ranks and workers."""
        units, small_per_big = self.resample_streams(epoch)
        nodes = self.num_canonical_nodes or 1
        places = get_partitions('orig', self.epoch_size, nodes, 1, 1, 1, 1).reshape(-1)
        if len(places) > self.epoch_size:
            # Repeated to give canonical nodes as many.
            places = places[np.sort(np.unique(places, return_index=True)[1])]
        if self.shuffle:
            places = get_shuffle(self.shuffle_algo, units, nodes, self.shuffle_seed, epoch, self.shuffle_block_size)[places]
        return small_per_big[places]

    def _get_work(self, epoch: int, sample_in_epoch: int) -> np.ndarray:
        self._first_sample = sample_in_epoch
        if not self.is_elastic:
            return super()._get_work(epoch, sample_in_epoch)
        # Made here, since a lock cannot be pickled to workers.
        if not hasattr(self._shared_barrier, 'lock'):
            self._shared_barrier.lock = FileLock(self._shared_barrier.filelock_path)
        workers = self._unique_worker_world.workers_per_node
        if self._unique_worker_world.is_local_leader:
            order = self.sample_order(epoch)[sample_in_epoch:]
            shape_memory, data_memory = super()._share_work(order.reshape(1, 1, 1, 1, -1))
            self._shared_barrier(workers)
        else:
            self._shared_barrier(workers)
            order, shape_memory, data_memory = super()._attach_work()
        world = self._parallel_worker_world
        # Neighbours in the order belong to different nodes, as canonical nodes do, so that a node reads its own shards.
        seat = Seat(world.rank_of_node * world.num_nodes + world.node, world.num_ranks, world.worker_of_rank, world.workers_per_rank)
        share, self._idle = share_of_worker(order.reshape(-1), self.samples_per_step, self.drop_last, seat)
        self._shared_barrier(workers)
        shape_memory.cleanup()
        if data_memory is not None:
            data_memory.cleanup()
        return share

    def _share_work(self, sample_ids: np.ndarray) -> Any:
        self._note_repeats(sample_ids)
        return super()._share_work(sample_ids)

    def _attach_work(self) -> Any:
        attached = super()._attach_work()
        self._note_repeats(attached[0])
        return attached

    def _note_repeats(self, work: np.ndarray) -> None:
        """For batching methods that are Streaming's own: keeps which samples of this worker are repeats; all of the epoch's work is at hand only here."""
        world = self._parallel_worker_world
        marks = repeats_per_worker(work, self.epoch_size - self._first_sample)
        mine = (world.node, world.rank_of_node, world.worker_of_rank)
        self._idle = marks[mine].reshape(-1)[work[mine].reshape(-1) >= 0] if marks is not None else None

    def _each_sample_id(self, it: Any) -> Iterator[int]:
        idle = self._idle
        for number, sample_id in enumerate(super()._each_sample_id(it)):
            yield _Idle(sample_id) if idle is not None and idle[number] else sample_id

    def __getitem__(self, at: Any) -> Any:
        # An idle sample keeps its rank busy, and is trained once all the same.
        return self.idle_sample() if isinstance(at, _Idle) else super().__getitem__(at)

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """The sample with this index over all shards, decoded; a mapping comes as a ``Sample``."""
        sample = super().get_item(sample_id, retry)
        return Sample(sample, (int(sample_id),)) if isinstance(sample, dict) else sample

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """As Streaming's, which goes on with the seed and the canonical nodes of the checkpoint; where the config has others, that is said."""
        super().load_state_dict(obj)
        self.in_force = {name: obj[name] for name in self._configured if obj.get(name) is not None}
        for name, value in self.in_force.items():
            if value != self._configured[name]:
                log.warning('dataset.%s: the checkpoint goes on with its own, %s, and not with the %s of the config', name, value, self._configured[name])

    def epoch_at_hand(self) -> int:
        """Number of the epoch that is being read."""
        return self.next_epoch - 1

    def facts(self) -> dict[str, Any]:
        """What the samples of a step depend on, under the names of the config."""
        names = ('shuffle', 'shuffle_algo', 'shuffle_block_size', 'batching_method', 'sampling_method', 'sampling_granularity')
        facts: dict[str, Any] = {'data source': 'MDS shards'}
        for number, stream in enumerate(self.streams):
            if number not in self._index_digests:
                self._index_digests[number] = _digest_of_index(self.folder_of(stream))
            facts[f'data index of stream {number}'] = self._index_digests[number]
            facts[f'samples per epoch of stream {number}'] = int(stream.choose)
        return {**facts, 'samples per epoch': self.epoch_size, **self._configured, **{name: getattr(self, name) for name in names}, 'samples per step': self.samples_per_step}

    def probes(self) -> dict[str, int]:
        """CRC32 of the last bytes of up to 64 shards that lie here, by number: shards that were exchanged for others of the same size show in it."""
        for shard_id in range(0, self.num_shards, max(1, self.num_shards // _MOST_PROBED_SHARDS)):
            if str(shard_id) not in self._probes:
                found = self.probe(shard_id)
                if found is not None:
                    self._probes[str(shard_id)] = found
        return dict(self._probes)

    def probe(self, shard_id: int) -> int | None:
        """See ``probes``; None for a shard that does not lie here."""
        try:
            with open(self.shard_path(shard_id), 'rb') as f:
                f.seek(-min(_PROBED_BYTES, os.fstat(f.fileno()).st_size), os.SEEK_END)
                return zlib.crc32(f.read())
        except OSError:
            return None

    def shard_of(self, sample_ids: np.ndarray) -> np.ndarray:
        """The shard that holds each sample."""
        return np.searchsorted(self.sample_offset_per_shard, sample_ids, side='right') - 1


def _digest_of_index(folder: str) -> str:
    """Of what an index says about its samples; how they are compressed does not matter."""
    shards = [{key: shard.get(key) for key in ('samples', 'raw_data', 'column_names', 'column_encodings')} for shard in shard_checks.read_index(folder)['shards']]
    return hashlib.blake2b(json.dumps(shards, sort_keys=True).encode(), digest_size=8).hexdigest()
