"""``llmfoundry validate`` knows every key of a finetuning dataset, with key path and line, without importing torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmfoundry.config.finetuning_block import FinetuningDatasetBlock
from llmfoundry.config.load import load_train_config
from llmfoundry.data.finetuning.dataset_block import HF_KEYS, LOADER_KEYS
from llmfoundry.errors import ConfigError
from tests.config.base_config import BASE, write

LOADER = """\
train_loader:
  name: finetuning
  dataset:
    hf_name: json
    hf_kwargs: {data_dir: ./data}
    split: train
    shuffle: true
    max_seq_len: ${max_seq_len}
    decoder_only_format: true
    packing: true
  drop_last: true
  num_workers: 0
scheduler:
"""
TEXT = BASE[: BASE.index('train_loader:')] + LOADER + BASE[BASE.index('scheduler:\n') + len('scheduler:\n') :]


def report(folder: Path, *overrides: str) -> list[str]:
    try:
        load_train_config(write(folder, TEXT), list(overrides))
    except ConfigError as e:
        return [f'{p.path}: {p.message}' for p in e.problems]
    return []


def test_a_packed_finetuning_config_is_valid_and_keeps_documents_apart(tmp_path: Path) -> None:
    config = load_train_config(write(tmp_path, TEXT), [])
    assert config.model['attn_config']['attn_uses_sequence_id'] is True


@pytest.mark.parametrize(('override', 'expected'), [
    ('target_responses=some', "train_loader.dataset.target_responses: must be 'last' or 'all', got 'some'"),
    ('packing_ratio=0.5', 'train_loader.dataset.packing_ratio: must be at least 1 (one example in each row, which is no packing), got 0.5'),
    ('local=./mds', 'train_loader.dataset.hf_name: cannot be set together with `local`: the data come either from Hugging Face datasets or from MDS shards. Delete one of them'),
    ('pakcing=true', "train_loader.dataset.pakcing: unknown key (did you mean 'packing'?)"),
    ('max_seq_len=many', "train_loader.dataset.max_seq_len: expected an integer or a number, got 'many'"),
    ('hf_kwargs=3', 'train_loader.dataset.hf_kwargs: expected a mapping or null, got 3'),
    ('split=null', 'train_loader.dataset.split: is missing: the split of the Hugging Face dataset, for local files usually `train`'),
    ('max_seq_len=128', 'train_loader.dataset.max_seq_len: must not exceed model.max_seq_len 64, got 128'),
    ('shuffle_algo=3', "train_loader.dataset.shuffle_algo: expected a string, got 3"),
])  # fmt: skip
def test_problems_carry_their_key(tmp_path: Path, override: str, expected: str) -> None:
    found = report(tmp_path, f'train_loader.dataset.{override}')
    assert found == [expected]


def test_streams_are_checked_one_by_one(tmp_path: Path) -> None:
    replaced = {'hf_name': 'null', 'hf_kwargs': 'null', 'streams': '{a: {local: x, proportoin: 2}, b: 3}'}
    found = report(tmp_path, *(f'train_loader.dataset.{key}={value}' for key, value in replaced.items()))
    assert found == ["train_loader.dataset.streams.a.proportoin: unknown key (did you mean 'proportion'?)", 'train_loader.dataset.streams.b: expected a mapping, got 3']


def test_the_typed_block_has_the_keys_that_the_loader_reads() -> None:
    assert set(FinetuningDatasetBlock.model_fields) == {*HF_KEYS, *LOADER_KEYS}


def test_validation_stays_light(tmp_path: Path) -> None:
    code = (
        'import sys; from llmfoundry.config.load import load_train_config; load_train_config(sys.argv[1], []); '
        "print([m for m in ('torch', 'transformers', 'composer', 'streaming', 'datasets', 'numpy') if m in sys.modules])"
    )
    done: Any = subprocess.run([sys.executable, '-c', code, write(tmp_path, TEXT)], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == '[]'
