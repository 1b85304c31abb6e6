"""Runs every command that README.md prints, in order, as a reader would."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.helpers.workspace import ROOT, make_workspace, run_command

BLOCK = re.compile(r'^```bash\n(.*?)^```', re.MULTILINE | re.DOTALL)
# `make test` is what runs this file.
NOT_RUN = ['make test']
NUMBER_OF_COMMANDS = 17


def readme_commands() -> list[str]:
    """The lines of all bash blocks of the README."""
    blocks = BLOCK.findall((ROOT / 'README.md').read_text(encoding='utf-8'))
    return [line.strip() for block in blocks for line in block.splitlines() if line.strip() and not line.startswith('#')]


def test_the_number_of_commands() -> None:
    """A new README command must be run here; this number is changed by hand so that none slips out of the pattern."""
    commands = readme_commands()
    assert len(commands) == NUMBER_OF_COMMANDS + len(NOT_RUN)
    assert [c for c in commands if c in NOT_RUN] == NOT_RUN


@pytest.mark.slow
def test_readme_commands_run(tmp_path: Path) -> None:
    workspace = make_workspace(tmp_path / 'clone')
    ran = 0
    for command in readme_commands():
        if command in NOT_RUN:
            continue
        if command == 'make quickstart':
            check_quickstart(workspace)
        else:
            result = run_command(command, workspace)
            assert result.returncode == 0, f'{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}'
        ran += 1
    assert ran == NUMBER_OF_COMMANDS
    generated = run_command(
        'python scripts/inference/hf_generate.py --name_or_path my-hf-model --prompts "It is a truth" --max_new_tokens 5 --trust_remote_code true', workspace,
    )
    assert 'It is a truth' in generated.stdout


def check_quickstart(workspace: Path) -> None:
    """The whole quickstart with the environment that runs the tests: loss falls, the plot is a picture, a second run skips everything."""
    command = f'make quickstart VENV={sys.prefix} -o {sys.prefix}/.installed'
    first = run_command(command, workspace, timeout=900)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    match = re.search(r'validation loss: ([\d.]+) before training, ([\d.]+) after', first.stdout)
    assert match, first.stdout[-2000:]
    before, after = map(float, match.groups())
    assert 10.5 < before < 11.2
    assert after < 5.9
    assert (workspace / 'quickstart' / 'loss.png').read_bytes().startswith(b'\x89PNG')
    sample = (workspace / 'quickstart' / 'sample.txt').read_text()
    assert sample.startswith('It is a truth universally acknowledged') and len(sample) > 200

    second = run_command(command, workspace, timeout=120)
    assert second.returncode == 0
    assert second.stdout.count('already done') == 4
