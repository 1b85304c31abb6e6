"""From a config to bytes per rank: what the simulation counts, and what it cannot see.

What it cannot see are a few constants, the same for every config. They were measured on a CPU (x86-64, glibc 2.36, torch 2.7); those of CUDA are from the makers' documents and unmeasured.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator, Sequence

from llmfoundry import builders
from llmfoundry.command_utils.plan.arithmetic import Peak, extrapolate, peak
from llmfoundry.command_utils.plan.fake_model import Target
from llmfoundry.command_utils.plan.simulate import simulate
from llmfoundry.config.load import load_train_config
from llmfoundry.config.train import TrainConfig
from llmfoundry.errors import ConfigError

__all__ = ['Estimate', 'Planner', 'allocator_holes', 'resident_bytes', 'world_of']

# Tokenizer, data loader, and the code and work buffers of kernels that the first step touches: what a process takes over its imports without any model.
RUN_BYTES = 130_000_000
# CUDA: context and kernels, communicators of NCCL, and rounding of the caching allocator. Unmeasured.
CUDA_CONTEXT_BYTES, NCCL_BYTES, CUDA_HOLES = 600_000_000, 400_000_000, 0.05
# Deeper models are simulated at these two depths, since equal layers add equal amounts.
DEPTHS = (4, 6)


@dataclass(frozen=True)
class Estimate:
    """What one rank needs.

    Attributes:
        peak: what the simulation found.
        base: the process without a model.
        holes: what the allocator holds beyond what is in use.
    """

    peak: Peak
    base: int
    holes: int

    @property
    def total(self) -> int:
        return self.peak.in_use + self.base + self.holes


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return next(int(line.split()[1]) * 1024 for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmRSS:'))
    return 0


def allocator_holes(found: Peak, target: Target) -> int:
    """Bytes that the allocator holds and nobody uses at the peak. On the CPU there are none, since training has the C library return what is freed (see ``host_memory``)."""
    return int(CUDA_HOLES * found.in_use) if target.on_cuda else 0


@contextlib.contextmanager
def world_of(devices: int, per_node: int) -> Iterator[None]:
    """The environment of a run of ``devices`` ranks, from which batch sizes are derived."""
    names = {'WORLD_SIZE': str(devices), 'LOCAL_WORLD_SIZE': str(min(devices, per_node)), 'RANK': '0', 'LOCAL_RANK': '0'}
    saved = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in saved.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class Planner:
    """Estimates one YAML under changes of it.

    Args:
        yaml_path: a path, or a config as a mapping.
        overrides: ``key=value`` of the command line.
        target: the machine.
        imported: resident bytes of a process that has imported what training imports.
    """

    def __init__(self, yaml_path: Any, overrides: Sequence[str], target: Target, imported: int) -> None:
        self.yaml_path, self.overrides, self.target, self.imported = yaml_path, list(overrides), target, imported
        self.config = self.load()
        self.tokenizer = _tokenizer(self.config)

    def load(self, *changes: str) -> TrainConfig:
        """The config with further overrides.

        Raises:
            ConfigError: they do not fit together.
        """
        return load_train_config(self.yaml_path, [*self.overrides, *changes])

    def microbatch(self) -> int:
        """That of the config; 1 where it is ``auto``."""
        size = self.config.device_train_microbatch_size
        return 1 if size == 'auto' else max(int(size), 1)

    def estimate(self, microbatch: int, *changes: str) -> Estimate:
        """Bytes of one rank.

        Raises:
            ConfigError: the changed config does not hold, or its model cannot be built.
        """
        found = self._peak(microbatch, *changes)
        if self.target.on_cuda:
            base = CUDA_CONTEXT_BYTES + (NCCL_BYTES if self.target.devices > 1 else 0)
        else:
            base = self.imported + RUN_BYTES
        return Estimate(found, base, allocator_holes(found, self.target))

    def _peak(self, microbatch: int, *changes: str) -> Peak:
        config = self.load(*changes)
        depth = config.model.get('n_layers')
        if config.model['name'] != 'mpt_causal_lm' or not isinstance(depth, int) or depth <= 2 * DEPTHS[1] or config.model.get('block_overrides'):
            return peak(simulate(config, self.target, self.tokenizer, microbatch))
        shallow = [peak(simulate(self.load(*changes, f'model.n_layers={n}'), self.target, self.tokenizer, microbatch)) for n in DEPTHS]
        return extrapolate(*shallow, DEPTHS, depth)


def _tokenizer(config: TrainConfig) -> Any:
    """The tokenizer where it is at hand, since embeddings grow to its size; None where it would have to be fetched."""
    name = config.tokenizer.get('name', '')
    if not name.startswith('llmfoundry://') and not Path(name).exists():
        return None
    try:
        return builders.build_tokenizer(name, config.tokenizer.get('kwargs'))
    except ConfigError:
        return None
