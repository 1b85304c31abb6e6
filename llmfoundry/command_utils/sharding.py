"""What becomes of the keys of ``fsdp_config``: FSDP1's are read, FSDP2 is what runs.

Composer's FSDP1 needs CUDA, cannot save full state dicts on the CPU and is no longer developed, so released YAMLs are translated. A key either has its counterpart here, or is named
in one line of note (it changed speed or memory at most), or is refused with a reason (it changed what is computed). docs/sharding.md has the table.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Mapping

from composer.utils.parallelism import FSDP2Config
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from llmfoundry import builders
from llmfoundry.config.moe_mesh import moe_device_mesh
from llmfoundry.errors import ConfigError, ConfigProblem
from llmfoundry.gloo_average import fix_cpu_events

__all__ = ['ShardingConfig', 'build_sharding_config', 'fsdp2_settings', 'keep_master_weights_dtype', 'let_adapters_generate', 'shards_nothing', 'sharding_degrees']

# sharding_strategy -> whether a layer's gathered weights are freed after its forward pass. NO_SHARD never comes here: it is DDP.
RESHARD_AFTER_FORWARD = {'FULL_SHARD': True, 'SHARD_GRAD_OP': False, 'HYBRID_SHARD': True, '_HYBRID_SHARD_ZERO2': False}
FSDP2_KEYS = ('activation_checkpointing', 'activation_cpu_offload', 'state_dict_type', 'load_monolith_rank0_only', 'mixed_precision', 'verbose')
# Keys whose absence changes speed or memory at most, or that only name what FSDP2 always does.
WITHOUT_COUNTERPART = frozenset({
    'activation_checkpointing_reentrant', 'auto_wrap', 'backward_prefetch', 'backward_prefetch_limit', 'flatten_parameters', 'forward_prefetch', 'forward_prefetch_limit',
    'ignored_modules', 'keep_low_precision_grads', 'limit_all_gathers', 'min_params', 'process_group', 'sharded_ckpt_prefix_dir', 'sync_module_states',
    'te_checkpoint_wrapper', 'te_shard_fp8_weight', 'use_orig_params',
})  # fmt: skip
REFUSED = {
    'cpu_offload': 'Composer passes no offload policy to FSDP2 (and refused it with FSDP1 too); use activation_checkpointing, activation_cpu_offload or more ranks',
    'device_mesh': 'is built from data_parallel_shard_degree and data_parallel_replicate_degree; remove it',
}
MIXED_PRECISION_KEYS = ('param_dtype', 'reduce_dtype', 'buffer_dtype', 'keep_low_precision_grads')


@dataclass
class ShardingConfig(FSDP2Config):
    """Composer's FSDP2 settings, with the ones that it reads through properties that are constant there.

    Composer builds the device mesh from the two degrees and overwrites ``device_mesh`` with it, so a mesh of ours would be lost and a hybrid run would silently shard over all ranks. Its sharded
    checkpoints ask the config for planners. Both work under FSDP2 as they did under FSDP1, once the config answers.
    """

    replicas: int | None = None
    planner_to_load: Any = None
    planner_to_save: Any = None

    @property
    def data_parallel_replicate_degree(self) -> int | None:
        return self.replicas

    @property
    def load_planner(self) -> Any:
        return self.planner_to_load

    @property
    def save_planner(self) -> Any:
        return self.planner_to_save


def _strategy(fsdp_config: Mapping[str, Any]) -> str:
    return str(fsdp_config.get('sharding_strategy') or 'FULL_SHARD').upper()


def shards_nothing(fsdp_config: Mapping[str, Any]) -> bool:
    """Whether the block asks for whole weights on every rank (NO_SHARD), which is what DDP does."""
    return _strategy(fsdp_config) == 'NO_SHARD'


def sharding_degrees(fsdp_config: Mapping[str, Any], world_size: int, local_world_size: int) -> tuple[int | None, int]:
    """(replicas, ranks that share one copy of the weights); None for one replica.

    A hybrid strategy without degrees has one replica per node. A degree that is not given follows from the other.

    Raises:
        ConfigError: degrees that do not multiply to the number of ranks.
    """
    block = {key: fsdp_config.get(key) for key in ('data_parallel_shard_degree', 'data_parallel_replicate_degree')}
    if 'HYBRID' in _strategy(fsdp_config) and all(value in (None, -1) for value in block.values()):
        block['data_parallel_replicate_degree'] = max(world_size // local_world_size, 1)
    try:
        mesh = moe_device_mesh(block, world_size)
    except ValueError as e:
        raise ConfigError([ConfigProblem('fsdp_config', f'{e}. Leave one of the two out, so that it follows from the other.')]) from e
    return (None, mesh[0]) if len(mesh) == 1 else (mesh[0], mesh[1])


def keep_master_weights_dtype(fsdp_config: Mapping[str, Any], master_weights_dtype: str | None) -> dict[str, Any]:
    """The block for weights that are kept in 16 bits (``model.master_weights_dtype``): they are gathered and trained as they are, so no dtype is cast to.

    ``reduce_dtype`` and ``buffer_dtype`` of a mapping stand, since a user who names them means them.
    """
    block = dict(fsdp_config)
    if master_weights_dtype is None:
        return block
    mixed = block.get('mixed_precision')
    kept = {key: mixed.get(key) for key in ('reduce_dtype', 'buffer_dtype')} if isinstance(mixed, Mapping) else {'reduce_dtype': None, 'buffer_dtype': None}
    block['mixed_precision'] = {'param_dtype': None, **kept, 'keep_low_precision_grads': True}
    return block


def _mixed_precision(value: Any, problems: list[ConfigProblem]) -> Any:
    """``DEFAULT``, ``PURE`` and ``FULL`` in upper case; a mapping as it is. Both of Composer's FSDP versions read them with the same function, so the dtypes are the same."""
    if isinstance(value, str):
        return value.upper()
    unknown = sorted(set(value) - set(MIXED_PRECISION_KEYS)) if isinstance(value, Mapping) else []
    if unknown:
        problems.append(ConfigProblem('fsdp_config.mixed_precision', f'unknown {", ".join(unknown)}; it may have {", ".join(MIXED_PRECISION_KEYS)}'))
    return dict(value) if isinstance(value, Mapping) else value


