"""A Slurm cluster of its own on this machine: munged, slurmctld and one slurmd per node, in a temporary folder, on loopback."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Iterator

import pytest

__all__ = ['Cluster', 'slurm_cluster']

_PATH = os.pathsep.join([os.environ['PATH'], '/usr/sbin', '/sbin'])  # where Debian puts daemons
PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'scontrol', 'sinfo', 'srun')
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
PlugStackConfig=/dev/null
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """A running cluster. ``environment`` makes Slurm's clients talk to it."""

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder = folder
        # Names that resolve everywhere, since that of node 0 becomes MASTER_ADDR.
        self.names = [f'127.0.0.{i + 1}' for i in range(num_nodes)]
        self.environment = {'SLURM_CONF': str(folder / 'slurm.conf')}
        self._daemons: list[subprocess.Popen] = []

    def start(self, cpus: int) -> None:
        ports = _free_ports(1 + len(self.names))
        # Several slurmd on one machine share its address and host name, and are told apart by port and by the name given with -N.
        nodes = '\n'.join(
            f'NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=1000 State=UNKNOWN'
            for name, port in zip(self.names, ports[1:], strict=True)
        )
        for name in ('state', *(f'spool-{n}' for n in self.names)):
            (self.folder / name).mkdir()
        (self.folder / 'slurm.conf').write_text(CONFIG.format(host=socket.gethostname(), folder=self.folder, ports=ports, nodes=nodes))
        key = self.folder / 'munge.key'
        key.write_bytes(secrets.token_bytes(64))
        key.chmod(0o600)
        f = self.folder
        self._run(
            'munged', '--foreground', '--force', f'--key-file={key}', f'--socket={f}/munge.socket', f'--pid-file={f}/munged.pid', f'--log-file={f}/munged.log', f'--seed-file={f}/munged.seed',
        )
        _until(lambda: (f / 'munge.socket').exists(), 20, self.logs)
        self._run('slurmctld', '-D', '-c', '-f', str(f / 'slurm.conf'))
        for name in self.names:
            self._run('slurmd', '-D', '-N', name, '-f', str(f / 'slurm.conf'))
        _until(lambda: self.call('sinfo', '--noheader', '-o', '%D %t').split() == [str(len(self.names)), 'idle'], 60, self.logs)

    def _run(self, *command: str) -> None:
        with (self.folder / 'daemons.txt').open('a') as out:
            self._daemons.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, 'PATH': _PATH, **self.environment}, start_new_session=True))

    def call(self, *command: str) -> str:
        """What a client of Slurm prints."""
        done = subprocess.run(command, env={**os.environ, 'PATH': _PATH, **self.environment}, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    def wait_for_job(self, job: str, timeout: float) -> str:
        """The state in which a job ended."""
        _until(lambda: self._state(job) not in ('PENDING', 'RUNNING', 'CONFIGURING', 'COMPLETING', ''), timeout, lambda: self.call('scontrol', 'show', 'job', job) + self.logs())
        return self._state(job)

    def _state(self, job: str) -> str:
        fields = dict(field.partition('=')[::2] for field in self.call('scontrol', 'show', 'job', job).split() if '=' in field)
        return fields.get('JobState', '')

    def logs(self) -> str:
        return '\n'.join(f'--- {p.name}\n{p.read_text(errors="replace")[-2000:]}' for p in sorted(self.folder.glob('*.log')) + [self.folder / 'daemons.txt'] if p.exists())

    def stop(self) -> None:
        """Ends jobs and daemons."""
        if len(self._daemons) > 1:
            self.call('scancel', '--signal=KILL', '--user=root')
        for daemon in reversed(self._daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()


@contextlib.contextmanager
def slurm_cluster(num_nodes: int = 2, cpus: int = 2) -> Iterator[Cluster]:
    """Starts a cluster and removes it; skips the test where Slurm is not installed or this user is not root."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if missing:
        pytest.skip(f'no Slurm here (apt-get install slurm-wlm munge): {", ".join(missing)} missing')
    if os.geteuid() != 0:
        pytest.skip('starting Slurm daemons needs root')
    # Not below pytest's folder: a socket's path may have 108 characters.
    with tempfile.TemporaryDirectory(prefix='slurm') as name:
        cluster = Cluster(Path(name), num_nodes)
        try:
            cluster.start(cpus)
            yield cluster
        finally:
            cluster.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(('127.0.0.1', 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _until(condition: object, timeout: float, explain: object) -> None:
    deadline = time.monotonic() + timeout
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError(f'not within {timeout} s:\n{explain()}')  # type: ignore[operator]
        time.sleep(0.2)
