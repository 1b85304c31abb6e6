"""What ``llmfoundry plan`` says against what training takes, on real runs in fresh processes.

    python scripts/train/benchmarking/plan_check.py
    python scripts/train/benchmarking/plan_check.py --only 0 3

Exit code 1 if a row is off by more than 10 %. About two minutes a row on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import table
from plan_runs import RUNS, base_config, measure_run, write_data

TOLERANCE = 0.10


def predict(config_path: Path, devices: int) -> dict[str, Any]:
    """The plan in a process of its own, as a user runs it.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, '-c', 'from llmfoundry.cli import main; main()', 'plan', str(config_path), '--devices', str(devices), '--device', 'cpu', '--json']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout[done.stdout.index('{'):])


def main() -> None:
    """Plans and measures each run, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', type=int, nargs='*', help='rows to run, counted from 0')
    parser.add_argument('--json', help='also write the figures to this file')
    parser.add_argument('--timeout', type=float, default=1800, help='seconds for each training run')
    args = parser.parse_args()
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in args.only or range(len(RUNS)):
            run = RUNS[number]
            write_data(folder, run.seq_len)
            config = base_config(run, folder)
            ranks = measure_run(config, run.processes, folder / str(number), args.timeout)
            planned = predict(folder / str(number) / 'config.yaml', run.processes)
            measured = max(rank['peak_bytes'] for rank in ranks)
            error = planned['total_bytes'] / measured - 1
            worst = max(worst, abs(error))
            rows.append({
                'run': run.name, 'predicted GB': f'{planned["total_bytes"] / 1e9:.2f}', 'measured GB': f'{measured / 1e9:.2f}', 'error': f'{error:+.1%}',
                'in use GB': f'{sum(planned["at_peak_bytes"].values()) / 1e9:.2f}', 'holes GB': f'{planned["allocator_holes_bytes"] / 1e9:.2f}', 'base GB': f'{planned["base_bytes"] / 1e9:.2f}',
            })
            print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows))
    print(f'largest error {worst:.1%}')
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2))
    sys.exit(worst > TOLERANCE)


if __name__ == '__main__':
    main()