def fsdp2_settings(fsdp_config: Mapping[str, Any], *, has_cuda: bool = True) -> tuple[dict[str, Any], list[str]]:
    """Keyword arguments of Composer's FSDP2Config from a block of FSDP1 or FSDP2 keys, and notes.

    Raises:
        ConfigError: keys that change what is computed or kept and have no counterpart, all in one report.
    """
    problems: list[ConfigProblem] = []
    notes = []
    settings: dict[str, Any] = {'state_dict_type': 'full'}
    strategy = _strategy(fsdp_config)
    if fsdp_config.get('reshard_after_forward') is not None:
        settings['reshard_after_forward'] = fsdp_config['reshard_after_forward']
    elif strategy in RESHARD_AFTER_FORWARD:
        settings['reshard_after_forward'] = RESHARD_AFTER_FORWARD[strategy]
    else:
        problems.append(ConfigProblem('fsdp_config.sharding_strategy', f'{strategy!r} is not one of {", ".join(RESHARD_AFTER_FORWARD)}, NO_SHARD'))
    for key, value in fsdp_config.items():
        if key in FSDP2_KEYS and value is not None:
            settings[key] = value
        elif key in REFUSED and value:
            problems.append(ConfigProblem(f'fsdp_config.{key}', f'{value!r}: {REFUSED[key]}'))
    if 'mixed_precision' in settings:
        settings['mixed_precision'] = _mixed_precision(settings['mixed_precision'], problems)
    if problems:
        raise ConfigError(problems)
    unused = sorted(key for key, value in fsdp_config.items() if key in WITHOUT_COUNTERPART and value is not None)
    if unused:
        notes.append(f'fsdp_config: FSDP2 has no counterpart of {", ".join(unused)}; ignored')
    if settings.get('activation_cpu_offload') and not has_cuda:
        settings['activation_cpu_offload'] = False
        notes.append('fsdp_config.activation_cpu_offload: no effect on the CPU, where activations are already')
    return settings, notes


def _planner(fsdp_config: Mapping[str, Any], key: str) -> Any:
    """The planner of sharded checkpoints that ``{name: kwargs}`` names, or None.

    Raises:
        ConfigError: (a ValueError) more or less than one entry.
    """
    block = fsdp_config.get(key)
    if block is None:
        return None
    if not isinstance(block, Mapping) or len(block) != 1:
        raise ConfigError([ConfigProblem(f'fsdp_config.{key}', f'expected one entry name: arguments, got {block!r}')])
    [(name, kwargs)] = block.items()
    build = {'load_planner': builders.build_load_planner, 'save_planner': builders.build_save_planner}[key]
    return build(name, **(kwargs or {}))


def build_sharding_config(fsdp_config: Mapping[str, Any], *, data_ranks: int, local_world_size: int, has_cuda: bool) -> tuple[ShardingConfig, list[str]]:
    """Composer's config object for a block, and notes.

    Args:
        fsdp_config: the block.
        data_ranks: ranks over which weights are sharded and replicated: all, divided by the tensor-parallel degree.
        local_world_size: processes on this node.
        has_cuda: whether the model trains on a GPU.

    Raises:
        ConfigError: settings that FSDP2 does not have, or degrees that do not fit.
    """
    settings, notes = fsdp2_settings(fsdp_config, has_cuda=has_cuda)
    replicas, shards = sharding_degrees(fsdp_config, data_ranks, local_world_size)
    if replicas is not None:
        notes.append(f'fsdp_config: {replicas} replicas of the weights, each shared by {shards} ranks')
        if not has_cuda:
            fix_cpu_events()
    with warnings.catch_warnings():
        # "FSDP2 Config/APIs are experimental": known, and nothing that a user could act on.
        warnings.simplefilter('ignore', UserWarning)
        config = ShardingConfig(
            **settings, replicas=replicas, planner_to_load=_planner(fsdp_config, 'load_planner'), planner_to_save=_planner(fsdp_config, 'save_planner'),
        )
    return config, notes


def let_adapters_generate(model: Any) -> None:
    """Lets a sharded model with an adapter generate. PEFT passes ``generate`` on to the base model, below the module at which FSDP2 would gather the embedding and the head."""
    inner = getattr(model, 'model', None)
    if isinstance(inner, FSDPModule) and getattr(model, 'using_peft', False) and callable(getattr(inner, 'generate', None)):
        register_fsdp_forward_method(inner, 'generate')
