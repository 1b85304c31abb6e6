"""Documented commands run one after another: each is printed, timed, and skipped when its result is there.

The steps are real processes, because that is what they are for users; the price, importing torch several times, is about 10 s each.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

__all__ = ['ROOT', 'Step', 'run_steps']

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Step:
    """One command: ``done`` is the file whose presence means that it need not run again."""

    title: str
    command: list[str]
    done: Path


def run_steps(steps: Sequence[Step], folder: Path) -> None:
    """Runs the steps that are not done yet; a step without an output file gets an empty one.

    Raises:
        SystemExit: with the exit code of the step that failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, 1):
        print(f'\n== {number}/{len(steps)} {step.title}', flush=True)
        if step.done.exists():
            print(f'   already done ({step.done}); delete {folder} to start again', flush=True)
            continue
        _run_step(step)


def _run_step(step: Step) -> None:
    shown = ' '.join(part if '\n' not in part else "'...'" for part in step.command)
    print(f'   $ {shown}', flush=True)
    began = time.monotonic()
    environment = {**os.environ, 'HF_HUB_OFFLINE': '1', 'TRANSFORMERS_NO_ADVISORY_WARNINGS': '1'}
    code = subprocess.run(step.command, cwd=ROOT, env=environment, check=False).returncode
    if code != 0:
        sys.exit(f'step failed with exit code {code}: {shown}')
    if not step.done.exists():
        step.done.parent.mkdir(parents=True, exist_ok=True)
        step.done.touch()
    print(f'   took {time.monotonic() - began:.0f} s', flush=True)
