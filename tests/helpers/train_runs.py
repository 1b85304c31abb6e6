"""Tiny training runs: data, configs, and runs in this process or in others."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from tests.helpers.mds import write_token_mds
from tests.helpers.warm_launcher import Job, shared_launcher

__all__ = ['SEQ_LEN', 'losses_in', 'make_data', 'metrics_of', 'run_config', 'run_script', 'start_training', 'tiny_config', 'train_losses']

ROOT = Path(__file__).resolve().parents[2]
SEQ_LEN = 16
VOCAB = 50368


def make_data(folder: Path, num_train: int = 64, num_val: int = 10, seq_len: int = SEQ_LEN, hashes: Sequence[str] = ()) -> Path:
    """Splits ``train`` and ``val`` of random ids from a small alphabet, so that a model learns something in a few steps."""
    rng = np.random.default_rng(0)
    for split, count in (('train', num_train), ('val', num_val)):
        write_token_mds(folder / split, rng.integers(1, 40, size=(count, seq_len)), hashes=hashes)
    return folder


def tiny_config(data: Path, **changes: Any) -> dict[str, Any]:
    """A config for a run of six steps of an MPT with one layer. ``changes`` replaces top-level keys."""
    dataset = {'local': str(data), 'shuffle': True, 'max_seq_len': SEQ_LEN}
    loader = {'name': 'text', 'drop_last': True, 'num_workers': 0}
    config = {
        'model': {
            'name': 'mpt_causal_lm', 'd_model': 16, 'n_heads': 2, 'n_layers': 1, 'expansion_ratio': 2, 'max_seq_len': SEQ_LEN, 'vocab_size': VOCAB, 'no_bias': True,
            'resid_pdrop': 0.1, 'attn_config': {'attn_impl': 'torch', 'alibi': True},
        },
        'tokenizer': {'name': 'llmfoundry://gpt2'},
        'train_loader': {**loader, 'dataset': {**dataset, 'split': 'train'}},
        'optimizer': {'name': 'decoupled_adamw', 'lr': 1e-2},
        'scheduler': {'name': 'constant_with_warmup', 't_warmup': '0ba'},
        'loggers': {'inmemory': {}},
        'max_duration': '6ba', 'max_seq_len': SEQ_LEN, 'global_train_batch_size': 8, 'device_train_microbatch_size': 4, 'precision': 'fp32', 'log_to_console': False,
        'log_config': False, 'python_log_level': 'warning', 'eval_interval': 0,
    }
    return {**config, **copy.deepcopy(changes)}


def run_config(config: dict[str, Any], *overrides: str) -> Any:
    """Trains in this process and returns the Trainer."""
    from llmfoundry.command_utils.train import train
    from llmfoundry.config.load import load_train_config

    trainer = train(load_train_config(config, list(overrides)))
    trainer.close()
    return trainer


def metrics_of(trainer: Any, key: str) -> list[float]:
    """Every value that a run logged under ``key``, in order; the config must have the ``inmemory`` logger."""
    memory = next(d for d in trainer.logger.destinations if type(d).__name__ == 'InMemoryLogger')
    return [float(value) for _, value in memory.data.get(key, [])]


def train_losses(trainer: Any) -> list[float]:
    return metrics_of(trainer, 'loss/train/total')


def start_training(config: dict[str, Any], folder: Path, ranks: int = 1, launcher: bool = True, **env: str) -> Job:
    """Starts the command in a process group of its own, logging metrics to ``folder/metrics.jsonl`` and output to ``folder/out.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'config.yaml'
    path.write_text(json.dumps({**config, 'loggers': {'jsonl': {'path': str(folder / 'metrics.jsonl')}}}))
    return shared_launcher().start(folder, [str(path)], ranks if launcher else None, **env)


def run_script(folder: Path, script: Path, *arguments: object, ranks: int | None = 2, timeout: float = 500) -> str:
    """Runs a script of a test in ``folder`` under Composer's launcher (without it when ``ranks`` is None), and returns what has been printed there."""
    job = shared_launcher().start(folder, [str(a) for a in arguments], ranks, script=script)
    assert job.wait(timeout) == 0, job.output()[-5000:]
    return job.output()


def losses_in(folder: Path) -> dict[int, float]:
    """Step (0-based) -> loss, as the run of ``folder`` logged it last."""
    path = folder / 'metrics.jsonl'
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith('}')] if os.path.exists(path) else []
    return {row['step']: row['loss/train/total'] for row in rows if 'loss/train/total' in row}
