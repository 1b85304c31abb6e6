"""A folder that looks like a fresh clone to the commands run in it, so that what they write stays out of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What a run in this process leaves in its environment, and a shell does not have.
_OF_A_RANK = {'RANK', 'LOCAL_RANK', 'NODE_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'GLOO_SOCKET_IFNAME'}
LINKED = ('llmfoundry', 'scripts', 'yamls', 'mcli', 'launch', 'tests', 'Makefile', 'setup.py', 'README.md', 'requirements')


def make_workspace(folder: Path) -> Path:
    """Links the parts of the repository that documented commands name into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    return folder


def command_environment(**extra: str) -> dict[str, str]:
    """The environment of a user's shell with this interpreter's scripts first on PATH."""
    bin_folder = str(Path(sys.executable).parent)
    shell = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    return {**shell, 'PATH': f"{bin_folder}{os.pathsep}{os.environ['PATH']}", 'HF_HUB_OFFLINE': '1', **extra}


def run_command(command: str | list[str], cwd: Path, timeout: int = 600, **extra: str) -> subprocess.CompletedProcess[str]:
    """Runs a command (a string goes through bash) and returns its output; never raises for a non-zero exit."""
    arguments = ['bash', '-c', command] if isinstance(command, str) else command
    return subprocess.run(arguments, cwd=cwd, env=command_environment(**extra), capture_output=True, text=True, timeout=timeout, check=False)
