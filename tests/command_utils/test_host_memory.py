"""Freed blocks go back to the system, on real memory of a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from llmfoundry.command_utils import host_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='how freed memory is kept is a matter of glibc')

# Blocks as activations are, with something small and lasting behind each; one of them is freed first, as in any training step.
WORK = """
import sys
from llmfoundry.command_utils import host_memory

def resident():
    return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith('VmRSS:'))

print(host_memory.return_freed_blocks() if sys.argv[1] == 'ours' else False)
block = bytearray(b'x') * (24 << 20)
del block
before = resident()
blocks, kept = [], []
for _ in range(20):
    blocks.append(bytearray(b'x') * (8 << 20))
    kept.append(bytearray(b'x') * 200_000)
full = resident() - before
del blocks
print(full, resident() - before)
"""


def _left(who: str, **environment: str) -> tuple[bool, float]:
    """Whether the policy is in force, and the share of the freed memory that the process still holds."""
    env = {**{k: v for k, v in os.environ.items() if k not in host_memory.SET_BY_USERS}, **environment}
    done = subprocess.run([sys.executable, '-c', WORK, who], env=env, capture_output=True, text=True, check=True)
    in_force, full, left = done.stdout.split()
    assert int(full) > 100 << 20
    return in_force == 'True', int(left) / int(full)


def test_freed_blocks_are_returned() -> None:
    in_force, left = _left('ours')
    assert in_force and left < 0.1
    assert _left('default')[1] > 0.5, 'the C library returns them by itself, so this test shows nothing'


@pytest.mark.parametrize('variable', ['MALLOC_MMAP_THRESHOLD_', 'GLIBC_TUNABLES'])
def test_what_users_have_set_stands(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {'GLIBC_TUNABLES': 'glibc.malloc.mmap_threshold=33554432'}.get(variable, '33554432')
    assert _left('ours', **{variable: value})[0] is False
    monkeypatch.setenv(host_memory.HUGE_PAGES, '')
    monkeypatch.delenv(host_memory.HUGE_PAGES)
    monkeypatch.setenv(variable, value)
    host_memory.ask_for_huge_pages()
    assert host_memory.HUGE_PAGES not in os.environ


def test_huge_pages_are_asked_for_unless_the_user_has_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in host_memory.SET_BY_USERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, 'exists', lambda path: False)
    for set_before, after in ((None, '1'), ('0', '0')):
        monkeypatch.setenv(host_memory.HUGE_PAGES, set_before or '')
        if set_before is None:
            monkeypatch.delenv(host_memory.HUGE_PAGES)
        host_memory.ask_for_huge_pages()
        assert os.environ[host_memory.HUGE_PAGES] == after
