"""Two processes on this machine's cores against one process on the same cores: the same model, data and global batch, through the composer launcher and our ``train``.

    python scripts/train/benchmarking/two_processes.py

Rounds alternate between the sides, so that a busy machine is unfair to all. A step's figure is the median of the steps after the first, the slowest rank's; the ratio of a round compares its own
neighbours, and the median of the ratios counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import table
from plan_runs import SHARDED, Run, base_config, measure_run, write_data

ONE, DDP, FSDP2 = 'one process', 'two processes, DDP', 'two processes, FSDP2'


def config_of(side: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The config of one side; only ``fsdp_config`` differs."""
    run = Run(side, seq_len=args.seq_len, microbatch=args.microbatch, changes={'precision': args.precision, 'max_duration': f'{args.steps + 1}ba', **({'fsdp_config': SHARDED} if side == FSDP2 else {})})
    return {**base_config(run, folder), 'global_train_batch_size': args.global_batch}


def step_seconds(ranks: list[dict[str, Any]]) -> float:
    """Median over the steps after the first, of the slowest rank."""
    return statistics.median(max(times) for times in list(zip(*(rank['step_seconds'] for rank in ranks), strict=True))[1:])


def main() -> None:
    """Runs the rounds and prints the table and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--steps', type=int, default=2, help='timed steps of each run; one more comes before them')
    parser.add_argument('--global_batch', type=int, default=16, help='sequences per step over all processes')
    parser.add_argument('--microbatch', type=int, default=2, help='sequences per forward pass')
    parser.add_argument('--seq_len', type=int, default=512)
    parser.add_argument('--precision', default='amp_bf16', choices=('amp_bf16', 'fp32'))
    parser.add_argument('--fsdp2', action='store_true', help='measure FSDP2 too, in the first round')
    parser.add_argument('--json', help='also write the figures to this file')
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    seconds: dict[str, list[float]] = {ONE: [], DDP: []}
    threads = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder, args.seq_len)
        for number in range(args.rounds):
            sides = [ONE, DDP] if number % 2 == 0 else [DDP, ONE]
            for side in sides + ([FSDP2] if args.fsdp2 and number == 0 else []):
                print(f'round {number + 1}/{args.rounds}: {side} ...', file=sys.stderr, flush=True)
                ranks = measure_run(config_of(side, args, folder), 1 if side == ONE else 2, folder / f'{number}-{side.replace(" ", "-")}', timeout=1800)
                seconds.setdefault(side, []).append(step_seconds(ranks))
                threads[side] = ranks[0]['threads']
    tokens = args.global_batch * args.seq_len
    print(f'MPT-125M {args.precision}, global batch {args.global_batch} x {args.seq_len} tokens, microbatch {args.microbatch}, {cores} cores')
    print(table([
        {'side': side, 'threads per process': threads[side], 's/step (median)': f'{statistics.median(found):.2f}', 'tokens/s': f'{tokens / statistics.median(found):.0f}'}
        for side, found in seconds.items()
    ]))
    ratios = [one / two for one, two in zip(seconds[ONE], seconds[DDP], strict=True)]
    print(f'throughput of two processes (DDP) over one: {statistics.median(ratios):.3f} (rounds: {", ".join(f"{r:.3f}" for r in ratios)})')
    if args.json:
        Path(args.json).write_text(json.dumps({'seconds': seconds, 'ratios': ratios, 'arguments': vars(args)}, indent=2))


if __name__ == '__main__':
    main()
