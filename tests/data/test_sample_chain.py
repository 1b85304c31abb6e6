"""Digests of steps, the chain over them, and what is said when they differ."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfoundry.data import sample_chain
from llmfoundry.data.sample_chain import ChainRecord, chain_value, combine, digest_of_ids, explain_difference, first_difference, step_digests, words

IDS = st.lists(st.integers(0, 1 << 40), min_size=1, max_size=40)


class Plan:
    """A data set of ``ids``."""

    def __init__(self, ids: np.ndarray, **facts: Any) -> None:
        self.ids, self._facts = ids, facts

    def sample_order(self, epoch: int) -> np.ndarray:
        return self.ids

    def epoch_at_hand(self) -> int:
        return 0

    def facts(self) -> dict[str, Any]:
        return self._facts


def recorded(ids: np.ndarray, counts: list[int], skipped: int = 0, **facts: Any) -> ChainRecord:
    record = ChainRecord(0, 10, skipped, facts=facts)
    record.extend(step_digests(ids, np.array(counts)), np.array(counts))
    return record


@given(IDS, st.integers(1, 5), st.randoms(use_true_random=False))
def test_ranks_add_up_to_the_digest_of_the_step_however_they_share_it(ids: list[int], ranks: int, rng: Any) -> None:
    shuffled = list(ids)
    rng.shuffle(shuffled)
    parts = [np.array(shuffled[rank::ranks], dtype=np.int64) for rank in range(ranks)]
    summed = sum(words([digest_of_ids(part)], [len(part)]) for part in parts)
    digests, counts = combine(np.asarray(summed))
    assert digests.tolist() == [digest_of_ids(np.array(ids))] == step_digests(np.array(ids), np.array([len(ids)])).tolist()
    assert counts.tolist() == [len(ids)]


@given(IDS, st.data())
def test_another_id_gives_another_digest(ids: list[int], data: Any) -> None:
    place = data.draw(st.integers(0, len(ids) - 1))
    other = data.draw(st.integers(0, 1 << 40).filter(lambda number: number != ids[place]))
    assert digest_of_ids(np.array(ids)) != digest_of_ids(np.array([*ids[:place], other, *ids[place + 1 :]]))
    assert digest_of_ids(np.array(ids)) != digest_of_ids(np.array([*ids, ids[0]]))


@pytest.mark.parametrize('changed', [0, 3, 4])
def test_the_first_step_that_differs_is_found(changed: int) -> None:
    ids, counts = np.arange(100, 140), np.array([8, 8, 8, 8, 7])
    digests = step_digests(ids, counts)
    assert first_difference(digests, counts, ids) is None
    swapped = ids.copy()
    swapped[8 * changed], swapped[-1] = ids[-1], ids[8 * changed]
    assert first_difference(digests, counts, swapped) == changed
    assert first_difference(digests, counts, ids[: 8 * changed]) == changed, 'data that end before the step'


def test_a_step_in_another_order_is_the_same_step() -> None:
    ids, counts = np.arange(32), np.array([8, 8, 8, 8])
    assert first_difference(step_digests(ids, counts), counts, ids.reshape(4, 8)[:, ::-1].reshape(-1)) is None
    assert first_difference(step_digests(ids, counts), counts, ids.reshape(4, 8)[[0, 2, 1, 3]].reshape(-1)) == 1


def test_the_chain_goes_on_over_epochs_and_depends_on_every_step() -> None:
    digests, counts = step_digests(np.arange(40), np.full(5, 8)), np.full(5, 8)
    whole = chain_value('00' * 16, digests, counts)
    assert chain_value(chain_value('00' * 16, digests[:2], counts[:2]), digests[2:], counts[2:]) == whole
    assert chain_value('00' * 16, digests[::-1], counts) != whole
    assert chain_value('00' * 16, digests, counts - 1) != whole


def test_a_record_survives_its_text_and_damage_is_seen() -> None:
    record = recorded(np.arange(23), [8, 8, 7], shuffle_seed=1)
    text = record.to_text()
    back = ChainRecord.from_text(text)
    assert back is not None and back.to_text() == text and back.counts.tolist() == [8, 8, 7] and back.last_step == 13
    with pytest.raises(ValueError, match='do not lead to the chain value'):
        ChainRecord.from_text(json.dumps({**json.loads(text), 'counts': [[3, 8]]}))
    assert ChainRecord.from_text(json.dumps({**json.loads(text), 'format': 99})) is None


def test_a_text_of_a_long_epoch_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, counts = np.arange(80_000), np.full(10_000, 8)
    whole = recorded(ids, counts.tolist())
    assert len(whole.to_text()) < 12 * 10_000
    monkeypatch.setattr(sample_chain, 'MOST_STEPS', 4000)
    last = recorded(ids, counts.tolist())
    assert (len(last.digests), last.first_step, last.skipped, last.value) == (4000, 6010, 48_000, whole.value)
    back = ChainRecord.from_text(last.to_text())
    assert back is not None and explain_difference(back, Plan(ids)) is None
    text = explain_difference(back, Plan(np.roll(ids, 1)))
    assert text is not None and 'the first step that differs is step 6011 of the run (epoch 0; steps 6011 to 10010 were compared)' in text


def test_what_changed_is_named() -> None:
    ids = np.arange(24)
    record = recorded(ids, [8, 8], **{'data digest': 'ab', 'shuffle_seed': 1, 'rows per step': 8})
    assert explain_difference(record, Plan(ids, **{'data digest': 'ab', 'shuffle_seed': 1, 'rows per step': 4})) is None, 'a setting that leaves the samples as they are may change'
    text = explain_difference(record, Plan(ids[::-1], **{'data digest': 'ab', 'shuffle_seed': 2}))
    assert text is not None and text.endswith('\n  changed: shuffle_seed: 1 -> 2') and '8 other samples than those that it would get now (16, 17, 18' in text
    text = explain_difference(record, Plan(ids, **{'data digest': 'cd', 'shuffle_seed': 1}))
    assert text is not None and 'they are numbers in other data.\n  changed: data digest: ab -> cd' in text
    text = explain_difference(record, Plan(ids[::-1], **{'data digest': 'ab', 'shuffle_seed': 1}))
    assert text is not None and 'none of the settings in the checkpoint changed' in text


def test_a_record_that_began_in_mid_epoch_is_compared_by_its_data_alone() -> None:
    record = ChainRecord(0, 10, None, facts={'data digest': 'ab'})
    record.extend(step_digests(np.arange(8), np.array([8])), np.array([8]))
    assert explain_difference(record, Plan(np.arange(50, 80), **{'data digest': 'ab'})) is None
    assert explain_difference(record, Plan(np.arange(50, 80), **{'data digest': 'cd'})) is not None
