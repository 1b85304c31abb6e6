"""Decides where weights are created and how they are sharded, from ``init_device``, ``fsdp_config`` and ``tp_config``.

One YAML serves a cluster and a laptop: in a single process there is nothing to shard, so ``fsdp_config`` is dropped with a note and ``init_device: meta`` becomes ``cpu``. With
several processes we build Composer's FSDP2 config; the FSDP1 one needs CUDA, cannot save full state dicts on the CPU and is no longer developed. Keys that only
FSDP1 knew are accepted and named in a note.
"""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any, ContextManager, Mapping

import torch

from llmfoundry import builders, dist
from llmfoundry.errors import ConfigError, ConfigProblem
from llmfoundry.experimental import ExperimentalWarning
from llmfoundry.models.meta_device import init_empty_weights

__all__ = ['Placement', 'build_parallelism_config', 'fsdp2_settings', 'process_init_device', 'resolve_placement']

INIT_DEVICES = ('cpu', 'meta', 'mixed')
# sharding_strategy of FSDP1 -> whether FSDP2 frees a layer's gathered weights after its forward. NO_SHARD and the hybrid ones have no one-to-one form.
RESHARD_AFTER_FORWARD = {'FULL_SHARD': True, 'SHARD_GRAD_OP': False, 'HYBRID_SHARD': True, '_HYBRID_SHARD_ZERO2': False}
FSDP2_KEYS = ('activation_checkpointing', 'activation_cpu_offload', 'state_dict_type', 'load_monolith_rank0_only', 'mixed_precision', 'verbose')
# FSDP1 keys without a counterpart whose absence changes speed or memory at most; each is named once in a note.
WITHOUT_COUNTERPART = {
    'activation_checkpointing_reentrant', 'auto_wrap', 'backward_prefetch', 'backward_prefetch_limit', 'flatten_parameters', 'forward_prefetch', 'forward_prefetch_limit',
    'ignored_modules', 'keep_low_precision_grads', 'limit_all_gathers', 'min_params', 'process_group', 'sharded_ckpt_prefix_dir', 'sync_module_states',
    'te_checkpoint_wrapper', 'te_shard_fp8_weight', 'use_orig_params', 'cpu_offload', 'load_planner', 'save_planner', 'data_parallel_shard_degree', 'device_mesh',
}
REFUSED = {
    'cpu_offload': 'sharded weights cannot be kept on the CPU; use activation_cpu_offload, or more ranks',
    'load_planner': 'Composer takes no planner for FSDP2; remove it',
    'save_planner': 'Composer takes no planner for FSDP2; remove it',
    'device_mesh': 'is built from data_parallel_replicate_degree; remove it',
}


@dataclass(frozen=True)
class Placement:
    """Where the weights of this rank are created, and what of the parallelism settings applies."""

    init_device: str | None
    fsdp_config: dict[str, Any] | None
    tp_config: dict[str, Any] | None
    notes: tuple[str, ...] = ()

    def init_context(self) -> ContextManager:
        """The context under which the model is built: parameters on the meta device, or nothing special."""
        return init_empty_weights(include_buffers=False) if self.init_device == 'meta' else contextlib.nullcontext()


def resolve_placement(
    init_device: str | None, fsdp_config: Mapping[str, Any] | None, tp_config: Mapping[str, Any] | None, *, world_size: int, rank: int, has_cuda: bool,
) -> Placement:
    """Applies the single-process fallback and the rules of ``init_device``. Pure: nothing is read from the environment.

    Raises:
        ConfigError: an unknown ``init_device``, or ``mixed`` without anything that shards.
    """
    if init_device is not None and init_device not in INIT_DEVICES:
        raise ConfigError([ConfigProblem('model.init_device', f'{init_device!r} is not one of {", ".join(INIT_DEVICES)}')])
    notes: list[str] = []
    fsdp = dict(fsdp_config) if fsdp_config is not None else None
    tp = dict(tp_config) if tp_config is not None else None
    if world_size == 1:
        dropped = [name for name, value in (('fsdp_config', fsdp), ('tp_config', tp)) if value is not None]
        if dropped:
            notes.append(f'{" and ".join(dropped)}: not used in a run of one process')
        single = bool(dropped)
        fsdp = tp = None
        if init_device in ('meta', 'mixed') and (single or init_device == 'meta'):
            notes.append(f'model.init_device: {init_device} -> cpu, since the weights are not sharded')
            init_device = 'cpu'
    elif fsdp is None and init_device == 'meta':
        notes.append('model.init_device: meta -> cpu, since there is no fsdp_config')
        init_device = 'cpu'
    if init_device == 'mixed':
        if fsdp is None:
            raise ConfigError([ConfigProblem('model.init_device', 'mixed sends the weights of rank 0 to the shards of the others, so it needs an fsdp_config. Add one or use cpu.')])
        fsdp.setdefault('load_monolith_rank0_only', True)
        init_device = 'cpu' if rank == 0 else 'meta'
    elif init_device == 'meta' and not has_cuda:
        notes.append('model.init_device: meta -> cpu, since Composer creates sharded weights from the meta device on CUDA only; every rank builds the same weights from the seed')
        init_device = 'cpu'
    return Placement(init_device, fsdp, tp, tuple(notes))


