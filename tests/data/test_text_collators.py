"""Batches of text: labels, sequence ids, token counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfoundry.data.batch_stats import LossGeneratingTokensCollatorWrapper, get_tokens_per_batch_func
from llmfoundry.data.text_collators import CausalTextCollator, ConcatenatedSequenceCollatorWrapper, sequence_ids

EOS = 9


def example(ids: list[int], num_real: int | None = None) -> dict[str, torch.Tensor]:
    num_real = len(ids) if num_real is None else num_real
    return {'input_ids': torch.tensor(ids), 'attention_mask': torch.tensor([1] * num_real + [0] * (len(ids) - num_real))}


def test_sequence_ids_of_documents_that_end_with_eos() -> None:
    collate = ConcatenatedSequenceCollatorWrapper(CausalTextCollator(), eos_token_id=EOS)
    assert collate([example([1, 2, EOS, 3, EOS, EOS, 4])])['sequence_id'].tolist() == [[0, 0, 0, 1, 1, 2, 3]]


def test_sequence_ids_of_documents_that_begin_with_bos() -> None:
    collate = ConcatenatedSequenceCollatorWrapper(CausalTextCollator(), bos_token_id=EOS)
    assert collate([example([1, 2, EOS, 3, EOS, EOS, 4])])['sequence_id'].tolist() == [[0, 0, 1, 1, 2, 3, 3]]


def test_exactly_one_separator() -> None:
    with pytest.raises(ValueError, match='got neither$'):
        ConcatenatedSequenceCollatorWrapper(CausalTextCollator())
    with pytest.raises(ValueError, match='got 0 and 0$'):
        ConcatenatedSequenceCollatorWrapper(CausalTextCollator(), eos_token_id=0, bos_token_id=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=12, max_size=12), min_size=1, max_size=4), st.booleans())
def test_a_document_is_a_run_between_separators(rows: list[list[int]], starts: bool) -> None:
    result = sequence_ids(torch.tensor(rows), 3, starts)
    for row, ids in zip(rows, result.tolist(), strict=True):
        assert ids[0] == (1 if starts and row[0] == 3 else 0)
        for position in range(1, len(row)):
            new_document = row[position] == 3 if starts else row[position - 1] == 3
            assert ids[position] - ids[position - 1] == int(new_document)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 10), min_size=1, max_size=8), st.integers(1, 4))
def test_counts_are_those_of_the_labels_and_add_up_over_microbatches(real_tokens: list[int], microbatch: int) -> None:
    from composer.core.data_spec import _default_split_batch

    batch = LossGeneratingTokensCollatorWrapper(CausalTextCollator())([example(list(range(10)), n) for n in real_tokens])
    count = get_tokens_per_batch_func()
    whole = count(batch)
    assert whole == {'total': sum(real_tokens), 'loss_generating': sum(max(n - 1, 0) for n in real_tokens)}
    assert count({k: v for k, v in batch.items() if 'tokens' not in k}) == whole
    parts = [count(part) for part in _default_split_batch(dict(batch), microbatch)]
    assert {key: sum(p[key] for p in parts) for key in whole} == whole


def test_custom_counts_are_kept_per_row() -> None:
    wrapper = LossGeneratingTokensCollatorWrapper(CausalTextCollator(), lambda row: {'total': 7, 'loss_generating': int(row['input_ids'][0, 0])})
    batch = wrapper([example([3, 1]), example([5, 1])])
    assert batch['total_tokens'] == [7, 7] and batch['loss_generating_tokens'] == [3, 5]


def test_counts_without_labels_masks_or_keys() -> None:
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert get_tokens_per_batch_func()({'input_ids': ids}) == 10
    assert get_tokens_per_batch_func(decoder_only=False)({'input_ids': ids, 'decoder_attention_mask': torch.ones(2, 3)}) == 16
    labels = torch.tensor([[1, -100, 2]])
    enc_dec = {'attention_mask': torch.ones(1, 3), 'decoder_attention_mask': torch.ones(1, 3), 'labels': labels}
    assert get_tokens_per_batch_func(decoder_only=False)(enc_dec) == {'total': 6, 'loss_generating': 2}
    with pytest.raises(ValueError, match='mapping with attention_mask or input_ids'):
        get_tokens_per_batch_func()({'pixels': ids})
    with pytest.raises(ValueError, match='must have decoder_attention_mask'):
        get_tokens_per_batch_func(decoder_only=False)({'input_ids': ids})
