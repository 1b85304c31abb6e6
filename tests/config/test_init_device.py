"""Where weights are made: every combination of device, FSDP and number of processes."""

from __future__ import annotations

from typing import Any

import pytest

from llmfoundry.config.init_device import drop_sharding_in_one_process, moe_device_mesh, resolve_init_device
from llmfoundry.errors import ConfigError

FSDP = {'sharding_strategy': 'FULL_SHARD'}


@pytest.mark.parametrize(('device', 'fsdp', 'ranks', 'expected', 'empty'), [
    (None, None, (1, 0, 0), None, False),
    ('cpu', None, (1, 0, 0), 'cpu', False),
    ('meta', None, (1, 0, 0), 'cpu', False),
    ('mixed', None, (1, 0, 0), 'cpu', False),
    ('meta', None, (2, 1, 1), 'cpu', False),
    ('meta', FSDP, (2, 0, 0), 'meta', True),
    ('cpu', FSDP, (2, 1, 1), 'cpu', False),
    ('mixed', FSDP, (16, 0, 0), 'cpu', False),
    ('mixed', FSDP, (16, 8, 0), 'cpu', False),
    ('mixed', FSDP, (16, 9, 1), 'meta', True),
])  # fmt: skip
def test_mpt(device: str | None, fsdp: dict[str, Any] | None, ranks: tuple[int, int, int], expected: str | None, empty: bool) -> None:
    model = {'name': 'mpt_causal_lm'} | ({'init_device': device} if device else {})
    before = (dict(model), dict(fsdp or {}))
    result = resolve_init_device(model, fsdp, world_size=ranks[0], global_rank=ranks[1], local_rank=ranks[2])
    assert (result.model.get('init_device'), result.empty_weights) == (expected, empty)
    assert (model, fsdp or {}) == before, 'the arguments must stay as they are'
    if device == 'mixed' and fsdp:
        assert result.fsdp_config == {**FSDP, 'sync_module_states': True, 'load_monolith_rank0_only': True}
    assert bool(result.notes) == (device in ('meta', 'mixed') and not fsdp or device == 'mixed')


def test_hugging_face_weights_are_made_on_global_rank_0_only() -> None:
    hf = {'name': 'hf_causal_lm', 'init_device': 'mixed'}
    assert resolve_init_device(hf, FSDP, world_size=16, global_rank=8, local_rank=0).model['init_device'] == 'meta'
    assert resolve_init_device(hf, FSDP, world_size=16, global_rank=0, local_rank=0).model['init_device'] == 'cpu'


@pytest.mark.parametrize(('device', 'message'), [('cuda', "model.init_device: expected one of 'meta', 'cpu', 'mixed', got 'cuda'"), ('mixed', "model.init_device: 'mixed' needs fsdp_config")])
def test_refused(device: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_init_device({'name': 'mpt_causal_lm', 'init_device': device}, None, world_size=2)


def test_low_precision_weights_keep_their_type() -> None:
    fsdp = {'mixed_precision': {'param_dtype': 'fp32', 'reduce_dtype': 'fp32', 'buffer_dtype': 'bf16'}}
    result = resolve_init_device({'name': 'mpt_causal_lm', 'master_weights_dtype': 'bf16'}, fsdp, world_size=2)
    assert result.fsdp_config == {'mixed_precision': {'param_dtype': None, 'reduce_dtype': 'fp32', 'buffer_dtype': 'bf16', 'keep_low_precision_grads': True}}
    result = resolve_init_device({'name': 'mpt_causal_lm', 'master_weights_dtype': 'bf16'}, {'mixed_precision': 'PURE'}, world_size=2)
    assert result.fsdp_config is not None
    assert result.fsdp_config['mixed_precision'] == {'param_dtype': None, 'reduce_dtype': None, 'buffer_dtype': None, 'keep_low_precision_grads': True}


@pytest.mark.parametrize(('degrees', 'mesh'), [({}, [8]), ({'data_parallel_shard_degree': 8}, [8]), ({'data_parallel_shard_degree': 4}, [2, 4]), ({'data_parallel_replicate_degree': 4}, [4, 2]),
                                               ({'data_parallel_replicate_degree': 1}, [8]), ({'data_parallel_shard_degree': 2, 'data_parallel_replicate_degree': 4}, [4, 2])])
def test_mesh_of_experts(degrees: dict[str, int], mesh: list[int]) -> None:
    assert moe_device_mesh(degrees, 8) == mesh
    model = {'name': 'mpt_causal_lm', 'ffn_config': {'ffn_type': 'mb_dmoe'}}
    assert resolve_init_device(model, degrees, world_size=8).model['ffn_config'] == {'ffn_type': 'mb_dmoe', 'device_mesh': mesh}


def test_mesh_has_to_cover_the_ranks() -> None:
    with pytest.raises(ConfigError, match='data_parallel_shard_degree 3 x data_parallel_replicate_degree 2 is not the number of ranks 8'):
        moe_device_mesh({'data_parallel_shard_degree': 3, 'data_parallel_replicate_degree': 2}, 8)


def test_one_process_has_nothing_to_shard_over() -> None:
    assert drop_sharding_in_one_process(FSDP, {'strategy': 'ffn'}, 2) == (FSDP, {'strategy': 'ffn'}, [])
    assert drop_sharding_in_one_process(FSDP, {'strategy': 'ffn'}, 1) == (None, None, ['fsdp_config has no effect in a single process', 'tp_config has no effect in a single process'])
    assert drop_sharding_in_one_process(None, None, 1) == (None, None, [])
