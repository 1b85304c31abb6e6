"""A real disk that is small enough to fill."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Iterator

import pytest

__all__ = ['resize_disk', 'small_disk']


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mounts a tmpfs of ``size`` (``'4m'``) on ``folder``; skips the test where this user may not."""
    folder.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f'a small tmpfs cannot be mounted here, which needs root: {mounted.stderr.strip()}')
    try:
        yield folder
    finally:
        subprocess.run(['umount', str(folder)], check=True)


def resize_disk(folder: Path, size: str) -> None:
    """Gives the disk on ``folder`` another size."""
    subprocess.run(['mount', '-o', f'remount,size={size}', str(folder)], check=True)
