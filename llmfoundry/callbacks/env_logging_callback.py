"""Records what a run ran on (commits, packages, driver, ranks), so that a result can be explained a year later."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Sequence

import psutil
import torch
from composer.core import Callback, State
from composer.loggers import Logger

from llmfoundry import dist
from llmfoundry.errors import ConfigError, ConfigProblem

__all__ = ['EnvironmentLoggingCallback', 'environment_data']

DEFAULT_PACKAGES = (
    'llm-foundry', 'mosaicml', 'mosaicml-streaming', 'torch', 'transformers', 'tokenizers', 'datasets', 'peft', 'accelerate', 'safetensors', 'numpy', 'flash-attn', 'liger-kernel', 'megablocks',
    'grouped-gemm', 'transformer-engine', 'triton', 'bitsandbytes', 'mlflow', 'mlflow-skinny', 'wandb', 'tensorboard',
)  # fmt: skip
DOCKER_VARIABLES = ('DOCKER_IMAGE', 'IMAGE', 'COMPOSER_IMAGE', 'CONTAINER_IMAGE', 'SINGULARITY_CONTAINER', 'APPTAINER_CONTAINER')
_TIMEOUT_S = 10
_NVIDIA_FIELDS = ('name', 'driver_version', 'vbios_version', 'memory.total', 'ecc.mode.current')


class EnvironmentLoggingCallback(Callback):
    """Logs the hyperparameter ``environment_data`` when training starts, from rank 0.

    Args:
        workspace_dir: folder whose git repositories are recorded (itself, and those directly in it).
        log_git: commit, branch, remote and whether files differ from the commit, of each repository.
        log_nvidia: what ``nvidia-smi`` says of driver and devices.
        log_docker: the image of the container, as far as the container shows it.
        log_packages: versions of installed packages.
        log_system: operating system, Python, processors, memory.
        log_gpu: devices and versions that torch sees.
        log_distributed: number of ranks and the launcher's variables.
        packages_to_log: names of packages; those that decide about a training run if None.

    Raises:
        ConfigError: (a ValueError, when training starts) with ``log_git``, no folder at ``workspace_dir``.
    """

    def __init__(
        self, workspace_dir: str = '/workspace', log_git: bool = True, log_nvidia: bool = True, log_docker: bool = True, log_packages: bool = True, log_system: bool = False,
        log_gpu: bool = False, log_distributed: bool = False, packages_to_log: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self.workspace_dir = workspace_dir
        self.packages_to_log = tuple(packages_to_log) if packages_to_log is not None else DEFAULT_PACKAGES
        wanted = {'git': log_git, 'nvidia': log_nvidia, 'docker': log_docker, 'packages': log_packages, 'system': log_system, 'gpu': log_gpu, 'distributed': log_distributed}
        self.sections = tuple(name for name, value in wanted.items() if value)

    def fit_start(self, state: State, logger: Logger) -> None:
        del state
        if 'git' in self.sections and not os.path.isdir(self.workspace_dir):
            raise ConfigError([ConfigProblem('callbacks.env_logging.workspace_dir', f'there is no folder {self.workspace_dir!r}. Set it to the folder that holds your repositories, or log_git: false.')])
        if dist.get_global_rank() == 0:
            logger.log_hyperparameters({'environment_data': environment_data(self.sections, self.workspace_dir, self.packages_to_log)})


def environment_data(sections: Sequence[str], workspace_dir: str, packages: Sequence[str]) -> dict[str, Any]:
    """The named sections, each a dict of plain values."""
    collect = {
        'git': lambda: _git(Path(workspace_dir)), 'nvidia': _nvidia, 'docker': _docker, 'packages': lambda: _packages(packages), 'system': _system, 'gpu': _gpu, 'distributed': _distributed,
    }
    return {name: collect[name]() for name in sections}


def _output(command: Sequence[str]) -> str | None:
    """What a command prints; None when it is not there, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _git(workspace: Path) -> dict[str, dict[str, Any]]:
    repositories = [p for p in (workspace, *sorted(workspace.iterdir())) if (p / '.git').exists()]
    found = {}
    for folder in repositories:
        git = ('git', '-c', f'safe.directory={folder}', '-C', str(folder))
        remote = _output((*git, 'remote', 'get-url', 'origin'))
        found[folder.resolve().name] = {
            'commit': _output((*git, 'rev-parse', 'HEAD')),
            'branch': _output((*git, 'rev-parse', '--abbrev-ref', 'HEAD')),
            'remote': remote and remote.rpartition('@')[2],  # a token may stand before the @
            'changed_files': len((_output((*git, 'status', '--porcelain', '--untracked-files=no')) or '').splitlines()),
        }
    return found


def _nvidia() -> dict[str, Any]:
    rows = _output(('nvidia-smi', f'--query-gpu={",".join(_NVIDIA_FIELDS)}', '--format=csv,noheader'))
    return {} if rows is None else {str(n): dict(zip(_NVIDIA_FIELDS, row.split(', '), strict=False)) for n, row in enumerate(rows.splitlines())}


def _docker() -> dict[str, Any]:
    return {'in_container': os.path.exists('/.dockerenv') or os.path.exists('/run/.containerenv'), **{name: os.environ[name] for name in DOCKER_VARIABLES if os.environ.get(name)}}


def _packages(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _system() -> dict[str, Any]:
    return {
        'platform': platform.platform(), 'python': sys.version.split()[0], 'machine': platform.machine(), 'processors': os.cpu_count(), 'threads': torch.get_num_threads(),
        'memory_bytes': psutil.virtual_memory().total,
    }


def _gpu() -> dict[str, Any]:
    devices = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {'devices': devices, 'cuda': torch.version.cuda, 'hip': torch.version.hip, 'cudnn': torch.backends.cudnn.version() if devices else None}


def _distributed() -> dict[str, Any]:
    names = ('WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'NODE_RANK', 'MASTER_ADDR', 'MASTER_PORT')
    backend = torch.distributed.get_backend() if dist.is_initialized() else None
    return {'world_size': dist.get_world_size(), 'local_world_size': dist.get_local_world_size(), 'backend': backend, **{n: os.environ[n] for n in names if os.environ.get(n)}}
