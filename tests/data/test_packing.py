"""Packing as properties: every example once, no row too full, rows filled, and the collator of plug-ins."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfoundry.data import packing
from llmfoundry.data.packing import BinPackCollator, best_fit, best_fit_bins, choose_bins, pack_in_batches

CAPACITY = 32
lengths_of_examples = st.lists(st.integers(1, CAPACITY), max_size=200)


def realistic_lengths(num_examples: int, capacity: int = 2048, seed: int = 0) -> np.ndarray:
    """Lengths as instruction data have them: a median of about 150 tokens and a long tail."""
    return np.clip(np.random.default_rng(seed).lognormal(5, 0.9, num_examples).astype(np.int64), 5, capacity)


@given(lengths_of_examples, st.integers(1, 64))
@settings(max_examples=300, deadline=None)
def test_every_example_has_one_place_and_no_row_overflows(lengths: list[int], window: int) -> None:
    bins = best_fit_bins(lengths, CAPACITY, window)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in b) <= CAPACITY for b in bins)
    assert all(b == sorted(b) for b in bins), 'examples keep their order within a row'


@given(lengths_of_examples)
@settings(max_examples=200, deadline=None)
def test_no_two_rows_of_a_window_could_be_one(lengths: list[int]) -> None:
    totals = sorted(sum(lengths[i] for i in b) for b in best_fit_bins(lengths, CAPACITY))
    assert len(totals) < 2 or totals[0] + totals[1] > CAPACITY
    assert len(totals) <= 1 + sum(lengths) * 2 // CAPACITY


@given(lengths_of_examples, st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_examples_stay_within_two_windows(lengths: list[int], window: int) -> None:
    for b in best_fit_bins(lengths, CAPACITY, window):
        assert b[-1] // window - b[0] // window <= 1


def reference_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The space that best fit decreasing leaves in each row, by looking at every row."""
    space: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [s for s in space if s >= length]
        if fitting:
            space[space.index(min(fitting))] -= length
        else:
            space.append(capacity - length)
    return sorted(space)


@given(lengths_of_examples)
@settings(max_examples=200, deadline=None)
def test_the_bitset_finds_the_same_rows_as_a_search(lengths: list[int]) -> None:
    assert sorted(CAPACITY - sum(lengths[i] for i in b) for b in best_fit_bins(lengths, CAPACITY)) == reference_best_fit(lengths, CAPACITY)


def test_realistic_lengths_fill_more_than_99_percent_fast() -> None:
    lengths = realistic_lengths(200_000)
    start = time.perf_counter()
    bins = best_fit(lengths, 2048)
    # 0.1 s on an idle core; an algorithm that looks at every row needs minutes.
    assert time.perf_counter() - start < 10
    assert lengths.sum() / (len(bins) * 2048) > 0.999
    small = realistic_lengths(20_000)
    assert small.sum() / (len(best_fit(small, 2048)) * 2048) > 0.99
    assert small.sum() / (len(best_fit(small, 2048, 4096)) * 2048) > 0.99


def test_zero_examples_and_zero_tokens() -> None:
    assert best_fit_bins([], 8) == []
    assert len(best_fit([], 8)) == 0
    assert best_fit_bins([0, 8, 0], 8) == [[1], [0, 2]]


@pytest.mark.parametrize(('arguments', 'error'), [
    (([3, 9], 8), 'example 1 has 9 tokens, but a row holds 0 to 8. Truncate the examples first'),
    (([-1], 8), 'example 0 has -1 tokens, but a row holds 0 to 8. Truncate the examples first'),
    (([3], 0), 'capacity and window must be at least 1, got 0 and 65536'),
    (([3], 8, 0), 'capacity and window must be at least 1, got 8 and 0'),
])  # fmt: skip
def test_impossible_packings_are_refused(arguments: Any, error: str) -> None:
    with pytest.raises(ValueError) as e:
        best_fit(*arguments)
    assert str(e.value) == error


@given(lengths_of_examples, st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_a_batch_gets_as_many_rows_as_it_should(lengths: list[int], rows: int) -> None:
    chosen, rest = choose_bins(lengths, CAPACITY, rows)
    assert sorted(i for b in chosen + rest for i in b) == list(range(len(lengths)))
    assert len(chosen) == min(rows, len(lengths))
    assert all(sum(lengths[i] for i in b) <= CAPACITY for b in chosen + rest)
    fills = [sum(lengths[i] for i in b) for b in chosen + rest]
    assert fills == sorted(fills, reverse=True)


@given(lengths_of_examples, st.integers(1, 8), st.floats(1, 12))
@settings(max_examples=200, deadline=None)
def test_a_ratio_drops_nothing_and_fills_every_batch_but_the_last(lengths: list[int], rows: int, ratio: float) -> None:
    plan = pack_in_batches(lengths, CAPACITY, rows, ratio)
    assert sorted(plan.bins.order.tolist()) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in plan.bins.bin(row)) <= CAPACITY for row in range(len(plan.bins)))


