"""Decides where weights are created and how they are sharded, from ``init_device``, ``fsdp_config`` and ``tp_config``.

One YAML serves a cluster and a laptop: in a single process there is nothing to shard, so ``fsdp_config`` is dropped with a note and ``init_device: meta`` becomes ``cpu``. With
several processes we build Composer's FSDP2 config (see ``sharding``), the same on gloo and on NCCL; NO_SHARD is DDP.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ContextManager, Mapping

import torch

from llmfoundry import dist
from llmfoundry.command_utils.sharding import build_sharding_config, keep_master_weights_dtype, shards_nothing
from llmfoundry.command_utils.tensor_parallel import split_layers, tensor_parallel_degree
from llmfoundry.errors import ConfigError, ConfigProblem
from llmfoundry.models.meta_device import init_empty_weights

__all__ = ['Placement', 'build_parallelism_config', 'process_init_device', 'recomputes_unsharded', 'resolve_placement']

INIT_DEVICES = ('cpu', 'meta', 'mixed')
# What describes a cluster and has no meaning for one process.
CLUSTER_KEYS = ('sharding_strategy', 'data_parallel_shard_degree', 'data_parallel_replicate_degree')


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
    master_weights_dtype: str | None = None,
) -> Placement:
    """Applies the single-process fallback and the rules of ``init_device``. Pure: nothing is read from the environment.

    Raises:
        ConfigError: an unknown ``init_device``, ``mixed`` without anything that shards, or sharded checkpoints without it.
    """
    if init_device is not None and init_device not in INIT_DEVICES:
        raise ConfigError([ConfigProblem('model.init_device', f'{init_device!r} is not one of {", ".join(INIT_DEVICES)}')])
    fsdp, tp, notes = _what_applies(fsdp_config, tp_config, world_size)
    is_mixed = init_device == 'mixed'
    if fsdp is not None:
        fsdp = keep_master_weights_dtype(fsdp, master_weights_dtype)
    if init_device in ('meta', 'mixed') and fsdp is None:
        if init_device == 'mixed' and fsdp_config is None:
            raise ConfigError([ConfigProblem('model.init_device', 'mixed sends the weights of rank 0 to the shards of the others, so it needs an fsdp_config. Add one or use cpu.')])
        notes.append(f'model.init_device: {init_device} -> cpu, since the weights are not sharded')
        init_device = 'cpu'
    elif init_device == 'mixed':
        fsdp = {'load_monolith_rank0_only': True, **(fsdp or {})}
        init_device = 'cpu' if rank == 0 else 'meta'
    elif init_device == 'meta' and not has_cuda:
        notes.append('model.init_device: meta -> cpu, since Composer creates sharded weights from the meta device on CUDA only; every rank builds the same weights from the seed')
        init_device = 'cpu'
    if fsdp is not None and not is_mixed and fsdp.pop('load_monolith_rank0_only', False):
        # FSDP2 cuts each rank's part from that rank's own weights, and Composer sends rank 0's only to ranks that have none: the others would go on with the weights they were initialised with.
        notes.append('fsdp_config.load_monolith_rank0_only: used with model.init_device: mixed only, which leaves the other ranks without weights of their own; here every rank reads the file')
    return Placement(init_device, fsdp, tp, tuple(notes))


def _what_applies(
    fsdp_config: Mapping[str, Any] | None, tp_config: Mapping[str, Any] | None, world_size: int,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None, list[str]]:
    """The two blocks as far as they apply to a run of ``world_size`` processes, and notes.

    Raises:
        ConfigError: NO_SHARD with sharded checkpoints.
    """
    notes = []
    fsdp = dict(fsdp_config) if fsdp_config is not None else None
    tp = dict(tp_config) if tp_config is not None else None
    sharded_files = fsdp is not None and fsdp.get('state_dict_type') == 'sharded'
    if world_size == 1:
        if sharded_files:
            # So that one process continues what several have saved, and the other way round.
            fsdp = {k: v for k, v in fsdp_config.items() if k not in CLUSTER_KEYS}
            notes.append('fsdp_config: one process shards nothing; its checkpoints are of the sharded kind (state_dict_type)')
        dropped = [name for name, value in (('fsdp_config', fsdp), ('tp_config', tp)) if value is not None and not (sharded_files and name == 'fsdp_config')]
        if dropped:
            kept = ', but for activation_checkpointing' if 'fsdp_config' in dropped and fsdp.get('activation_checkpointing') else ''
            notes.append(f'{" and ".join(dropped)}: not used in a run of one process{kept}')
        return (fsdp if sharded_files else None), None, notes
    if fsdp is not None and shards_nothing(fsdp):
        if sharded_files:
            raise ConfigError([ConfigProblem('fsdp_config.state_dict_type', "'sharded' needs weights that are sharded, and sharding_strategy is NO_SHARD; use full")])
        notes.append('fsdp_config.sharding_strategy: NO_SHARD keeps whole weights on every rank, which is data parallel (DDP); of the other keys activation_checkpointing applies')
        fsdp = None
    return fsdp, tp, notes


def recomputes_unsharded(fsdp_config: Mapping[str, Any] | None, world_size: int) -> bool:
    """Whether activation checkpointing is asked for in a run without sharding, where Composer would not apply it."""
    if not fsdp_config or not fsdp_config.get('activation_checkpointing'):
        return False
    return _what_applies(fsdp_config, None, world_size)[0] is None


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


def build_parallelism_config(placement: Placement, model: Any) -> tuple[dict[str, Any] | None, list[str]]:
    """Composer's ``parallelism_config`` for a built model, whose layers are split here if ``tp_config`` says so, or None for DDP and single processes; and notes.

    Raises:
        ConfigError: settings that FSDP2 or tensor parallelism does not have.
    """
    config: dict[str, Any] = {}
    notes: list[str] = []
    degree = tensor_parallel_degree(placement.tp_config, dist.get_world_size(), sharded=placement.fsdp_config is not None)
    if placement.fsdp_config is not None:
        config['fsdp'], notes = build_sharding_config(
            placement.fsdp_config, data_ranks=dist.get_world_size() // degree, local_world_size=dist.get_local_world_size(), has_cuda=torch.cuda.is_available(),
        )
        if degree > 1 and config['fsdp'].replicas is not None:
            raise ConfigError([ConfigProblem('tp_config', 'is not available together with replicas (HYBRID_SHARD, data_parallel_replicate_degree); use FULL_SHARD')])
    if degree > 1:
        config['tp'] = split_layers(placement.tp_config, model, degree)
    return config or None, notes
