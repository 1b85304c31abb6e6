"""The plan of batches: every example once per epoch, the same global batches for any ranks, workers and interruptions."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfoundry.data.finetuning.collator import PackedRow
from llmfoundry.data.finetuning.packed_dataset import (
    GlobalBatchSampler,
    PackedDataset,
    PackedLoader,
    batch_of_rank,
    epoch_order,
    num_batches,
    plan_rows,
)

CAPACITY = 64


class MemoryStore:
    """Example i consists of the id i, as often as it is long; all of it is trained."""

    source = 'memory'

    def __init__(self, num_examples: int, seed: int = 0) -> None:
        self.lengths = np.random.default_rng(seed).integers(1, 40, num_examples).astype(np.int32)
        self.digest = f'{num_examples}-{seed}'

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.full(self.lengths[index], index, dtype=np.int32), np.ones(self.lengths[index], dtype=bool)


PACKINGS = (None, 'full', 2.0, 9.5)


def dataset_of(num_examples: int, packing: Any, global_rows: int = 8, shuffle: bool = True, seed: int = 3) -> PackedDataset:
    store = MemoryStore(num_examples)
    return PackedDataset(store, plan_rows(store.lengths, CAPACITY, packing, global_rows, shuffle, seed), CAPACITY)


def examples_in(rows: list[PackedRow]) -> list[int]:
    return [int(document.ids[0]) for row in rows for document in row.documents]


def epoch_on(ranks: int, num_examples: int, packing: Any, epoch: int = 0, drop_last: bool = False, global_rows: int = 8, start: int = 0) -> list[list[list[PackedRow]]]:
    """Batch -> rank -> rows, as that many ranks would draw them."""
    per_rank = []
    for rank in range(ranks):
        dataset = dataset_of(num_examples, packing)
        sampler = GlobalBatchSampler(dataset, global_rows // ranks, True, 3, drop_last, rank, ranks)
        if start:
            sampler.load_state_dict({**sampler.state_dict(0, True), 'epoch': epoch, 'row': start})
        sampler.set_epoch(epoch)
        batches = [[dataset[row] for row in batch] for batch in sampler]
        assert start or len(batches) == len(sampler)
        per_rank.append(batches)
    assert len({len(batches) for batches in per_rank}) == 1, 'ranks with fewer batches would leave the others waiting'
    return [list(batch) for batch in zip(*per_rank, strict=True)]


@pytest.mark.parametrize('packing', PACKINGS)
@pytest.mark.parametrize('ranks', [1, 2, 4])
def test_every_example_comes_once_per_epoch(ranks: int, packing: Any) -> None:
    orders = []
    for epoch in (0, 1, 2):
        batches = epoch_on(ranks, 203, packing, epoch)
        seen = [i for batch in batches for rows in batch for i in examples_in(rows)]
        assert sorted(seen) == list(range(203))
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize('packing', PACKINGS)
@pytest.mark.parametrize('shuffle', [False, True])
def test_no_row_holds_more_than_fits(packing: Any, shuffle: bool) -> None:
    dataset = dataset_of(203, packing, shuffle=shuffle)
    assert max(sum(len(document.ids) for document in dataset[row].documents) for row in range(len(dataset))) <= CAPACITY


@pytest.mark.parametrize('packing', PACKINGS)
@pytest.mark.parametrize('drop_last', [False, True])
def test_global_batches_do_not_depend_on_the_number_of_ranks(packing: Any, drop_last: bool) -> None:
    def global_batches(ranks: int) -> list[list[int]]:
        return [sorted(i for rows in batch for i in examples_in(rows)) for batch in epoch_on(ranks, 203, packing, 1, drop_last)]

    assert global_batches(1) == global_batches(2) == global_batches(4) == global_batches(8)
    sizes = [[len(rows) for rows in batch] for batch in epoch_on(4, 203, packing, 1, drop_last)]
    assert sizes[:-1] == [[2] * 4] * (len(sizes) - 1) and len(set(sizes[-1])) == 1


def test_drop_last_leaves_out_the_batch_that_is_not_full() -> None:
    kept = [i for batch in epoch_on(2, 203, None, drop_last=True) for rows in batch for i in examples_in(rows)]
    assert len(kept) == len(set(kept)) == 200
    # Other examples in other epochs.
    assert set(kept) != {i for batch in epoch_on(2, 203, None, 1, drop_last=True) for rows in batch for i in examples_in(rows)}


@given(st.integers(1, 60), st.integers(1, 4), st.sampled_from([1, 2, 3, 4]))
@settings(max_examples=200, deadline=None)
def test_a_short_last_batch_gives_every_rank_a_row(num_rows: int, share: int, ranks: int) -> None:
    order = epoch_order(num_rows, True, 0, 0)
    for batch in range(num_batches(num_rows, share * ranks, False)):
        rows = [batch_of_rank(order, batch, share * ranks, rank, ranks) for rank in range(ranks)]
        assert len({len(r) for r in rows}) == 1 and 1 <= len(rows[0]) <= share
        assert all(r.count(-1) <= 1 for r in rows)
        assert [row for r in rows for row in r if row >= 0] == order[batch * share * ranks : (batch + 1) * share * ranks].tolist()


def test_shuffling_off_keeps_the_order_of_the_source() -> None:
    dataset = dataset_of(20, None, shuffle=False)
    sampler = GlobalBatchSampler(dataset, 4, False, 0, False, 0, 1)
    assert examples_in([dataset[row] for batch in sampler for row in batch]) == list(range(20))
    packed = dataset_of(2000, 'full', shuffle=False)
    assert examples_in([packed[0]])[0] < 100 and max(examples_in([packed[0]])) - min(examples_in([packed[0]])) < 2000


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = {tuple(epoch_order(50, True, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert tuple(epoch_order(5, False, 1, 1)) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize('packing', ['full', 2.0, None])
@pytest.mark.parametrize(('ranks_before', 'ranks_after', 'global_after'), [(1, 1, 8), (2, 4, 8), (4, 1, 8), (2, 2, 6)])
def test_a_resumed_epoch_goes_on_with_the_next_row(packing: Any, ranks_before: int, ranks_after: int, global_after: int) -> None:
    whole = [examples_in(rows) for batch in epoch_on(ranks_before, 203, packing, 1) for rows in batch]
    before = sum((examples_in(rows) for batch in epoch_on(ranks_before, 203, packing, 1)[:3] for rows in batch), [])
    after = [examples_in(rows) for batch in epoch_on(ranks_after, 203, packing, 1, global_rows=global_after, start=24) for rows in batch]
    assert sorted(before + sum(after, [])) == list(range(203))
    assert before + sum(after, []) == sum(whole, [])


def loader_of(dataset: PackedDataset, num_workers: int = 0) -> PackedLoader:
    GlobalBatchSampler(dataset, 8, True, 3, False, 0, 1)
    return PackedLoader(dataset, collate_fn=examples_in, num_workers=num_workers, persistent_workers=num_workers > 0)


@pytest.mark.parametrize('workers', [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    plain, parallel = loader_of(dataset_of(203, 'full')), loader_of(dataset_of(203, 'full'), workers)
    for _ in range(2):
        assert list(plain) == list(parallel)
    assert plain.batch_size == 8 and len(plain) == len(parallel)


class Composer:
    """What Composer's trainer does with a loader: sets the epoch, counts rows, and skips what it has trained unless the dataset was resumed."""

    def __init__(self, loader: PackedLoader) -> None:
        self.loader, self.epoch, self.samples, self.batches, self.resumed = loader, 0, 0, 0, False

    def save(self) -> dict[str, Any]:
        state = self.loader.dataset.state_dict(self.samples, True)
        return json.loads(json.dumps({'dataset': state, 'epoch': self.epoch, 'samples': self.samples, 'batches': self.batches}))

    def load(self, state: dict[str, Any]) -> None:
        self.loader.dataset.load_state_dict(state['dataset'])
        self.epoch, self.samples, self.batches, self.resumed = state['epoch'], state['samples'], state['batches'], True

    def fit(self, num_batches: int, rows_per_batch: int = 8) -> list[Any]:
        seen: list[Any] = []
        while len(seen) < num_batches:
            self.loader.batch_sampler.set_epoch(self.epoch)
            for index, batch in enumerate(self.loader):
                if not self.resumed and index < self.batches:
                    continue
                seen.append(batch)
                self.batches, self.samples = self.batches + 1, self.samples + rows_per_batch
                if len(seen) == num_batches:
                    break
            if self.batches == len(self.loader) or len(seen) < num_batches:
                self.epoch, self.batches, self.samples = self.epoch + 1, 0, 0
        return seen