def test_a_ratio_that_fits_takes_that_many_examples_per_batch() -> None:
    plan = pack_in_batches([4] * 64, CAPACITY, 4, 4.0)
    assert len(plan.bins) == 16 and plan.ratio == 4.0
    assert [sorted(i for row in range(4 * b, 4 * b + 4) for i in plan.bins.bin(row)) for b in range(4)] == [list(range(16 * b, 16 * b + 16)) for b in range(4)]


def test_a_ratio_that_is_too_high_carries_leftovers_and_says_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    pools: list[int] = []

    def noting(lengths: Any, *args: Any) -> Any:
        pools.append(len(lengths))
        return choose_bins(lengths, *args)

    monkeypatch.setattr(packing, 'choose_bins', noting)
    lengths = [8] * 400
    plan = pack_in_batches(lengths, CAPACITY, 4, 40.0)
    assert len(plan.bins) == 100 and plan.ratio == 4.0
    assert max(pools) <= 160 + 16, 'packing all leftovers again for each batch would take quadratic time'
    # Leftovers stay within a batch or so: examples are not put off to the end.
    for row in range(len(plan.bins)):
        assert all(abs(int(example) - 4 * row) <= 400 // 2 for example in plan.bins.bin(row))


def rows_of(*lengths: int, width: int = 8) -> list[dict[str, torch.Tensor]]:
    """Examples with the ids 10, 11, ... for the first, 20, 21, ... for the second."""
    rows = []
    for number, length in enumerate(lengths, 1):
        ids = torch.arange(width) + 10 * number
        mask = (torch.arange(width) < length).long()
        rows.append({'input_ids': ids * mask, 'labels': torch.where(mask.bool(), ids, -100), 'attention_mask': mask})
    return rows


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize('side', ['right', 'left'])
def test_the_collator_of_plug_ins_packs_numbers_and_masks(side: Any) -> None:
    packer = BinPackCollator(stack, 1, 8, pad_token_id=7, padding_side=side)
    batch = packer(rows_of(3, 4))
    pad = slice(7, 8) if side == 'right' else slice(0, 1)
    real = slice(0, 7) if side == 'right' else slice(1, 8)
    assert batch['input_ids'][0, real].tolist() == [10, 11, 12, 20, 21, 22, 23] and batch['input_ids'][0, pad].tolist() == [7]
    assert batch['labels'][0, real].tolist() == [10, 11, 12, -100, 21, 22, 23] and batch['labels'][0, pad].tolist() == [-100]
    assert batch['sequence_id'][0, real].tolist() == [0, 0, 0, 1, 1, 1, 1] and batch['sequence_id'][0, pad].tolist() == [-1]
    assert batch['attention_mask'][0, real].tolist() == [1] * 7 and batch['attention_mask'][0, pad].tolist() == [0]
    assert packer.waste == 0 and packer.efficiency == pytest.approx(7 / 8)


def test_leftovers_wait_or_are_counted_as_waste() -> None:
    waiting = BinPackCollator(stack, 1, 8, 0, 'right')
    assert waiting(rows_of(8, 6))['input_ids'][0].tolist() == list(range(10, 18))
    assert waiting.waste == pytest.approx(6 / 14)
    assert waiting(rows_of(2))['sequence_id'][0].tolist() == [0] * 6 + [1] * 2
    assert waiting.waste == 0
    dropping = BinPackCollator(stack, 1, 8, 0, 'right', max_leftover_bins_to_keep=0)
    dropping(rows_of(8, 6))
    assert dropping(rows_of(2))['attention_mask'].sum() == 2
    assert dropping.waste == pytest.approx(6 / 16)


@pytest.mark.parametrize(('change', 'error'), [
    ({'max_leftover_bins_to_keep': -1}, 'max_leftover_bins_to_keep must be 0 or more, got -1'),
    ({'padding_side': 'middle'}, "padding_side must be 'left' or 'right', got 'middle'"),
])  # fmt: skip
def test_wrong_settings_of_the_collator(change: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError) as e:
        BinPackCollator(**{'collator': stack, 'target_batch_size': 1, 'max_seq_len': 8, 'pad_token_id': 0, 'padding_side': 'right', **change})
    assert str(e.value) == error


def test_a_batch_without_labels_cannot_be_packed() -> None:
    packer = BinPackCollator(stack, 1, 8, 0, 'right')
    with pytest.raises(ValueError, match='must have input_ids, labels and attention_mask, but labels is missing'):
        packer.pack({'input_ids': torch.ones(1, 8), 'attention_mask': torch.ones(1, 8)})


def test_profiling_functions_are_reached_from_here() -> None:
    assert packing.auto_packing_ratio.__module__ == packing.profile_packing.__module__ == 'llmfoundry.data.packing_profile'
