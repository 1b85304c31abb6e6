"""Tokenizers and datasets that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path
from typing import Iterator

import pytest
from transformers import PreTrainedTokenizerBase

from llmfoundry.tokenizers import build_tokenizer
from tests.helpers.mds import numbered_samples, write_token_mds


@pytest.fixture(scope='session')
def shared_gpt2() -> PreTrainedTokenizerBase:
    return build_tokenizer('llmfoundry://gpt2', {})


@pytest.fixture
def gpt2(shared_gpt2: PreTrainedTokenizerBase) -> Iterator[PreTrainedTokenizerBase]:
    """GPT-2 without a pad token; the finetuning loader gives it one, which is taken away again."""
    yield shared_gpt2
    shared_gpt2.pad_token = None


@pytest.fixture(scope='session')
def padded_gpt2() -> PreTrainedTokenizerBase:
    return build_tokenizer('llmfoundry://gpt2', {'pad_token': '<|endoftext|>'})


@pytest.fixture(scope='session')
def shared_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the split ``train``: 100 samples of 16 tokens in 6 shards, with sha1 hashes. Not to be changed."""
    root = tmp_path_factory.mktemp('shared_tokens')
    write_token_mds(root / 'train', numbered_samples(100), hashes=['sha1'])
    return root