@pytest.mark.parametrize('packing', [None, 'full', 2.0])
@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('offset', [-1, 0, 1])
def test_a_run_that_is_interrupted_sees_the_same_batches(packing: Any, workers: int, offset: int) -> None:
    """Around the end of the first epoch: one batch before it, exactly there, and one after."""
    epoch = len(loader_of(dataset_of(203, packing)))
    expected = Composer(loader_of(dataset_of(203, packing))).fit(3 * epoch)
    first = Composer(loader_of(dataset_of(203, packing), workers))
    seen = first.fit(epoch + offset)
    second = Composer(loader_of(dataset_of(203, packing)))
    second.load(first.save())
    seen += second.fit(2)
    # Interrupted again, after a resumption.
    third = Composer(loader_of(dataset_of(203, packing), workers))
    third.load(second.save())
    seen += third.fit(3 * epoch - len(seen))
    assert seen == expected


def test_fitting_twice_goes_on_whether_or_not_the_run_was_resumed() -> None:
    expected = Composer(loader_of(dataset_of(203, 'full'))).fit(12)
    run = Composer(loader_of(dataset_of(203, 'full')))
    seen = run.fit(2) + run.fit(1)
    assert seen == expected[:3]
    resumed = Composer(loader_of(dataset_of(203, 'full')))
    resumed.load(run.save())
    assert resumed.fit(1) + resumed.fit(2) + resumed.fit(6) == expected[3:12]


