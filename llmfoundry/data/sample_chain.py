"""The proof of what a run was trained on: a digest of the sample ids of every step, and a hash chain over the steps.

The digest of a step is the sum of a 64-bit mix of its ids. A sum knows no order, so it is the same however ranks, workers and packing split the step; ranks add their shares, eight bytes a step, and ids
are never gathered. Digests of the present epoch are kept, so that a resumed run can name the first step that differs; what came before is held by the chain. The mix finds mistakes, not forgeries.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Mapping, Protocol, Sequence

import numpy as np

__all__ = ['ChainRecord', 'Plan', 'chain_value', 'changed_facts', 'combine', 'digest_of_ids', 'explain_difference', 'first_difference', 'step_digests', 'words']

FORMAT = 1
# 700 kB of text in a checkpoint; of longer epochs the last steps are kept.
MOST_STEPS = 1 << 16
_GOLDEN, _MIX1, _MIX2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_LOW_WORD = np.uint64(0xFFFFFFFF)


def _mixed(ids: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195), which is a bijection: uint64 of the shape of ``ids``."""
    x = (np.asarray(ids, dtype=np.int64).astype(np.uint64) + np.uint64(1)) * _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX1
    x = (x ^ (x >> np.uint64(27))) * _MIX2
    return x ^ (x >> np.uint64(31))


def digest_of_ids(ids: np.ndarray) -> int:
    """The digest of a set of ids; those of its parts add up to it modulo 2^64."""
    return int(_mixed(ids).sum(dtype=np.uint64))


