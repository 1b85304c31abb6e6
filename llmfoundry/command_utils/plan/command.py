"""``llmfoundry plan``: will this config fit, and what would."""

from __future__ import annotations

import json
from typing import Any, Sequence

from llmfoundry import dist
from llmfoundry.command_utils import memory
from llmfoundry.command_utils import train as _what_training_imports  # noqa: F401  its resident memory is the base of the plan
from llmfoundry.command_utils.plan.alternatives import find_alternatives, largest_that_fits, ranked
from llmfoundry.command_utils.plan.arithmetic import parse_bytes
from llmfoundry.command_utils.plan.estimate import Planner, resident_bytes, world_of
from llmfoundry.command_utils.plan.fake_model import Target
from llmfoundry.command_utils.plan.report import as_dict, as_text
from llmfoundry.errors import ConfigError, ConfigProblem

__all__ = ['make_plan', 'plan']

GPUS_PER_NODE = 8


def plan(yaml_path: str, overrides: Sequence[str], devices: int | None, device_memory: str | None, device: str | None, as_json: bool) -> str:
    """The plan of a YAML as text.

    Args:
        devices: number of ranks; by default that of the environment.
        device_memory: memory of one device, such as ``80GB``; by default this machine's.
        device: ``cpu`` or ``cuda``; by default CUDA where there is one or where ``device_memory`` is given.
        as_json: JSON instead of a table.

    Raises:
        ConfigError: every problem of the config, or an amount of memory that is none.
    """
    import torch

    if device not in (None, 'cpu', 'cuda'):
        raise ConfigError([ConfigProblem('--device', f'{device!r} is not cpu or cuda')])
    try:
        wanted = None if device_memory is None else parse_bytes(device_memory)
    except ValueError as e:
        raise ConfigError([ConfigProblem('--device-memory', str(e))]) from e
    device = device or ('cuda' if torch.cuda.is_available() or wanted is not None else 'cpu')
    target = Target(device, devices or dist.get_world_size(), GPUS_PER_NODE)
    figures = make_plan(yaml_path, overrides, target, wanted)
    return json.dumps(figures, indent=2) if as_json else as_text(figures, str(yaml_path))


def make_plan(yaml_path: Any, overrides: Sequence[str], target: Target, device_memory: int | None, alternatives: bool = True) -> dict[str, Any]:
    """All figures of a plan; see ``report.as_dict``.

    Raises:
        ConfigError: every problem of the config.
    """
    imported = resident_bytes()
    with world_of(target.devices, target.per_node):
        budget = device_memory or _memory_here(target)
        planner = Planner(yaml_path, overrides, target, imported)
        microbatch = planner.microbatch()
        current = planner.estimate(microbatch)
        if not alternatives:
            return as_dict(current, target, budget, microbatch, 0, [])
        largest, per_sample = largest_that_fits(planner, current, budget)
        found = ranked(find_alternatives(planner, current, per_sample), budget)
    return as_dict(current, target, budget, microbatch, largest, found)


def _memory_here(target: Target) -> int:
    import torch

    if target.on_cuda:
        if not torch.cuda.is_available():
            raise ConfigError([ConfigProblem('--device-memory', 'is needed: this machine has no GPU to ask. Write for example --device-memory 80GB')])
        return torch.cuda.get_device_properties(0).total_memory
    return memory.available_cpu_bytes()
