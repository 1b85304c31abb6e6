"""Rows prepared elsewhere in which everything is trained: labels that equal their ids are labels, not a response that repeats the prompt."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from llmfoundry.data.finetuning.hf_dataset import build_token_store
from llmfoundry.data.finetuning.preprocessing import register
from tests.helpers.tokenizers import gpt2_tokenizer

IDS = [464, 3139, 286, 4881, 318, 6342, 13]


@register('tests/echo')
def _echo(row: dict, tokenizer: object) -> dict:
    return {'input_ids': row['input_ids'], 'labels': row['labels']}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('LLMFOUNDRY_CACHE', str(tmp_path / 'cache'))


@pytest.mark.parametrize(('function', 'ids', 'trained'), [(None, IDS, len(IDS) - 1), ('tests/echo', [*IDS, *IDS, 50256], len(IDS) + 1)])
def test_labels_equal_to_ids(function: str | None, ids: list[int], trained: int, tmp_path: Path) -> None:
    """Columns stand side by side; a tokenising function, which returns a prompt and a response, may really mean that the model is to repeat what it reads."""
    path = tmp_path / 'rows.parquet'
    datasets.Dataset.from_list([{'input_ids': IDS, 'labels': IDS}]).to_parquet(str(path))
    store = build_token_store(gpt2_tokenizer(), 'parquet', 'train', 64, {'data_files': {'train': str(path)}}, preprocessing_fn=function)
    found, targets = store.row(0)
    assert found.tolist() == ids and int(targets.sum()) == trained
