"""``llmfoundry launch``: the file that starts a run on this machine, Slurm, Kubernetes or SkyPilot, printed, written or submitted."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from llmfoundry.typed_registry import resolve_target

__all__ = ['launch']

# Options that say what to do with the file, and so do not belong into its header.
_NOT_IN_HEADER = {'--submit', '--no-validate', '--validate'}


def launch(
    yaml_path: Annotated[str, typer.Argument(metavar='YAML', help='Path of the config, as the nodes see it.')],
    overrides: Annotated[list[str] | None, typer.Argument(metavar='[KEY=VALUE]...', help='Overrides of the YAML.')] = None,
    on: Annotated[str, typer.Option('--on', help='local, slurm, k8s or sky.')] = 'local',
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus: Annotated[int | None, typer.Option('--gpus', min=0, help='GPUs per node, one process each (default: 8; on this machine, all there are).')] = None,
    processes: Annotated[int | None, typer.Option('--processes', min=1, help='Processes per node without GPUs.')] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help='CPUs per node (default: 8 per GPU, or one per process).')] = None,
    memory: Annotated[str | None, typer.Option(help='Memory per node in the units of the system: 500G (Slurm), 500Gi (Kubernetes), 500 (SkyPilot).')] = None,
    time: Annotated[str | None, typer.Option(help='Time limit: [D-]HH:MM:SS, or 36h, 90m.')] = None,
    name: Annotated[str | None, typer.Option(help='Name of the job (default: that of the YAML).')] = None,
    queue: Annotated[str | None, typer.Option('--queue', '--partition', help='Partition (Slurm) or queue of Kueue (Kubernetes).')] = None,
    image: Annotated[str | None, typer.Option(help='Container image (Kubernetes).')] = None,
    kind: Annotated[str, typer.Option(help='For Kubernetes: job (Indexed Job) or pytorchjob.')] = 'job',
    accelerator: Annotated[str | None, typer.Option(help='GPU by its SkyPilot name (default: H100).')] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help='MASTER_PORT (default: 7501; on Slurm from the number of the job).')] = None,
    env: Annotated[list[str] | None, typer.Option('--env', help='NAME=VALUE for every process; may be repeated.')] = None,
    sbatch: Annotated[list[str] | None, typer.Option('--sbatch', help='Another #SBATCH option, such as account=PROJECT; may be repeated.')] = None,
    volume: Annotated[list[str] | None, typer.Option('--volume', help='CLAIM:/path, a PersistentVolumeClaim to mount (Kubernetes); may be repeated.')] = None,
    workdir: Annotated[str | None, typer.Option(help='Folder to start in (default: where the job is submitted, or the folder of the image).')] = None,
    script: Annotated[str | None, typer.Option(help='Path of train.py on the nodes (default: scripts/train/train.py).')] = None,
    output: Annotated[str | None, typer.Option('--output', '-o', help='Write the file instead of printing it.')] = None,
    submit: Annotated[bool, typer.Option('--submit', help='Start it: bash, sbatch, kubectl apply or sky launch.')] = False,
    validate: Annotated[bool, typer.Option('--validate/--no-validate', help='Check the YAML first, for this number of processes.')] = True,
) -> None:
    """Render what starts a run on one or many nodes; print it, write it, or submit it."""
    code = resolve_target('llmfoundry.command_utils.launch.submit:launch')(
        on, yaml_path, _command(sys.argv[1:]), do_submit=submit, validate=validate, output=output, overrides=overrides or [], nodes=nodes, gpus=gpus,
        processes=processes, cpus=cpus, memory=memory, time=time, name=name, queue=queue, image=image, kind=kind, accelerator=accelerator, port=port, env=env or [],
        options=tuple(sbatch or ()), volumes=volume or [], workdir=workdir, script=script,
    )
    if code:
        raise typer.Exit(code)


def _command(arguments: list[str]) -> str:
    """The command as typed, less what does not change the rendered text."""
    kept: list[str] = []
    for argument in arguments:
        if argument in _NOT_IN_HEADER or argument.startswith(('--output=', '-o=')) or kept[-1:] == ['--output'] or kept[-1:] == ['-o']:
            kept = kept[:-1] if kept[-1:] in (['--output'], ['-o']) else kept
            continue
        kept.append(argument)
    return shlex.join(['llmfoundry', *kept])
