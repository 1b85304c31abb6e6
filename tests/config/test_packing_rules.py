"""Packing and the model: documents that share a row never see each other, whatever a YAML leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmfoundry.config.load import load_train_config
from llmfoundry.errors import ConfigError
from tests.config.base_config import BASE, write

TEXT_LOADER = BASE[BASE.index('train_loader:') : BASE.index('scheduler:')]
FINETUNING = BASE.replace(TEXT_LOADER, """\
train_loader:
  name: finetuning
  num_workers: 0
  dataset:
    hf_name: json
    split: train
    max_seq_len: 64
    decoder_only_format: true
    shuffle: true
""")


@pytest.mark.parametrize(('override', 'derived'), [
    ('train_loader.dataset.packing=true', True),
    ('train_loader.dataset.packing_ratio=2.5', True),
    ('train_loader.dataset.packing_ratio=auto', True),
    ('train_loader.dataset.packing_ratio=1.0', None),
    ('train_loader.dataset.packing=false', None),
])  # fmt: skip
def test_packing_turns_sequence_ids_on(tmp_path: Path, override: str, derived: bool | None) -> None:
    config = load_train_config(write(tmp_path, FINETUNING), [override])
    assert (config.model.get('attn_config') or {}).get('attn_uses_sequence_id') is derived
    assert any('puts several documents into a row' in note for note in config.notes) is bool(derived)


def test_asking_for_the_opposite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'attn_uses_sequence_id.*must be true.*got False: train_loader.dataset packs several documents'):
        load_train_config(write(tmp_path, FINETUNING), ['train_loader.dataset.packing=true', 'model.attn_config.attn_uses_sequence_id=false'])


def test_rows_are_not_longer_than_the_model_takes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'train_loader.dataset.max_seq_len.*must not exceed model.max_seq_len 16, got 64'):
        load_train_config(write(tmp_path, FINETUNING), ['max_seq_len=16', 'model.max_seq_len=16'])
