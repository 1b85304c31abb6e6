"""Where a model is created and how it is sharded: pure functions over the ``model`` and ``fsdp_config`` blocks.

One YAML serves a laptop and a cluster, so what needs several processes gives way in a single one, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmfoundry.errors import ConfigError, ConfigProblem

__all__ = ['InitDevice', 'drop_sharding_in_one_process', 'moe_device_mesh', 'resolve_init_device']

Block = dict[str, Any]
INIT_DEVICES = ('meta', 'cpu', 'mixed')
_LOW_PRECISION_WEIGHTS = ('f16', 'float16', 'bf16', 'bfloat16')


@dataclass(frozen=True)
class InitDevice:
    """The outcome.

    Attributes:
        model: copy of the model block, with ``init_device`` as it is on this rank.
        fsdp_config: copy of the sharding block, or None.
        empty_weights: whether to build the model without storage for its weights; buffers stay real.
        notes: what was changed and why, one line each.
    """

    model: Block
    fsdp_config: Block | None
    empty_weights: bool
    notes: tuple[str, ...] = ()


def drop_sharding_in_one_process(
    fsdp_config: Mapping[str, Any] | None, tp_config: Mapping[str, Any] | None, world_size: int
) -> tuple[Block | None, Block | None, list[str]]:
    """Returns both blocks as given, or None for each in a single process, where there is nothing to shard over; and a note for each dropped."""
    if world_size > 1:
        return (dict(fsdp_config) if fsdp_config is not None else None), (dict(tp_config) if tp_config is not None else None), []
    notes = [f'{name} has no effect in a single process' for name, block in (('fsdp_config', fsdp_config), ('tp_config', tp_config)) if block is not None]
    return None, None, notes


def resolve_init_device(
    model: Mapping[str, Any], fsdp_config: Mapping[str, Any] | None, *, world_size: int = 1, global_rank: int = 0, local_rank: int = 0
) -> InitDevice:
    """Decides where this rank creates the weights.

    ``meta`` without FSDP becomes ``cpu``, since nothing would fill the weights later. ``mixed`` makes them once (MPT: on local rank 0, others: on
    global rank 0) and FSDP hands them on, which needs ``sync_module_states``.

    Raises:
        ConfigError: an unknown device, or ``mixed`` on several ranks without FSDP.
    """
    model, fsdp = _copy(model), (_copy(fsdp_config) if fsdp_config is not None else None)
    device, notes, empty = model.get('init_device'), [], False
    if device is not None and device not in INIT_DEVICES:
        raise _error(f'expected one of {", ".join(map(repr, INIT_DEVICES))}, got {device!r}')
    if fsdp is None:
        if device == 'mixed' and world_size > 1:
            raise _error("'mixed' needs fsdp_config, which hands the weights of rank 0 to the others")
        if device in ('meta', 'mixed'):
            model['init_device'] = 'cpu'
            notes.append(f"model.init_device: cpu ('{device}' needs fsdp_config and more than one process)")
    elif device == 'meta':
        empty = True
    elif device == 'mixed':
        first = local_rank if model.get('name') == 'mpt_causal_lm' else global_rank
        model['init_device'] = 'cpu' if first == 0 else 'meta'
        empty = first != 0
        if not fsdp.get('sync_module_states'):
            fsdp['sync_module_states'] = True
            notes.append("fsdp_config.sync_module_states: true (init_device 'mixed' makes the weights on one rank only)")
        fsdp.setdefault('load_monolith_rank0_only', True)
    if fsdp is not None:
        fsdp, more = _keep_low_precision_weights(model, fsdp)
        notes += more
    _set_moe_mesh(model, fsdp, world_size)
    return InitDevice(model, fsdp, empty, tuple(notes))


def _copy(block: Mapping[str, Any]) -> Block:
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in block.items()}


def _error(message: str) -> ConfigError:
    return ConfigError([ConfigProblem('model.init_device', message)])


def _keep_low_precision_weights(model: Block, fsdp: Block) -> tuple[Block, list[str]]:
    """16-bit stored weights need no cast on use: FSDP keeps their type, and that of their gradients."""
    if model.get('master_weights_dtype') not in _LOW_PRECISION_WEIGHTS:
        return fsdp, []
    given = fsdp.get('mixed_precision')
    given = given if isinstance(given, Mapping) else {}
    precision = {'param_dtype': None, 'reduce_dtype': given.get('reduce_dtype'), 'buffer_dtype': given.get('buffer_dtype'), 'keep_low_precision_grads': True}
    return {**fsdp, 'mixed_precision': precision}, [f'fsdp_config.mixed_precision: weights stay {model["master_weights_dtype"]} (model.master_weights_dtype)']


def _set_moe_mesh(model: Block, fsdp: Block | None, world_size: int) -> None:
    ffn = model.get('ffn_config')
    if fsdp is not None and isinstance(ffn, dict) and str(ffn.get('ffn_type', '')).startswith('mb_'):
        ffn['device_mesh'] = moe_device_mesh(fsdp, world_size)


def moe_device_mesh(fsdp_config: Mapping[str, Any], world_size: int) -> list[int]:
    """Shape of the mesh over which experts are spread: [shard], or [replicate, shard].

    Both degrees absent: all ranks shard; one absent (or -1): it follows from the other.

    Raises:
        ConfigError: degrees whose product is not the number of ranks.
    """
    shard, replicate = fsdp_config.get('data_parallel_shard_degree') or -1, fsdp_config.get('data_parallel_replicate_degree') or -1
    if shard < 0 and replicate < 0:
        return [world_size]
    if shard < 0:
        shard = world_size // replicate
    elif replicate < 0:
        replicate = world_size // shard
    if shard * replicate != world_size:
        raise ConfigError([ConfigProblem('fsdp_config', f'data_parallel_shard_degree {shard} x data_parallel_replicate_degree {replicate} is not the number of ranks {world_size}')])
    return [shard] if replicate == 1 else [replicate, shard]