def process_init_device(model_cfg: dict[str, Any], fsdp_config: dict[str, Any] | None = None) -> ContextManager:
    """The form in which plug-ins ask for ``resolve_placement``: edits both dicts in place and returns the context under which to build the model.

    Raises:
        ConfigError: as ``resolve_placement``.
    """
    placement = resolve_placement(
        model_cfg.get('init_device'), fsdp_config, None, world_size=dist.get_world_size(), rank=dist.get_global_rank(), has_cuda=torch.cuda.is_available(),
    )
    if placement.init_device is not None:
        model_cfg['init_device'] = placement.init_device
    if fsdp_config is not None:
        fsdp_config.update(placement.fsdp_config or {})
    return placement.init_context()


def fsdp2_settings(fsdp_config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments of Composer's FSDP2Config from a block of FSDP1 or FSDP2 keys, and notes.

    Raises:
        ConfigError: keys that change what is computed or kept and have no counterpart, all in one report.
    """
    problems, notes = [], []
    settings: dict[str, Any] = {'state_dict_type': 'full'}
    strategy = str(fsdp_config.get('sharding_strategy', 'FULL_SHARD')).upper()
    if 'reshard_after_forward' in fsdp_config:
        settings['reshard_after_forward'] = fsdp_config['reshard_after_forward']
    elif strategy in RESHARD_AFTER_FORWARD:
        settings['reshard_after_forward'] = RESHARD_AFTER_FORWARD[strategy]
    else:
        rule = 'for NO_SHARD remove fsdp_config (that is DDP)' if strategy == 'NO_SHARD' else f'use one of {", ".join(RESHARD_AFTER_FORWARD)}'
        problems.append(ConfigProblem('fsdp_config.sharding_strategy', f'{strategy!r} is not available: {rule}'))
    for key, value in fsdp_config.items():
        if key in FSDP2_KEYS:
            settings[key] = value
        elif key in REFUSED and value:
            problems.append(ConfigProblem(f'fsdp_config.{key}', f'{value!r}: {REFUSED[key]}'))
    mixed = settings.get('mixed_precision')
    if isinstance(mixed, str):
        settings['mixed_precision'] = mixed.upper()
    if problems:
        raise ConfigError(problems)
    unused = sorted(set(fsdp_config) & WITHOUT_COUNTERPART - set(REFUSED))
    if unused:
        notes.append(f'fsdp_config: FSDP2 has no counterpart of {", ".join(unused)}; ignored')
    return settings, notes


def build_parallelism_config(placement: Placement, model: Any) -> tuple[dict[str, Any] | None, list[str]]:
    """Composer's ``parallelism_config`` for a built model, or None for DDP and single processes, and notes.

    Raises:
        ConfigError: settings that FSDP2 or tensor parallelism does not have.
    """
    from composer.utils.parallelism import FSDP2Config

    config: dict[str, Any] = {}
    notes: list[str] = []
    if placement.fsdp_config is not None:
        settings, notes = fsdp2_settings(placement.fsdp_config)
        replicas = placement.fsdp_config.get('data_parallel_replicate_degree')
        if replicas not in (None, 1) or str(placement.fsdp_config.get('sharding_strategy', '')).upper().lstrip('_').startswith('HYBRID'):
            settings['device_mesh'] = _hybrid_mesh(replicas)
        with warnings.catch_warnings():
            # "FSDP2 Config/APIs are experimental": known, and nothing that a user could act on.
            warnings.simplefilter('ignore', UserWarning)
            config['fsdp'] = FSDP2Config(**settings)
    if placement.tp_config is not None:
        config['tp'] = _tensor_parallel(placement.tp_config, model)
    return config or None, notes


def _hybrid_mesh(replicas: int | None) -> Any:
    """A (replicate, shard) mesh: one replica per node unless ``data_parallel_replicate_degree`` says otherwise."""
    from torch.distributed.device_mesh import init_device_mesh

    world_size = dist.get_world_size()
    replicas = replicas or max(world_size // dist.get_local_world_size(), 1)
    if world_size % replicas:
        raise ConfigError([ConfigProblem('fsdp_config.data_parallel_replicate_degree', f'{replicas} does not divide the {world_size} ranks')])
    import torch

    device_type = 'cuda' if torch.cuda.is_available() else 'cpu'
    return init_device_mesh(device_type, (replicas, world_size // replicas), mesh_dim_names=('dp_replicate', 'dp_shard'))


def _tensor_parallel(tp_config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    missing = [k for k in ('strategy', 'tensor_parallel_degree') if k not in tp_config]
    if missing:
        raise ConfigError([ConfigProblem('tp_config', f'needs {" and ".join(missing)}')])
    warnings.warn(ExperimentalWarning('Tensor parallelism'), stacklevel=2)
    warnings.warn('Tensor parallelism does not support saving and loading checkpoints yet.', stacklevel=2)
    plan = builders.build_tp_strategies(tp_config['strategy'], model)
    return {**{k: v for k, v in tp_config.items() if k != 'strategy'}, 'layer_plan': plan}
