"""How long training stands still for a checkpoint: saved while it waits, and in the background, in turn, in one run of the training command.

The checkpoint is a real one (weights, two moments of Adam, loader position, tokenizer) on a real disk, flushed. The stall is the time that the saver keeps the training loop; what the thread of
a background save takes from the steps beside it, on a machine whose cores are all busy, is shown apart.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from composer import Callback
from composer.core import State
from composer.loggers import Logger
from streaming import MDSWriter

from llmfoundry.callbacks.checkpoint_saver import AtomicCheckpointSaver
from llmfoundry.command_utils import train_parts
from llmfoundry.command_utils.train import train
from llmfoundry.config.load import load_train_config

__all__ = ['measure_stalls']

VOCAB = 50368
# The first step allocates the optimiser's state, and the first background save its buffers.
WARM_UP_STEPS = 2


class _SaveInTurn(Callback):
    """After each step one save, in turn blocking and in the background; a background one is followed by steps until it has ended."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.stalls: dict[bool, list[float]] = {False: [], True: []}
        self.writing: list[float] = []
        self.steps: dict[bool, list[float]] = {False: [], True: []}
        self._started = self._saved = 0.0

    def batch_start(self, state: State, logger: Logger) -> None:
        del state, logger
        self._started = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        saver = next(c for c in state.callbacks if isinstance(c, AtomicCheckpointSaver))
        busy = saver.is_saving
        if int(state.timestamp.batch) > WARM_UP_STEPS:
            self.steps[busy].append(time.perf_counter() - self._started)
        if busy:
            return
        if self._saved:
            self.writing.append(time.perf_counter() - self._saved)
            self._saved = 0.0
        if int(state.timestamp.batch) < WARM_UP_STEPS or len(self.stalls[True]) > self.rounds:
            if len(self.stalls[True]) > self.rounds:
                state.stop_training()
            return
        background = len(self.stalls[False]) > len(self.stalls[True])
        saver.in_background = background
        start = time.perf_counter()
        saver._save_checkpoint(state, logger)
        self.stalls[background].append(time.perf_counter() - start)
        self._saved = start if background else 0.0


def _config(folder: Path, model: dict[str, int], seq_len: int) -> dict[str, Any]:
    with MDSWriter(out=str(folder / 'data' / 'train'), columns={'tokens': f'ndarray:int32:{seq_len}'}) as writer:
        for row in np.random.default_rng(0).integers(0, 50257, size=(4096, seq_len), dtype=np.int32):
            writer.write({'tokens': row})
    return {
        'model': {'name': 'mpt_causal_lm', **model, 'expansion_ratio': 4, 'max_seq_len': seq_len, 'vocab_size': VOCAB, 'no_bias': True, 'attn_config': {'attn_impl': 'torch', 'alibi': True}},
        'tokenizer': {'name': 'llmfoundry://gpt2'}, 'optimizer': {'name': 'decoupled_adamw', 'lr': 1e-4}, 'scheduler': {'name': 'constant_with_warmup', 't_warmup': '0ba'},
        'train_loader': {'name': 'text', 'drop_last': True, 'num_workers': 0, 'dataset': {'local': str(folder / 'data'), 'split': 'train', 'shuffle': False, 'max_seq_len': seq_len}},
        'max_duration': '100000ba', 'max_seq_len': seq_len, 'global_train_batch_size': 1, 'device_train_microbatch_size': 1, 'precision': 'fp32', 'eval_interval': 0,
        'log_to_console': False, 'log_config': False, 'python_log_level': 'warning', 'save_folder': str(folder / 'checkpoints'), 'save_interval': '100000ba', 'save_overwrite': True,
        'save_num_checkpoints_to_keep': 1,
    }  # fmt: skip


def measure_stalls(name: str, model: dict[str, int], rounds: int, seq_len: int, folder: str | None) -> None:
    """Trains, saves in turn, and prints the figures.

    Args:
        name: of the size of the MPT.
        model: its keys that differ from size to size.
        rounds: measured saves of each kind; one more of each comes first.
        seq_len: tokens per sample.
        folder: where to write, to choose the disk; None for the temp folder.
    """
    measure = _SaveInTurn(rounds)
    own_callbacks = train_parts.own_callbacks
    train_parts.own_callbacks = lambda cfg: [*own_callbacks(cfg), measure]
    with tempfile.TemporaryDirectory(dir=folder, prefix='save-stall-') as work:
        trainer = train(load_train_config(_config(Path(work), model, seq_len), []))
        newest = max((p for p in (Path(work) / 'checkpoints').iterdir() if not p.is_symlink()), key=os.path.getmtime)
        size = newest.stat().st_size
        trainer.close()
    _report(measure, name, size)


def _report(measure: _SaveInTurn, size: str, checkpoint_bytes: int) -> None:
    blocking, background = (measure.stalls[kind][1:] for kind in (False, True))
    print(f'\nMPT-{size}, checkpoint of {checkpoint_bytes / 1e9:.2f} GB; the first save of each kind is left out (background: {measure.stalls[True][0]:.2f} s, with fresh buffers)')
    print(f'  blocking save          {statistics.median(blocking):7.2f} s   ({", ".join(f"{t:.2f}" for t in blocking)})')
    print(f'  stall, in background   {statistics.median(background):7.2f} s   ({", ".join(f"{t:.2f}" for t in background)})')
    print(f'  ratio                  {statistics.median(background) / statistics.median(blocking):7.2f}')
    print(f'  until it is on disk    {statistics.median(measure.writing[1:]):7.2f} s')
    if measure.steps[True]:
        print(f'  a step meanwhile       {statistics.median(measure.steps[True]):7.2f} s   (otherwise {statistics.median(measure.steps[False]):.2f} s)')
