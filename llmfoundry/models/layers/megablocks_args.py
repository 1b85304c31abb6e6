"""Turns ``ffn_config`` of megablocks' blocks into megablocks' own arguments: sizes, and the process groups of expert parallelism.

Experts are split over ``moe_world_size`` ranks, and each such split is repeated over the rest of the world, which shards the weights of its experts (FSDP).
"""

from __future__ import annotations

from typing import Any, Callable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llmfoundry.models.layers.ffn import resolve_ffn_act_fn, resolve_ffn_hidden_size

__all__ = ['config_megablocks_moe_args', 'config_moe_args', 'get_megablocks_device_mesh', 'resolve_lbl_process_group']


def get_megablocks_device_mesh(device_mesh_cfg: Sequence[int] | None, moe_world_size: int, world_size: int) -> DeviceMesh:
    """Returns the mesh (weight_parallel, expert_parallel) of shape (world_size / moe_world_size, moe_world_size).

    Args:
        device_mesh_cfg: shape of the data-parallel mesh, one-dimensional; None is the whole world.
        moe_world_size: ranks that share one set of experts.
        world_size: ranks of the run.

    Raises:
        RuntimeError: a two-dimensional mesh (hybrid sharding).
        ValueError: the mesh is not a multiple of ``moe_world_size``.
    """
    if device_mesh_cfg is not None and len(device_mesh_cfg) != 1:
        raise RuntimeError(f'ffn_config.device_mesh: hybrid sharding does not work with megablocks, got a mesh of shape {tuple(device_mesh_cfg)}. Leave data_parallel_replicate_degree at 1')
    n_ranks = world_size if device_mesh_cfg is None else device_mesh_cfg[0]
    if n_ranks % moe_world_size != 0:
        raise ValueError(f'ffn_config.moe_world_size: the world size {n_ranks} must be a multiple of moe_world_size, got {moe_world_size}')
    device_type = 'cuda' if torch.cuda.is_available() else 'cpu'
    return init_device_mesh(device_type, (n_ranks // moe_world_size, moe_world_size), mesh_dim_names=('weight_parallel', 'expert_parallel'))


def resolve_lbl_process_group(lbl_process_group: Any, expert_parallel_group: Any) -> Any:
    """Returns the ranks over which the load-balancing loss averages the tokens of each expert.

    Args:
        lbl_process_group: ``expert_group``, ``global_group``, the size of groups of neighbouring ranks, a process group, or ``none`` or None for this rank alone.
        expert_parallel_group: the group of the expert-parallel mesh, None without expert parallelism.

    Raises:
        ValueError: anything else, or ``expert_group`` without expert parallelism.
    """
    if lbl_process_group in (None, 'none'):
        return None
    if lbl_process_group == 'expert_group':
        if expert_parallel_group is None:
            raise ValueError('ffn_config.lbl_process_group: expert_group needs moe_world_size > 1')
        return expert_parallel_group
    if lbl_process_group == 'global_group':
        return dist.group.WORLD
    if isinstance(lbl_process_group, int) and not isinstance(lbl_process_group, bool):
        world_size = dist.get_world_size()
        if lbl_process_group <= 0 or world_size % lbl_process_group != 0:
            raise ValueError(f'ffn_config.lbl_process_group: the world size {world_size} must be a multiple of the group size, got {lbl_process_group}')
        return dist.new_subgroups(lbl_process_group)[0]
    if isinstance(lbl_process_group, dist.ProcessGroup):
        return lbl_process_group
    raise ValueError(f'ffn_config.lbl_process_group must be expert_group, global_group, a group size, a process group or none, got {lbl_process_group!r}')


def config_megablocks_moe_args(
    ffn_config: dict[str, Any],
    d_model: int,
    expansion_ratio: float,
    n_layers: int,
    get_device_mesh: Callable[..., DeviceMesh] = get_megablocks_device_mesh,
) -> dict[str, Any]:
    """Completes ``ffn_config`` for ``build_mb_moe`` and ``build_mb_dmoe``.

    Args:
        ffn_config: keys of megablocks' Arguments, and moe_world_size, device_mesh, lbl_process_group.
        d_model: width of the model.
        expansion_ratio: hidden size of an expert over ``d_model``, unless ``ffn_hidden_size`` is given.
        n_layers: depth, by which the load-balancing loss is averaged.
        get_device_mesh: makes the mesh from (device_mesh_cfg, moe_world_size, world_size).

    Returns:
        A new dict with ffn_hidden_size, num_layers, activation_fn and, for ``moe_world_size`` > 1, moe_expert_model_parallelism, expert_parallel_group and the mesh as device_mesh.

    Raises:
        ValueError: sizes that do not divide each other, or expert parallelism in a run without process group.
    """
    config = dict(ffn_config)
    config['ffn_hidden_size'] = resolve_ffn_hidden_size(d_model, expansion_ratio, config.get('ffn_hidden_size'))
    config['num_layers'] = n_layers
    config['activation_fn'] = resolve_ffn_act_fn(config.pop('ffn_act_fn', None))
    moe_world_size = config.setdefault('moe_world_size', 1)
    mesh_cfg = config.pop('device_mesh', None)
    if moe_world_size > 1:
        if not dist.is_initialized():
            raise ValueError(f'ffn_config.moe_world_size {moe_world_size} needs a run of several processes, but no process group has been started')
        mesh = get_device_mesh(device_mesh_cfg=mesh_cfg, moe_world_size=moe_world_size, world_size=dist.get_world_size())
        config.update(moe_expert_model_parallelism=True, expert_parallel_group=mesh['expert_parallel'].get_group(0), device_mesh=mesh)
    config['lbl_process_group'] = resolve_lbl_process_group(config.get('lbl_process_group'), config.get('expert_parallel_group'))
    return config


def config_moe_args(
    ffn_config: dict[str, Any],
    d_model: int,
    expansion_ratio: float,
    n_layers: int,
) -> dict[str, Any]:
    """``config_megablocks_moe_args`` for the blocks of megablocks; the config as it is for any other block."""
    if ffn_config.get('ffn_type') in ('mb_moe', 'mb_dmoe'):
        return config_megablocks_moe_args(ffn_config, d_model, expansion_ratio, n_layers)
    return ffn_config
