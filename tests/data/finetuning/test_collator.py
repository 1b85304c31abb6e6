"""Batches of finetuning examples: layout, masks, padding, counts; and that neither packing nor padding changes what is trained."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfoundry.data.batch_stats import get_tokens_per_batch_func
from llmfoundry.data.finetuning.collator import Document, PackedRow, PackingCollator, RowLayout, Seq2SeqFinetuningCollator, assemble

EOS, PAD = 50256, 50256


def document(*ids: int, trained: int) -> Document:
    """The last ``trained`` ids are targets."""
    return Document(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= len(ids) - trained)


def turn(prompt: list[int], response: list[int]) -> dict[str, Any]:
    return {'input_ids': prompt, 'attention_mask': [1] * len(prompt), 'labels': response}


documents = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda t: Document(np.arange(1, t[0] + 1, dtype=np.int32), np.arange(t[0]) >= t[0] - t[1])), min_size=0, max_size=4,
)


@given(st.lists(documents, min_size=1, max_size=5), st.sampled_from(['left', 'right']))
@settings(max_examples=200, deadline=None)
def test_a_batch_holds_exactly_its_documents(rows: list[list[Document]], side: str) -> None:
    batch = assemble(rows, RowLayout(40, 99, side))
    assert all(batch[key].dtype == torch.int64 and batch[key].shape == (len(rows), 40) for key in ('input_ids', 'labels', 'attention_mask', 'sequence_id'))
    assert torch.equal(batch['sequence_id'] >= 0, batch['attention_mask'].bool())
    for number, row in enumerate(rows):
        ids, labels, sequence = (batch[key][number] for key in ('input_ids', 'labels', 'sequence_id'))
        trained = 0
        for index, doc in enumerate(row):
            here = sequence == index
            assert ids[here].tolist() == doc.ids.tolist()
            expected = np.where(doc.targets, doc.ids, -100)
            assert labels[here][1:].tolist() == expected[1:].tolist()
            # Nothing precedes the first document of a row that is padded on the right, so its label is harmless there.
            assert int(labels[here][0]) == -100 or (index == 0 and side == 'right')
            trained += int(doc.targets[1:].sum())
        assert batch['total_tokens'][number] == sum(len(doc.ids) for doc in row)
        assert batch['loss_generating_tokens'][number] == trained == int((labels[1:] != -100).sum())
        assert ids[sequence == -1].tolist() == [99] * int((sequence == -1).sum()) and (labels[sequence == -1] == -100).all()


def test_a_row_without_documents_counts_nothing_and_attends_to_one_position() -> None:
    batch = assemble([[document(5, 6, 7, trained=1)], []], RowLayout(4, 9, 'right'))
    assert batch['total_tokens'] == [3, 0] and batch['loss_generating_tokens'] == [1, 0]
    assert batch['attention_mask'][1].tolist() == [1, 0, 0, 0] and batch['labels'][1].tolist() == [-100] * 4
    assert get_tokens_per_batch_func()(batch) == {'total': 3, 'loss_generating': 1}


@pytest.fixture
def collator(padded_gpt2: Any) -> Seq2SeqFinetuningCollator:
    return Seq2SeqFinetuningCollator(padded_gpt2, 8, True)


def test_turns_are_stitched_ended_and_padded(collator: Seq2SeqFinetuningCollator) -> None:
    batch = collator([{'turns': [turn([1, 2], [3]), turn([4], [5, 6])]}, {'turns': [turn([1], [2, EOS])]}])
    assert batch['input_ids'].tolist() == [[1, 2, 3, 4, 5, 6, EOS, PAD], [1, 2, EOS, PAD, PAD, PAD, PAD, PAD]]
    assert batch['labels'].tolist() == [[-100] * 4 + [5, 6, EOS, -100], [-100, 2, EOS] + [-100] * 5]
    assert batch['attention_mask'].tolist() == [[1] * 7 + [0], [1] * 3 + [0] * 5]
    assert batch['sequence_id'].tolist() == [[0] * 7 + [-1], [0] * 3 + [-1] * 5]
    assert batch['total_tokens'] == [7, 3] and batch['loss_generating_tokens'] == [3, 2]


def test_target_settings_reach_the_labels(padded_gpt2: Any) -> None:
    example = {'turns': [turn([1, 2], [3]), turn([4], [5])]}
    labels = {
        (prompts, responses): Seq2SeqFinetuningCollator(padded_gpt2, 8, True, responses, prompts)([example])['labels'][0, :6].tolist()
        for prompts in ('none', 'ALL', 'length>=2') for responses in ('last', 'All')
    }
    assert labels == {
        ('none', 'last'): [-100, -100, -100, -100, 5, EOS], ('none', 'All'): [-100, -100, 3, -100, 5, EOS],
        ('ALL', 'last'): [1, 2, -100, 4, 5, EOS], ('ALL', 'All'): [1, 2, 3, 4, 5, EOS],
        ('length>=2', 'last'): [1, 2, -100, -100, 5, EOS], ('length>=2', 'All'): [1, 2, 3, -100, 5, EOS],
    }  # fmt: skip


def test_old_and_stitched_samples_are_read(collator: Seq2SeqFinetuningCollator) -> None:
    old, stitched = turn([1, 2], [3, 4]), {'input_ids': np.array([1, 2, 3]), 'labels': np.array([-100, -100, 3])}
    batch = collator([old, stitched])
    assert batch['input_ids'][:, :5].tolist() == [[1, 2, 3, 4, EOS], [1, 2, 3, PAD, PAD]]
    assert batch['labels'][:, :5].tolist() == [[-100, -100, 3, 4, EOS], [-100, -100, 3, -100, -100]]


def test_long_examples_are_cut_on_the_right_with_one_warning(collator: Seq2SeqFinetuningCollator, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        batch = collator([{'turns': [turn([1, 2, 3], list(range(4, 14)))]}] * 2)
    assert batch['input_ids'].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]] * 2
    assert [r.message for r in caplog.records] == ['An example has 14 tokens and is cut to max_seq_len 8; so will be others, without another warning']


def test_an_example_without_a_trained_token_is_an_error_or_has_no_loss(collator: Seq2SeqFinetuningCollator, padded_gpt2: Any, caplog: pytest.LogCaptureFixture) -> None:
    examples = [{'turns': [turn(list(range(1, 10)), [10])]}, {'turns': [turn([1], [2])]}]
    with pytest.raises(ValueError) as e:
        collator(examples)
    assert str(e.value) == 'of an example with 11 tokens no token is trained after it is cut to max_seq_len 8. Raise max_seq_len, or leave such examples out'
    with caplog.at_level(logging.WARNING):
        batch = Seq2SeqFinetuningCollator(padded_gpt2, 8, True, allow_no_target=True)(examples)
    assert batch['loss_generating_tokens'] == [0, 2] and 'no token is trained' in caplog.text


def test_padding_trims_to_the_batch(padded_gpt2: Any) -> None:
    short = [{'turns': [turn([1], [2])]}]
    longest = Seq2SeqFinetuningCollator(padded_gpt2, 32, True, pad_to_longest=True)
    assert longest(short)['input_ids'].shape == (1, 3)
    trimming = Seq2SeqFinetuningCollator(padded_gpt2, 32, True, allow_pad_trimming=True)
    assert [trimming(short)['input_ids'].shape[1] for _ in range(3)] == [32, 8, 8]


def test_left_padding(padded_gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padded_gpt2, 'padding_side', 'left')
    batch = Seq2SeqFinetuningCollator(padded_gpt2, 6, True, target_prompts='all')([{'turns': [turn([1, 2], [3])]}])
    assert batch['input_ids'].tolist() == [[PAD, PAD, 1, 2, 3, EOS]]
    assert batch['labels'].tolist() == [[-100, -100, -100, 2, 3, EOS]], 'the first token would be predicted from padding'


def test_encoder_decoder_batches_keep_context_and_target_apart(padded_gpt2: Any, caplog: pytest.LogCaptureFixture) -> None:
    collator = Seq2SeqFinetuningCollator(padded_gpt2, 4, False)
    with caplog.at_level(logging.WARNING):
        batch = collator([{'turns': [turn([1, 2], [3])]}, {'turns': [turn([1, 2, 3, 4, EOS], [5, 6, 7, 8])]}])
    assert batch['input_ids'].tolist() == [[1, 2, PAD, PAD], [1, 2, 3, EOS]]
    assert batch['attention_mask'].tolist() == [[1, 1, 0, 0], [1] * 4]
    assert batch['labels'].tolist() == [[3, EOS, -100, -100], [5, 6, 7, EOS]]
    assert batch['decoder_input_ids'].tolist() == [[PAD, 3, EOS, PAD], [PAD, 5, 6, 7]]
    assert batch['decoder_attention_mask'].tolist() == [[1, 1, 0, 0], [1] * 4]
    assert batch['total_tokens'] == [4, 8] and batch['loss_generating_tokens'] == [2, 4] and 'sequence_id' not in batch
    assert [r.message.split(' of an')[0] for r in caplog.records[1:]] == ['The context', 'The target']


def test_an_encoder_decoder_row_without_documents(padded_gpt2: Any) -> None:
    batch = Seq2SeqFinetuningCollator(padded_gpt2, 4, False)([PackedRow((document(1, 2, trained=1),)), PackedRow(())])
    assert batch['total_tokens'] == [3, 0] and batch['loss_generating_tokens'] == [2, 0] and batch['attention_mask'].sum(-1).tolist() == [1, 1]


def test_packing_a_batch_keeps_every_trained_token(padded_gpt2: Any) -> None:
    rng = np.random.default_rng(0)
    examples = [{'turns': [turn(rng.integers(1, 99, rng.integers(1, 6)).tolist(), rng.integers(100, 199, rng.integers(1, 6)).tolist())]} for _ in range(40)]
    apart, together = Seq2SeqFinetuningCollator(padded_gpt2, 24, True), PackingCollator(Seq2SeqFinetuningCollator(padded_gpt2, 24, True))
    one, packed = apart(examples), together(examples)
    assert len(packed['input_ids']) < 20
    assert sum(one['total_tokens']) == sum(packed['total_tokens']) and sum(one['loss_generating_tokens']) == sum(packed['loss_generating_tokens'])
    assert int((packed['sequence_id'].amax(-1) + 1).sum()) == 40
    assert sorted(one['labels'][one['labels'] != -100].tolist()) == sorted(packed['labels'][packed['labels'] != -100].tolist())


def test_metadata_is_added_and_may_not_shadow_the_model(padded_gpt2: Any) -> None:
    assert Seq2SeqFinetuningCollator(padded_gpt2, 8, True, batch_metadata={'task': 'x'})([{'turns': [turn([1], [2])]}])['task'] == 'x'
    with pytest.raises(ValueError) as e:
        Seq2SeqFinetuningCollator(padded_gpt2, 8, True, batch_metadata={'labels': 1, 'task': 2})
    assert str(e.value) == 'batch_metadata has keys that the model reads from the batch: labels. Rename them'


def test_settings_that_cannot_work(gpt2: Any, padded_gpt2: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="has no pad token, which fills up rows. Set tokenizer.kwargs.pad_token, for example to '<|endoftext|>'"):
        Seq2SeqFinetuningCollator(gpt2, 8, True)
    with pytest.raises(ValueError, match='encoder_decoder'):
        Seq2SeqFinetuningCollator(padded_gpt2, 8, False, target_prompts='all')
    with pytest.raises(ValueError, match="must have `turns`, or `input_ids` and `labels`, got the keys \\['text'\\]"):
        Seq2SeqFinetuningCollator(padded_gpt2, 8, True)([{'text': 'x'}])
    with caplog.at_level(logging.WARNING):
        Seq2SeqFinetuningCollator(padded_gpt2, 12, True)
    assert 'max_seq_len is 12; tensor cores are fastest with a multiple of 8' in caplog.text
