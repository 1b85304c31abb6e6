"""``python -m tests.faults``: produces every fault and prints the table. A quarter of an hour on two idle cores."""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.campaign import Row, prepare, produce, table
from tests.faults.kinds import KINDS, Campaign, Fault
from tests.faults.object_store import OBJECT_STORE_KINDS
from tests.helpers.warm_launcher import WarmLauncher


def main() -> int:
    """Runs the campaign; 0 if every fault was survived or refused with its cause."""
    parser = argparse.ArgumentParser(prog='python -m tests.faults', description='Real faults at random moments of real runs; after each, the run is resumed and its final weights compared.')
    parser.add_argument('--seed', type=int, default=None, help='of the random moments (default: another one each time; it is printed)')
    parser.add_argument('--only', default='', help='produce only the kinds whose name contains this')
    parser.add_argument('--cold', action='store_true', help='start every process by the command itself, instead of forking it from one that has imported torch; several times slower')
    parser.add_argument('--table', type=Path, default=None, help='also write the table, in Markdown, to this file')
    parser.add_argument('--keep', action='store_true', help='keep the folders of all faults, not only of those that failed')
    args = parser.parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    faults = [(fault, number) for fault in (*KINDS, *OBJECT_STORE_KINDS) if args.only in fault.name for number in range(fault.times)]
    print(f'{len(faults)} faults, seed {seed}', flush=True)

    folder = Path(tempfile.mkdtemp(prefix='faults-'))
    shared_memory = set(os.listdir('/dev/shm')) if os.path.isdir('/dev/shm') else set()
    start = time.monotonic()

    def one(campaign: Campaign, fault: Fault, number: int) -> Row:
        place = folder / f'{fault.name.replace(" ", "-").replace("(", "").replace(")", "")}-{number}'
        row = produce(campaign, fault, place, random.Random(f'{seed} {fault.name} {number}'))
        print(row.line(), flush=True)
        if row.passed and not args.keep:
            shutil.rmtree(place, ignore_errors=True)
        return row

    with contextlib.nullcontext() if args.cold else WarmLauncher() as launcher:
        campaign = prepare(folder, launcher)
        rows = [one(campaign, *numbered) for numbered in faults]
    left = sorted(set(os.listdir('/dev/shm')) - shared_memory) if shared_memory or os.path.isdir('/dev/shm') else []
    counts = collections.Counter(row.status for row in rows)
    summary = f'{len(rows)} faults in {(time.monotonic() - start) / 60:.0f} minutes, seed {seed}: ' + ', '.join(f'{n} {status}' for status, n in sorted(counts.items()))
    summary += f'; shared memory left behind: {", ".join(left) or "none"}'
    text = f'{table(rows)}\n\n{summary}\n'.replace(f'{folder}/', '')
    print(f'\n{text}')
    if args.table:
        args.table.write_text(text)
    if counts['failed'] or left:
        print(f'the folders of failed faults are in {folder}')
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
