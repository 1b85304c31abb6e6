"""One command for a machine with a CUDA GPU: the GPU tests, then speed, utilisation and memory of MPT models in bf16.

    python scripts/train/benchmarking/gpu.py
    python scripts/train/benchmarking/gpu.py --sizes 1b --compile 1 --no_tests

Needs torch and transformers; Composer, pytest, flash-attn and Liger only for the parts that use them, which are left out with the reason when they are missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_worker import OUT_OF_MEMORY_RC
from measure import MODELS, table

ROOT = Path(__file__).resolve().parents[3]
WORKER = Path(__file__).with_name('gpu_worker.py')
# Sequences of 2,048 tokens per microbatch to start from on a device of 80 GB or more; halved until they fit.
MICROBATCH = {'tiny': 2, '125m': 32, '350m': 16, '760m': 16, '1b': 16, '3b': 8, '7b': 4}
# fp32 weights, gradients and two Adam moments are 16 bytes per parameter; beyond this share of memory the optimiser is left out.
OPTIMIZER_BYTES_PER_PARAM, OPTIMIZER_SHARE = 16, 0.85


def run_tests() -> int | None:
    """Runs tests/gpu; None if pytest is missing."""
    if importlib.util.find_spec('pytest') is None:
        print('GPU tests: left out, pytest is not installed')
        return None
    print('GPU tests:', flush=True)
    return subprocess.run([sys.executable, '-m', 'pytest', '-q', '-rs', str(ROOT / 'tests' / 'gpu')], cwd=ROOT, env=environment()).returncode


def environment() -> dict[str, str]:
    """This checkout first, so that nothing needs to be installed."""
    return {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])), 'PYTORCH_CUDA_ALLOC_CONF': 'expandable_segments:True'}


def has_room_for_optimizer(size: str, device: str) -> bool:
    """Whether AdamW's state fits beside weights and gradients."""
    if device != 'cuda':
        return True
    shape = MODELS[size]
    n_params = 12 * shape['n_layers'] * shape['d_model'] ** 2 + 50368 * shape['d_model']
    return n_params * OPTIMIZER_BYTES_PER_PARAM < OPTIMIZER_SHARE * torch.cuda.get_device_properties(0).total_memory


def measure(variant: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """Runs the worker, with half the microbatch after each out-of-memory error; returns the figures, or None and the reason."""
    variant = dict(variant)
    while True:
        command = [sys.executable, str(WORKER), *(part for key, value in variant.items() for part in (f'--{key}', str(value)))]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=ROOT)
        if done.returncode == 0:
            return {**json.loads(done.stdout.splitlines()[-1]), 'microbatch': variant['microbatch']}, ''
        if done.returncode != OUT_OF_MEMORY_RC or variant['microbatch'] == 1:
            lines = (done.stderr.strip() or done.stdout.strip() or f'exit code {done.returncode}').splitlines()
            return None, lines[-1]
        variant['microbatch'] //= 2
        variant['accum'] *= 2


def row(variant: dict[str, Any], figures: dict[str, Any] | None, reason: str) -> dict[str, str]:
    """One line of the table."""
    line = {
        'model': variant['size'], 'attention': variant['attn'], 'loss': variant['loss'], 'compile': 'yes' if variant['compile'] else 'no', 'microbatch': '', 'tokens/s': '', 'TFLOP/s': '',
        'MFU %': '', 'peak GB': '', 'loss value': '', 'note': reason,
    }
    if figures is None:
        return line
    mfu = '' if figures['mfu'] is None else f'{100 * figures["mfu"]:.1f}'
    return {
        **line, 'microbatch': str(figures['microbatch']), 'tokens/s': f'{figures["tokens_per_s"]:.0f}', 'TFLOP/s': f'{figures["flops_per_s"] / 1e12:.1f}', 'MFU %': mfu,
        'peak GB': f'{figures["peak_bytes"] / 1e9:.1f}', 'loss value': f'{figures["last_loss"]:.4f}', 'note': '' if variant['optimizer'] else 'without optimiser',
    }


def main() -> int:
    """Runs tests and variants; returns 1 if a GPU test failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', nargs='+', default=['125m', '1b', '7b'], choices=sorted(MODELS))
    parser.add_argument('--attn', nargs='+', default=['sdpa', 'flash-attn'], choices=['sdpa', 'flash-attn'])
    parser.add_argument('--loss', nargs='+', default=['fused', 'liger', 'torch'], choices=['fused', 'liger', 'torch'])
    parser.add_argument('--compile', nargs='+', type=int, default=[0, 1], choices=[0, 1])
    parser.add_argument('--seq_len', type=int, default=2048)
    parser.add_argument('--microbatch', type=int, help='sequences per microbatch; default depends on the size')
    parser.add_argument('--accum', type=int, default=2, help='microbatches per optimiser step')
    parser.add_argument('--steps', type=int, default=5, help='timed steps')
    parser.add_argument('--device', default='cuda', choices=['cuda', 'cpu'], help='cpu only tries out the benchmark itself')
    parser.add_argument('--no_tests', action='store_true')
    parser.add_argument('--json', help='also write all figures to this file')
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        print('No CUDA device: nothing to measure. The CPU benchmark is train_step.py.')
        return 2
    rc = 0 if args.no_tests else run_tests()
    rows, figures = [], []
    for size, attn, loss, compiled in itertools.product(args.sizes, args.attn, args.loss, args.compile):
        variant = {
            'size': size, 'attn': attn, 'loss': loss, 'compile': compiled, 'device': args.device, 'seq_len': args.seq_len, 'accum': args.accum, 'steps': args.steps,
            'microbatch': args.microbatch or MICROBATCH[size], 'optimizer': int(has_room_for_optimizer(size, args.device)),
        }
        found, reason = measure(variant)
        figures.append({**variant, **(found or {}), 'skipped': reason})
        rows.append(row(variant, found, reason))
        print(' | '.join(rows[-1].values()), flush=True)
    name = next((f['device'] for f in figures if f.get('n_params')), args.device)
    print(f'\n{name}, torch {torch.__version__}, bf16 autocast, {args.seq_len} tokens; MFU counts 6 N + attention, without causal discount\n{table(rows)}')
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + '\n')
    return 1 if rc else 0


if __name__ == '__main__':
    sys.exit(main())
