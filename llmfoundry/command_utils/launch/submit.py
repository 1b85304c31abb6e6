"""Hands a rendered job to its system, and the command that does all of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Sequence

from llmfoundry.command_utils.launch.job import LaunchJob, make_job
from llmfoundry.command_utils.launch.render import render
from llmfoundry.config.summary import validation_summary
from llmfoundry.errors import LaunchError

__all__ = ['launch', 'submit']

# What takes a rendered file, and where that tool comes from.
COMMANDS = {
    'local': (['bash', 'FILE'], 'a shell'),
    'slurm': (['sbatch', 'FILE'], "Slurm's client; run this on a login node of the cluster"),
    'k8s': (['kubectl', 'apply', '-f', 'FILE'], 'https://kubernetes.io/docs/tasks/tools'),
    'sky': (['sky', 'launch', '--yes', 'FILE'], "pip install 'skypilot[CLOUD]'"),
}


def launch(system: str, yaml: str, command: str, *, do_submit: bool, validate: bool, output: str | None, overrides: Sequence[str] = (), **options: object) -> int:
    """Checks the job and its YAML, renders, and prints or writes the file or submits it.

    Returns:
        Exit code: 0, or that of the system's tool (of the run itself, on this machine).

    Raises:
        ConfigError: an option or the YAML cannot be used.
        LaunchError: the tool of the system is missing, or the file cannot be written.
    """
    job = make_job(system, yaml, command, overrides=overrides, **options)  # type: ignore[arg-type]
    if validate:
        _validate(job)
    text = render(job)
    if output is not None:
        try:
            Path(output).write_text(text, encoding='utf-8')
        except OSError as e:
            raise LaunchError(f'--output {output!r} cannot be written ({e.strerror}). Name a file in a folder that exists.') from e
        print(f'wrote {output}', file=sys.stderr)
    if do_submit:
        return submit(job, text, output)
    if output is None:
        print(text, end='')
    return 0


def _validate(job: LaunchJob) -> None:
    """Reads the YAML as the run will, for its number of processes: a typo found here has not waited in a queue."""
    if not Path(job.yaml).is_file() and job.system in ('k8s', 'sky'):
        print(f'{job.yaml}: not on this machine, so not checked here', file=sys.stderr)
        return
    print(validation_summary(job.yaml, job.overrides, job.world_size), file=sys.stderr)


def submit(job: LaunchJob, text: str, file: str | None = None) -> int:
    """Runs the tool of the system on the rendered text and returns its exit code.

    Raises:
        LaunchError: there is no such tool on this machine.
    """
    command, source = COMMANDS[job.system]
    if shutil.which(command[0]) is None:
        raise LaunchError(f'--submit: {command[0]!r} is not on PATH, so nothing was submitted. It is needed for --on {job.system} ({source}). Without --submit the file is printed.')
    if file is not None:
        return subprocess.run([file if part == 'FILE' else part for part in command], check=False).returncode
    with tempfile.NamedTemporaryFile('w', suffix='.sh' if job.system in ('local', 'slurm') else '.yaml', encoding='utf-8') as rendered:
        rendered.write(text)
        rendered.flush()
        return subprocess.run([rendered.name if part == 'FILE' else part for part in command], check=False).returncode
