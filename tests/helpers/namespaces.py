"""Two machines on one: network namespaces with addresses of their own, joined by a cable that can be cut."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

import pytest

from tests.helpers.workspace import command_environment

__all__ = ['Node', 'enter_node', 'two_nodes']

_CLONE_NEWNET, _CLONE_NEWUTS, _CLONE_NEWNS = 0x40000000, 0x04000000, 0x00020000  # linux/sched.h


@dataclass(frozen=True)
class Node:
    """One end of the cable: a namespace, its address and its interface."""

    name: str
    address: str
    interface: str

    def start(self, command: Sequence[str], folder: Path, **env: str) -> subprocess.Popen:
        """Starts a command on this node, in a process group of its own; output goes to ``folder/out.txt``.

        It sees a /dev/shm and a host name of its own, as it would on another machine.
        """
        folder.mkdir(parents=True, exist_ok=True)
        own = f'mount -t tmpfs tmpfs /dev/shm && hostname {self.name} && exec "$@"'
        with (folder / 'out.txt').open('a') as out:
            return subprocess.Popen(
                ['ip', 'netns', 'exec', self.name, 'unshare', '--uts', '--mount', 'bash', '-c', own, 'bash', *command], cwd=folder, env=command_environment(**env), stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def set_link(self, state: str) -> None:
        """Cuts the cable (``'down'``) or mends it (``'up'``)."""
        _ip('-n', self.name, 'link', 'set', self.interface, state)

    def processes(self) -> list[str]:
        """Ids of the processes that are left on this node."""
        return subprocess.run(['ip', 'netns', 'pids', self.name], capture_output=True, text=True, check=False).stdout.split()


def enter_node(name: str) -> None:
    """Moves this process, which must have one thread, to a node; what ``Node.start`` does before it starts a command.

    Raises:
        OSError: the kernel refused it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f'/run/netns/{name}') as namespace:
        if libc.setns(namespace.fileno(), _CLONE_NEWNET) or libc.unshare(_CLONE_NEWUTS | _CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), f'{name} cannot be entered')
    for arguments in (['--make-rprivate', '/'], ['-t', 'sysfs', 'sysfs', '/sys'], ['-t', 'tmpfs', 'tmpfs', '/dev/shm']):
        subprocess.run(['mount', *arguments], check=True)
    socket.sethostname(name)


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Node 0 and node 1 with a cable between them; skips the test where this user may not make namespaces. Kills what is left on them and removes them."""
    if sys.platform != 'linux' or shutil.which('ip') is None or os.geteuid() != 0:
        pytest.skip('network namespaces need Linux, the program ip (iproute2) and root')
    suffix = secrets.token_hex(3)
    subnet = f'10.77.{secrets.randbelow(256)}'  # each namespace has its own routes, so tests at the same time do not meet
    nodes = tuple(Node(f'lf{suffix}n{i}', f'{subnet}.{i + 1}', f'v{suffix}{i}') for i in range(2))
    made = _ip('netns', 'add', nodes[0].name, check=False)
    if made.returncode != 0:
        pytest.skip(f'no network namespace can be made here: {made.stderr.strip()}')
    try:
        _ip('netns', 'add', nodes[1].name)
        _ip('link', 'add', nodes[0].interface, 'netns', nodes[0].name, 'type', 'veth', 'peer', 'name', nodes[1].interface, 'netns', nodes[1].name)
        for node in nodes:
            _ip('-n', node.name, 'addr', 'add', f'{node.address}/24', 'dev', node.interface)
            _ip('-n', node.name, 'link', 'set', 'lo', 'up')
            node.set_link('up')
        yield nodes  # type: ignore[misc]
    finally:
        for node in nodes:
            for pid in node.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            _ip('netns', 'del', node.name, check=False)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(['ip', *arguments], capture_output=True, text=True, check=check)
