"""Splits layers over ranks as ``tp_config`` says, before the optimizer exists.

Composer would split them after the optimizer has taken the whole weights, and then FSDP2 no longer finds what the optimizer holds. So it is done here, and Composer, which makes the device mesh and
shards the rest, is given a plan with nothing left to do.
"""

from __future__ import annotations

import warnings
from typing import Any, Mapping

import torch

from llmfoundry import builders, dist
from llmfoundry.errors import ConfigError, ConfigProblem
from llmfoundry.experimental import ExperimentalWarning

__all__ = ['split_layers', 'tensor_parallel_degree']


def tensor_parallel_degree(tp_config: Mapping[str, Any] | None, world_size: int, *, sharded: bool) -> int:
    """Ranks over which a layer is split; 1 without ``tp_config``.

    Raises:
        ConfigError: (a ValueError) missing keys, a degree that does not divide the ranks, or nothing that shards the other layers.
    """
    if tp_config is None:
        return 1
    missing = [k for k in ('strategy', 'tensor_parallel_degree') if k not in tp_config]
    if missing:
        raise ConfigError([ConfigProblem('tp_config', f'needs {" and ".join(missing)}')])
    degree = tp_config['tensor_parallel_degree']
    if degree < 1 or world_size % degree:
        raise ConfigError([ConfigProblem('tp_config.tensor_parallel_degree', f'{degree} does not divide the {world_size} ranks')])
    if degree > 1 and not sharded:
        raise ConfigError([ConfigProblem('tp_config', 'needs an fsdp_config (it may be {}) that shards, since Composer splits layers only where it shards the rest')])
    return degree


def split_layers(tp_config: Mapping[str, Any], model: Any, degree: int) -> dict[str, Any]:
    """Splits the layers of ``model`` that the strategy names; returns what Composer's TPConfig takes.

    Raises:
        RuntimeError: the model does not have the modules that the strategy needs.
        ConfigError: weights on the meta device.
    """
    from composer.utils.misc import ParallelismType
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    warnings.warn(ExperimentalWarning('Tensor parallelism'), stacklevel=2)
    warnings.warn('Tensor parallelism does not support saving and loading checkpoints yet.', stacklevel=2)
    if any(p.is_meta for p in model.parameters()):
        raise ConfigError([ConfigProblem('model.init_device', 'tensor parallelism splits weights that exist; use cpu')])
    names = (ParallelismType.DATA_PARALLEL_SHARD.value, ParallelismType.TENSOR_PARALLEL.value)
    mesh = init_device_mesh('cuda' if torch.cuda.is_available() else 'cpu', (dist.get_world_size() // degree, degree), mesh_dim_names=names)
    parallelize_module(model, mesh[names[1]], builders.build_tp_strategies(tp_config['strategy'], model))
    return {**{k: v for k, v in tp_config.items() if k != 'strategy'}, 'layer_plan': {}}
