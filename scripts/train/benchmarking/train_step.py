"""Speed and memory of MPT's forward and backward pass on this CPU, against its matrix-product rate and, with ``--peer``, another llmfoundry.

    python scripts/train/benchmarking/train_step.py
    python scripts/train/benchmarking/train_step.py --peer /path/to/other/python

Every measurement is a fresh process. Rounds alternate between the sides, so that a busy machine is unfair to both; the best round counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import MODELS, table

WORKER = Path(__file__).with_name('step_worker.py')


def measure(python: str, options: dict[str, Any]) -> dict[str, Any]:
    """Runs the worker in ``python`` and returns its figures.

    Raises:
        SystemExit: the worker failed; its last lines are shown.
    """
    command = [python, str(WORKER), *(part for key, value in options.items() for part in (f'--{key}', str(value)))]
    # The interpreter's own packages, not this checkout, and every core.
    env = {key: value for key, value in os.environ.items() if key not in ('PYTHONPATH', 'OMP_NUM_THREADS')}
    with tempfile.TemporaryDirectory() as cwd:
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
    if done.returncode != 0:
        sys.exit(f'{python} failed on {options}:\n' + '\n'.join(done.stderr.splitlines()[-15:]))
    return json.loads(done.stdout.splitlines()[-1])


def best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest round, against the best matrix-product rate that any round saw."""
    fastest = max(rounds, key=lambda r: r['tokens_per_s'])
    rate = max(r['matmul_flops_per_s'] for r in rounds)
    flops_per_s = fastest['fraction_of_matmul'] * fastest['matmul_flops_per_s']
    return {**fastest, 'matmul_flops_per_s': rate, 'fraction_of_matmul': flops_per_s / rate, 'peak_rss_bytes': min(r['peak_rss_bytes'] for r in rounds)}


def row(name: str, figures: dict[str, Any]) -> dict[str, str]:
    """One line of the table."""
    return {
        'side': name,
        'precision': figures['precision'],
        'tokens/s': f'{figures["tokens_per_s"]:.1f}',
        'GEMM GFLOP/s (fp32)': f'{figures["matmul_flops_per_s"] / 1e9:.0f}',
        'of GEMM rate': f'{figures["fraction_of_matmul"]:.2f}',
        'peak RSS GB': f'{figures["peak_rss_bytes"] / 1e9:.2f}',
        'loss': f'{figures["loss"]:.4f}',
    }


def main() -> None:
    """Measures every side and precision in turn, prints a table and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--peer', help='another Python interpreter whose llmfoundry is measured the same way')
    parser.add_argument('--size', default='125m', choices=sorted(MODELS))
    parser.add_argument('--batch_size', type=int, default=2, help='sequences per step')
    parser.add_argument('--seq_len', type=int, default=1024, help='tokens per sequence')
    parser.add_argument('--steps', type=int, default=3, help='timed steps per process')
    parser.add_argument('--rounds', type=int, default=1, help='processes per side and precision')
    parser.add_argument('--precisions', nargs='+', default=['fp32', 'amp_bf16'], choices=['fp32', 'amp_bf16'])
    parser.add_argument('--attn_impl', default='flash', help='ours; the peer runs torch, which is what it has on a CPU')
    parser.add_argument('--loss_fn', default='fused_crossentropy', help='ours; the peer runs torch_crossentropy, which is what it has on a CPU')
    parser.add_argument('--json', help='also write the figures to this file')
    args = parser.parse_args()

    shared = {'size': args.size, 'batch_size': args.batch_size, 'seq_len': args.seq_len, 'steps': args.steps}
    sides = {'ours': (sys.executable, {'attn_impl': args.attn_impl, 'loss_fn': args.loss_fn})}
    if args.peer:
        sides['peer'] = (args.peer, {'attn_impl': 'torch', 'loss_fn': 'torch_crossentropy'})
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for number in range(args.rounds):
        for precision in args.precisions:
            for side, (python, options) in sides.items():
                print(f'round {number + 1}/{args.rounds}: {side}, {precision} ...', file=sys.stderr, flush=True)
                results.setdefault((side, precision), []).append(measure(python, {**shared, **options, 'precision': precision}))
    figures = {key: best(rounds) for key, rounds in results.items()}
    print(f'MPT-{args.size}, {args.batch_size} x {args.seq_len} tokens, forward + backward, {figures["ours", args.precisions[0]]["threads"]} threads')
    print(table([row(f'{side}', f) for (side, _), f in figures.items()]))
    print_ratios(figures, args.precisions)
    if args.json:
        Path(args.json).write_text(json.dumps({f'{side}/{precision}': f for (side, precision), f in figures.items()}, indent=2) + '\n')


def print_ratios(figures: dict[tuple[str, str], dict[str, Any]], precisions: list[str]) -> None:
    """amp_bf16 over fp32, and ours over the peer's."""
    if len(precisions) == 2:
        ratio = figures['ours', 'amp_bf16']['tokens_per_s'] / figures['ours', 'fp32']['tokens_per_s']
        print(f'ours: amp_bf16 is {ratio:.2f} times as fast as fp32')
    for precision in precisions:
        if ('peer', precision) in figures:
            ours, peer = figures['ours', precision], figures['peer', precision]
            print(
                f'{precision}: ours is {ours["tokens_per_s"] / peer["tokens_per_s"]:.2f} times as fast as the peer, '
                f'with {ours["peak_rss_bytes"] / peer["peak_rss_bytes"]:.2f} of its peak memory',
            )


if __name__ == '__main__':
    main()
