"""Concatenation loses, invents and reorders nothing, however the documents are grouped into calls."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfoundry.data.token_concat import cut_unwrapped, cut_wrapped, empty_tokens, separator_warnings

DOCUMENTS = st.lists(st.lists(st.integers(0, 99), max_size=12), max_size=20)


def _groups(documents, sizes):
    sizes = list(sizes) or [1]
    at = n = 0
    while at < len(documents):
        size = sizes[n % len(sizes)]
        yield documents[at : at + size]
        at, n = at + size, n + 1


def _run(documents, length, sizes, wrap):
    leftover, out = empty_tokens(), []
    for group in _groups(documents, sizes):
        tokens = np.array([t for d in group for t in d], dtype=np.int32)
        if wrap:
            samples, leftover = cut_wrapped(leftover, tokens, length)
        else:
            samples, leftover = cut_unwrapped(leftover, tokens, np.array([len(d) for d in group]), length)
        assert samples.shape[1:] == (length,)
        assert len(leftover) < length
        out += samples.tolist()
    return out, leftover.tolist()


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.integers(1, 9), st.lists(st.integers(1, 5), max_size=4))
def test_wrapped_conserves_tokens_and_order(documents, length, sizes):
    samples, leftover = _run(documents, length, sizes, wrap=True)
    assert [t for s in samples for t in s] + leftover == [t for d in documents for t in d]


@settings(max_examples=200, deadline=None)
@given(DOCUMENTS, st.integers(1, 9), st.lists(st.integers(1, 5), max_size=4))
def test_unwrapped_is_the_buffer_that_is_emptied_at_each_cut(documents, length, sizes):
    buffer, expected = [], []
    for document in documents:
        buffer += document
        while len(buffer) >= length:
            expected.append(buffer[:length])
            buffer = []
    assert _run(documents, length, sizes, wrap=False) == (expected, buffer)


def test_separator_warnings_say_what_is_odd():
    assert separator_warnings('', '<eos>', [], [5], False, False) == []
    assert 'is 3 tokens' in separator_warnings('', 'ab', [], [1, 2, 3], False, False)[0]
    assert 'its own BOS' in separator_warnings('<s>', '', [1], [], True, False)[0]
    assert 'its own EOS' in separator_warnings('', '</s>', [], [1], False, True)[0]
    assert 'nothing separates' in separator_warnings('', '', [], [], False, False)[0]


def test_in_process_datasets_agree_with_the_rules():
    from transformers import PreTrainedTokenizerFast

    from llmfoundry.data.concat import ConcatTokensDataset, NoConcatDataset
    from tests.helpers.prepared_data import EOS, expected_tokens, gpt2_tokenizer, random_texts

    texts = random_texts(20)
    rows = [{'text': t} for t in texts]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=gpt2_tokenizer(), eos_token=EOS, bos_token=EOS)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        samples = list(ConcatTokensDataset(rows, tokenizer, 16, eos_text=EOS))
    assert np.array_equal(np.stack([s['tokens'] for s in samples]), expected_tokens(texts, 16))
    assert samples[0]['tokens'].dtype == np.int32
    with pytest.warns(UserWarning, match='nothing separates'):
        ConcatTokensDataset(rows, tokenizer, 16)
    with pytest.warns(UserWarning, match='tokens'):
        ConcatTokensDataset(rows, tokenizer, 16, bos_text='two words')
    with pytest.raises(ValueError, match='max_length must be a positive integer, got 0'):
        ConcatTokensDataset(rows, tokenizer, 0, eos_text=EOS)
    unwrapped = list(ConcatTokensDataset(rows, tokenizer, 16, eos_text=EOS, no_wrap=True))
    assert 0 < len(unwrapped) < len(samples)
    assert list(NoConcatDataset(rows[:2])) == [{'text': t.encode()} for t in texts[:2]]
