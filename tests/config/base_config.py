"""The smallest training config that is valid, as text (so that lines are known), and a loader that returns its problems."""

from __future__ import annotations

from pathlib import Path

from llmfoundry.config.load import load_train_config
from llmfoundry.errors import ConfigError

BASE = """\
variables:
  data_local: ./data
max_seq_len: 64
model:
  name: mpt_causal_lm
  d_model: 16
  n_heads: 2
  n_layers: 2
  max_seq_len: ${max_seq_len}
  vocab_size: 512
  attn_config:
    attn_impl: torch
tokenizer:
  name: llmfoundry://gpt2
  kwargs:
    model_max_length: ${max_seq_len}
train_loader:
  name: text
  dataset:
    local: ${variables.data_local}
    split: train
    shuffle: true
    max_seq_len: ${max_seq_len}
  drop_last: true
  num_workers: 0
scheduler:
  name: cosine_with_warmup
  t_warmup: 2ba
  alpha_f: 0.1
optimizer:
  name: decoupled_adamw
  lr: 6e-4
  betas: [0.9, 0.95]
algorithms:
  gradient_clipping:
    clipping_type: norm
    clipping_threshold: 1.0
max_duration: 10ba
global_train_batch_size: 8
device_train_microbatch_size: 4
precision: amp_bf16
callbacks:
  lr_monitor: {}
  speed_monitor:
    window_size: 10
"""


def write(folder: Path, text: str = BASE) -> str:
    """Writes a config file and returns its path."""
    path = folder / 'c.yaml'
    path.write_text(text, encoding='utf-8')
    return str(path)


def edited(*edits: tuple[str, str]) -> str:
    """The base config with replacements, each of which must apply once."""
    text = BASE
    for old, new in edits:
        assert text.count(old) == 1, f'{old!r} occurs {text.count(old)} times'
        text = text.replace(old, new)
    return text


def problems_of(folder: Path, text: str = BASE, overrides: tuple[str, ...] = ()) -> list[str]:
    """One line per problem, with the folder removed from file names; empty when the config is valid."""
    try:
        load_train_config(write(folder, text), list(overrides))
    except ConfigError as e:
        return [str(p).replace(f'{folder}/', '') for p in e.problems]
    return []
