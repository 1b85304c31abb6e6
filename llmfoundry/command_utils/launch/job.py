"""What is to be started: the YAML, and what it needs of each node. Checked once, all problems together."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator, Mapping, Sequence

from llmfoundry.errors import ConfigError, ConfigProblem

__all__ = ['KINDS', 'SYSTEMS', 'LaunchJob', 'dns_name', 'make_job', 'seconds_of']

SYSTEMS = ('local', 'slurm', 'k8s', 'sky')
KINDS = ('job', 'pytorchjob')
DEFAULT_IMAGE = 'mosaicml/llm-foundry:2.7.0_cu128_flash2-latest'
DEFAULT_SCRIPT = 'scripts/train/train.py'
DEFAULT_PORT = 7501
CPUS_PER_GPU = 8
# The longest name that leaves room for what Kubernetes appends (-master-0, -123-abcde) within 63 characters.
MAX_NAME = 45
_ENV = re.compile(r'[A-Za-z_][A-Za-z0-9_]*')
_UNITS = {'s': 1, 'm': 60, 'h': 3600, 'd': 86400}


@dataclass(frozen=True)
class LaunchJob:
    """A run on ``nodes`` equal nodes.

    ``processes`` is per node, one per GPU unless given; None (only on this machine) leaves the count to composer. ``command`` is what rendered it, for the header.
    """

    system: str
    yaml: str
    command: str
    overrides: tuple[str, ...] = ()
    name: str = 'train'
    nodes: int = 1
    processes: int | None = None
    gpus: int = 0
    cpus: int = 1
    memory: str | None = None
    time_s: int | None = None
    image: str = DEFAULT_IMAGE
    queue: str | None = None
    accelerator: str = 'H100'
    kind: str = 'job'
    port: int | None = None
    workdir: str | None = None
    script: str = DEFAULT_SCRIPT
    env: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    volumes: tuple[tuple[str, str], ...] = ()

    @property
    def world_size(self) -> int | None:
        """Processes of the whole run, or None if composer counts them."""
        return None if self.processes is None else self.nodes * self.processes


def make_job(
    system: str, yaml: str, command: str, *, overrides: Sequence[str] = (), name: str | None = None, gpus: int | None = None, processes: int | None = None,
    cpus: int | None = None, time: str | None = None, env: Sequence[str] = (), volumes: Sequence[str] = (), **rest: object,
) -> LaunchJob:
    """Checks what was typed and fills in what follows from it; ``rest`` are other fields of ``LaunchJob``, taken as they are.

    Raises:
        ConfigError: every option that cannot be used.
    """
    problems = list(_problems(system, overrides, gpus, processes, time, env, volumes, rest))
    if problems:
        raise ConfigError(problems, source='the launch command')
    if gpus is None:
        gpus = 0 if system == 'local' or processes is not None else 8
    if processes is None and gpus:
        processes = gpus
    elif processes is None and system != 'local':
        processes = 1
    given = {key: value for key, value in rest.items() if value is not None}
    return LaunchJob(
        system, yaml, command, tuple(overrides), name=dns_name(name or Path(yaml).stem), gpus=gpus, processes=processes,
        cpus=cpus or (CPUS_PER_GPU * gpus if gpus else processes or 1), time_s=None if time is None else seconds_of(time),
        env=dict(entry.split('=', 1) for entry in env), volumes=tuple((v.partition(':')[0], v.partition(':')[2]) for v in volumes), **given,  # type: ignore[arg-type]
    )


def _problems(
    system: str, overrides: Sequence[str], gpus: int | None, processes: int | None, time: str | None, env: Sequence[str], volumes: Sequence[str], rest: Mapping[str, object],
) -> Iterator[ConfigProblem]:
    if system not in SYSTEMS:
        yield ConfigProblem('--on', f'is {system!r}; must be one of {", ".join(SYSTEMS)}')
    if rest.get('kind') not in (None, *KINDS):
        yield ConfigProblem('--kind', f'is {rest["kind"]!r}; must be one of {", ".join(KINDS)}')
    if gpus and processes not in (None, gpus):
        yield ConfigProblem('--processes', f'is {processes} with {gpus} GPUs per node; a process drives one GPU, so leave --processes out or say --gpus 0')
    if system == 'local' and rest.get('nodes') not in (None, 1) and not (gpus or processes):
        yield ConfigProblem('--nodes', 'several nodes need the same count of processes everywhere: say --gpus N or --processes N (per node)')
    if time is not None and seconds_of(time) is None:
        yield ConfigProblem('--time', f'is {time!r}; write [D-]HH:MM:SS, or a number with s, m, h or d, such as 36h')
    for override in overrides:
        if '=' not in override:
            yield ConfigProblem('[KEY=VALUE]', f'is {override!r}; an override of the YAML is written key=value')
    for entry in env:
        if not _ENV.fullmatch(entry.partition('=')[0]) or '=' not in entry:
            yield ConfigProblem('--env', f'is {entry!r}; write NAME=VALUE')
    for volume in volumes:
        if not re.fullmatch(r'[a-z0-9.-]+:/.+', volume):
            yield ConfigProblem('--volume', f'is {volume!r}; write CLAIM:/path, with the name of a PersistentVolumeClaim')
    unused = {'k8s': {'options'}, 'slurm': {'volumes'}, 'sky': {'options', 'volumes'}, 'local': {'options', 'volumes'}}.get(system, set())
    for option, value in (('options', rest.get('options')), ('volumes', volumes)):
        if value and option in unused:
            yield ConfigProblem('--sbatch' if option == 'options' else '--volume', f'has no meaning for --on {system}')


def seconds_of(text: str) -> int | None:
    """``[D-]HH:MM:SS``, ``MM:SS`` or ``90m`` in seconds; None if it is neither."""
    match = re.fullmatch(r'(\d+)([smhd])', text)
    if match:
        return int(match[1]) * _UNITS[match[2]]
    match = re.fullmatch(r'(?:(\d+)-)?(?:(\d+):)?(\d{1,2}):(\d{2})', text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def dns_name(text: str) -> str:
    """``text`` as a name that every system takes: lower case letters, digits and hyphens, starting with a letter."""
    name = re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')[:MAX_NAME].strip('-')
    return name if name[:1].isalpha() else f'run-{name}'.strip('-')
