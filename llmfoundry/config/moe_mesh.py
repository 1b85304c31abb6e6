"""Shape of the device mesh over which megablocks spreads experts, from the degrees in ``fsdp_config``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ['moe_device_mesh', 'needs_mesh']


def needs_mesh(model: Mapping[str, Any]) -> bool:
    """Whether the model's feed-forward layer is one of megablocks'."""
    ffn = model.get('ffn_config')
    return isinstance(ffn, Mapping) and str(ffn.get('ffn_type', '')).startswith('mb_')


def moe_device_mesh(fsdp_config: Mapping[str, Any], world_size: int) -> list[int]:
    """[shard], or [replicate, shard].

    Both degrees absent: all ranks shard. One absent (or -1): it follows from the other.

    Raises:
        ValueError: degrees whose product is not the number of ranks.
    """
    shard, replicate = fsdp_config.get('data_parallel_shard_degree') or -1, fsdp_config.get('data_parallel_replicate_degree') or -1
    if shard < 0 and replicate < 0:
        return [world_size]
    if shard < 0:
        shard = world_size // replicate
    elif replicate < 0:
        replicate = world_size // shard
    if shard * replicate != world_size:
        raise ValueError(f'data_parallel_shard_degree {shard} x data_parallel_replicate_degree {replicate} is not the number of ranks {world_size}')
    return [shard] if replicate == 1 else [replicate, shard]