def step_digests(ids: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Digests of consecutive steps, uint64 ``(steps,)``.

    Args:
        ids: of all steps, in order.
        counts: ids of each step; steps beyond the end of ``ids`` have what is left.
    """
    total = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(_mixed(ids[: int(counts.sum())]), dtype=np.uint64)])
    ends = np.minimum(np.cumsum(counts), len(total) - 1)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
    return total[ends] - total[starts]


def words(digests: Sequence[int], counts: Sequence[int]) -> np.ndarray:
    """What the ranks add up, int64 ``(steps, 3)``: the two halves of each digest, so that no sum overflows, and the number of ids."""
    whole = np.asarray(digests, dtype=np.uint64)
    return np.stack([whole & _LOW_WORD, whole >> np.uint64(32), np.asarray(counts, dtype=np.uint64)], axis=1).astype(np.int64)


def combine(summed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the sum of ``words`` over ranks to the digests, uint64, and the number of ids, int64, of each step."""
    low, high = (summed[:, i].astype(np.uint64) for i in (0, 1))
    return low + (high << np.uint64(32)), summed[:, 2].astype(np.int64)


def chain_value(before: str, digests: np.ndarray, counts: np.ndarray) -> str:
    """The chain after more steps: each link hashes the one before, the digest of its step and the number of its ids."""
    link = bytes.fromhex(before)
    for digest, count in zip(digests.astype('<u8'), counts.astype('<i8'), strict=True):
        link = hashlib.blake2b(link + digest.tobytes() + count.tobytes(), digest_size=16).digest()
    return link.hex()


def first_difference(digests: np.ndarray, counts: np.ndarray, ids: np.ndarray) -> int | None:
    """Index of the first step whose ids are not the next ones of ``ids``; None if there is none."""
    differing = np.flatnonzero((step_digests(ids, counts) != digests) | (np.cumsum(counts) > len(ids)))
    return int(differing[0]) if len(differing) else None


def _runs(counts: np.ndarray) -> list[list[int]]:
    """[how many, number] for each stretch of equal numbers: all steps but the last of an epoch have as many samples."""
    if not len(counts):
        return []
    starts = np.concatenate([[0], np.flatnonzero(np.diff(counts)) + 1])
    return [[int(n), int(counts[s])] for n, s in zip(np.diff(np.append(starts, len(counts))), starts, strict=True)]


@dataclass
class ChainRecord:
    """What a checkpoint holds about the samples.

    Attributes:
        epoch: of the data; its steps are the ones whose digests are kept.
        first_step: steps of the run before the first kept one.
        skipped: samples of the epoch before the first kept step; None if not known, since the chain was begun in mid-epoch.
        before: chain value before the first kept step.
        value: chain value after the last step.
        digests: uint64 (steps,).
        counts: int64 (steps,), samples of each step.
        facts: what the samples depend on: settings by name, and what identifies the data.
        probes: CRC32 of pieces of shards, by number of the shard.
    """

    epoch: int
    first_step: int
    skipped: int | None
    before: str = '00' * 16
    value: str = ''
    digests: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    facts: Mapping[str, Any] = field(default_factory=dict)
    probes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.value = self.value or self.before

    @property
    def last_step(self) -> int:
        """Steps of the run up to the last one that is recorded."""
        return self.first_step + len(self.digests)

    def extend(self, digests: np.ndarray, counts: np.ndarray) -> None:
        """Adds steps, and lets the oldest go where there are too many."""
        self.value = chain_value(self.value, digests, counts)
        self.digests, self.counts = np.concatenate([self.digests, digests]), np.concatenate([self.counts, counts])
        surplus = len(self.digests) - MOST_STEPS
        if surplus > 0:
            self.before = chain_value(self.before, self.digests[:surplus], self.counts[:surplus])
            self.skipped = None if self.skipped is None else self.skipped + int(self.counts[:surplus].sum())
            self.first_step += surplus
            self.digests, self.counts = self.digests[surplus:], self.counts[surplus:]

    def to_text(self) -> str:
        """As JSON, which every way of saving and loading a checkpoint keeps as it is."""
        return json.dumps({
            'format': FORMAT, 'epoch': self.epoch, 'first_step': self.first_step, 'skipped': self.skipped, 'before': self.before, 'value': self.value,
            'digests': base64.b64encode(self.digests.astype('<u8').tobytes()).decode(), 'counts': _runs(self.counts), 'facts': dict(self.facts), 'probes': dict(self.probes),
        })  # fmt: skip

    @classmethod
    def from_text(cls, text: str) -> ChainRecord | None:
        """What ``to_text`` wrote; None for a format that this version does not know.

        Raises:
            ValueError: the digests do not lead to the chain value, so the record is damaged.
        """
        found = json.loads(text)
        if found.pop('format', None) != FORMAT:
            return None
        digests = np.frombuffer(base64.b64decode(found['digests']), dtype='<u8').astype(np.uint64)
        counts = np.concatenate([np.zeros(0, dtype=np.int64), *(np.full(n, count, dtype=np.int64) for n, count in found['counts'])])
        if len(digests) != len(counts) or chain_value(found['before'], digests, counts) != found['value']:
            raise ValueError(f'the digests of the {len(counts)} steps after step {found["first_step"]} do not lead to the chain value {found["value"]}')
        return cls(found['epoch'], found['first_step'], found['skipped'], found['before'], found['value'], digests, counts, found['facts'], found['probes'])


class Plan(Protocol):
    """What is asked of a data set: ``ElasticStreamingDataset`` and ``PackedDataset`` answer."""

    def sample_order(self, epoch: int) -> np.ndarray:
        """All ids of an epoch in the order of training."""
        ...

    def epoch_at_hand(self) -> int:
        """Number of the epoch that is being read."""
        ...

    def facts(self) -> dict[str, Any]:
        """What the samples of a step depend on, by the names of the config."""
        ...


def changed_facts(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Facts that differ, each with its value then and now; those that one side does not have are left out."""
    return {name: (then[name], now[name]) for name in then if name in now and then[name] != now[name]}


def changed_shards(record: ChainRecord, plan: Any) -> list[int]:
    """Shards of which other bytes lie here than when the checkpoint was saved."""
    if not record.probes or not hasattr(plan, 'probe'):
        return []
    found = {int(shard): (crc, plan.probe(int(shard))) for shard, crc in record.probes.items()}
    return sorted(shard for shard, (then, now) in found.items() if now is not None and now != then)


def explain_difference(record: ChainRecord, plan: Any) -> str | None:
    """Why the samples of the recorded steps are not those that the data set would give now; None if they are.

    Args:
        record: of the checkpoint.
        plan: the data set of this run; nothing of it is read but, of up to 64 shards, the last bytes.
    """
    changes = changed_facts(record.facts, plan.facts())
    data_changes = [name for name in changes if name.startswith('data ')]
    shards = changed_shards(record, plan)
    ids = plan.sample_order(record.epoch)[record.skipped or 0 :] if record.skipped is not None else None
    step = first_difference(record.digests, record.counts, ids) if ids is not None else None
    if step is not None and ids is not None:
        begin = int(record.counts[:step].sum())
        expected = ids[begin : begin + int(record.counts[step])]
        shown = ', '.join(map(str, np.sort(expected)[:8])) + (', ...' if len(expected) > 8 else '')
        what = (
            f'the first step that differs is step {record.first_step + step + 1} of the run (epoch {record.epoch}; steps {record.first_step + 1} to {record.last_step} were compared). '
            f'It was trained on {record.counts[step]} other samples than those that it would get now ({shown})'
        )
    elif shards:
        seen = np.flatnonzero(np.isin(plan.shard_of(ids[: int(record.counts.sum())]), shards)) if ids is not None else []
        first = f', first read in step {record.first_step + int(np.searchsorted(np.cumsum(record.counts), seen[0], side="right")) + 1} of the run' if len(seen) else ''
        what = f'the numbers of the samples are the same, but {plan.shard_path(shards[0])} holds other bytes{first} ({len(shards)} of {len(record.probes)} shards that were looked at differ). The file is damaged or another one'
    elif data_changes:
        what = f'the numbers of the samples up to step {record.last_step} are the same, but they are numbers in other data'
    else:
        return None
    changed = ''.join(f'\n  changed: {name}: {then} -> {now}' for name, (then, now) in changes.items()) or '\n  none of the settings in the checkpoint changed'
    return f'{what}.{changed}'