def test_without_a_trainer_epochs_follow_each_other() -> None:
    loader = loader_of(dataset_of(203, 'full'))
    first, second = list(loader), list(loader)
    assert first != second and sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(203))
    next(iter(loader))
    third = list(loader)
    assert third == list(PackedLoader(_at_epoch(2), collate_fn=examples_in)), 'an epoch that was left early begins again'


def test_a_checkpoint_between_epochs_names_the_next_one() -> None:
    loader = loader_of(dataset_of(203, 'full'))
    assert loader.dataset.state_dict(0, True)['epoch'] == 0
    first = list(loader)
    state = loader.dataset.state_dict(0, True)
    assert (state['epoch'], state['row']) == (1, 0)
    resumed = loader_of(dataset_of(203, 'full'))
    resumed.dataset.load_state_dict(state)
    assert list(resumed) == list(loader) != first


def test_a_position_belongs_to_its_epoch() -> None:
    """A trainer that is at another epoch than the data were (its time was not loaded) gets that epoch whole."""
    loader = loader_of(dataset_of(203, 'full'))
    loader.dataset.load_state_dict({**loader.dataset.state_dict(0, True), 'epoch': 1, 'row': 24})
    loader.batch_sampler.set_epoch(0)
    assert sorted(sum(loader, [])) == list(range(203))


def _at_epoch(epoch: int) -> PackedDataset:
    dataset = dataset_of(203, 'full')
    GlobalBatchSampler(dataset, 8, True, 3, False, 0, 1).set_epoch(epoch)
    return dataset


@pytest.mark.parametrize(('state', 'reason'), [
    (None, 'it holds no position of a finetuning dataset'),
    ({'epoch': 0, 'sample_in_epoch': 8, 'num_canonical_nodes': 1}, 'it holds no position of a finetuning dataset'),
    ({'rows': 5}, "rows was 5 and is"),
    ({'seed': 4}, 'seed was 4 and is 3'),
    ({'digest': 'other'}, "digest was 'other' and is"),
])  # fmt: skip
def test_a_position_in_other_data_is_not_used(state: dict[str, Any] | None, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    loader = loader_of(dataset_of(203, 'full'))
    valid = loader.dataset.state_dict(16, True)
    given_state = {**valid, **state} if state and 'epoch' not in state else state
    with caplog.at_level(logging.WARNING):
        loader.dataset.load_state_dict(given_state)
    assert reason in caplog.text and 'this epoch begins with its first row' in caplog.text
    assert sorted(sum(loader, [])) == list(range(203))


def test_other_packings_are_told_apart_by_the_digest() -> None:
    digests = {dataset_of(203, packing, seed=seed).digest for packing in PACKINGS for seed in (0, 1)}
    assert len(digests) == 2 * len(PACKINGS) - 1, 'one example in each row is the same rows for any seed'


def test_a_ratio_that_does_not_fit_is_said_with_what_does(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        dataset_of(2000, 2.0)
        assert not caplog.text
        dataset_of(2000, 9.5)
    assert 'dataset.packing_ratio: 9.5 examples per row do not fit into 64 tokens; 3.' in caplog.text and 'Nothing is dropped' in caplog.text


def test_items_for_the_collators_of_plug_ins() -> None:
    dataset = dataset_of(5, None)
    dataset.as_examples = True
    item = dataset[2]
    assert item['input_ids'].tolist() == item['labels'].tolist() == [2] * int(dataset.store.lengths[2])
    assert (dataset[-1]['labels'] == -100).all()


def test_fill_counts_every_row() -> None:
    assert dataset_of(2000, 'full').fill > 0.99 > dataset_of(2000, None).fill
