"""Where weights are created and how they are sharded."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from llmfoundry import registry
from llmfoundry.command_utils import sharding
from llmfoundry.command_utils.parallelism import Placement, build_parallelism_config, recomputes_unsharded, resolve_placement
from llmfoundry.command_utils.sharding import ShardingConfig, build_sharding_config, fsdp2_settings, keep_master_weights_dtype, sharding_degrees
from llmfoundry.command_utils.tensor_parallel import tensor_parallel_degree
from llmfoundry.errors import ConfigError

FSDP = {'sharding_strategy': 'FULL_SHARD', 'mixed_precision': 'PURE', 'activation_checkpointing': True, 'activation_checkpointing_reentrant': False, 'limit_all_gathers': True}


def _resolve(init_device: str | None, fsdp: Any, world_size: int = 2, rank: int = 0, has_cuda: bool = True) -> Placement:
    return resolve_placement(init_device, fsdp, None, world_size=world_size, rank=rank, has_cuda=has_cuda)


def test_one_process_shards_nothing_and_creates_weights_on_the_cpu() -> None:
    for init_device in ('meta', 'mixed'):
        placement = _resolve(init_device, FSDP, world_size=1)
        assert (placement.init_device, placement.fsdp_config) == ('cpu', None)
        assert placement.notes[0] == 'fsdp_config: not used in a run of one process, but for activation_checkpointing'
    assert _resolve(None, FSDP, world_size=1).init_device is None
    assert _resolve('meta', None, world_size=1).init_device == 'cpu'


def test_several_processes() -> None:
    assert _resolve('meta', FSDP).init_device == 'meta'
    assert _resolve('meta', FSDP, has_cuda=False).init_device == 'cpu'
    assert _resolve('meta', None).init_device == 'cpu'
    assert [_resolve('mixed', FSDP, rank=r).init_device for r in (0, 1)] == ['cpu', 'meta']
    assert _resolve('mixed', FSDP).fsdp_config['load_monolith_rank0_only'] is True


def test_the_config_is_not_changed() -> None:
    before = dict(FSDP)
    _resolve('mixed', FSDP)
    assert before == FSDP


def test_refused_init_devices() -> None:
    with pytest.raises(ConfigError, match="model.init_device: 'cuda' is not one of cpu, meta, mixed"):
        _resolve('cuda', FSDP)
    with pytest.raises(ConfigError, match='model.init_device: mixed .* needs an fsdp_config'):
        _resolve('mixed', None)


def test_no_shard_is_data_parallel() -> None:
    block = {**FSDP, 'sharding_strategy': 'NO_SHARD'}
    placement = _resolve('mixed', block, rank=1)
    assert (placement.init_device, placement.fsdp_config) == ('cpu', None)
    assert placement.notes[0].startswith('fsdp_config.sharding_strategy: NO_SHARD keeps whole weights on every rank, which is data parallel (DDP)')
    with pytest.raises(ConfigError, match="fsdp_config.state_dict_type: 'sharded' needs weights that are sharded"):
        _resolve(None, {**block, 'state_dict_type': 'sharded'})


def test_one_process_keeps_the_kind_of_the_checkpoints() -> None:
    """Else a run of two processes could not be continued by one."""
    placement = _resolve('meta', {**FSDP, 'state_dict_type': 'sharded', 'sharding_strategy': 'HYBRID_SHARD', 'data_parallel_shard_degree': 8}, world_size=1)
    assert placement.fsdp_config is not None and placement.fsdp_config['state_dict_type'] == 'sharded'
    assert 'data_parallel_shard_degree' not in placement.fsdp_config and 'sharding_strategy' not in placement.fsdp_config


def test_activations_are_recomputed_without_sharding_too() -> None:
    assert recomputes_unsharded(FSDP, 1) and recomputes_unsharded({**FSDP, 'sharding_strategy': 'NO_SHARD'}, 4)
    assert not recomputes_unsharded(FSDP, 2) and not recomputes_unsharded({**FSDP, 'state_dict_type': 'sharded'}, 1)
    assert not recomputes_unsharded({'sharding_strategy': 'NO_SHARD'}, 4) and not recomputes_unsharded(None, 1)


def test_fsdp1_keys_become_fsdp2_settings() -> None:
    settings, notes = fsdp2_settings({**FSDP, 'sharding_strategy': 'shard_grad_op', 'mixed_precision': 'pure', 'load_planner': None, 'backward_prefetch': None})
    assert settings == {'state_dict_type': 'full', 'reshard_after_forward': False, 'mixed_precision': 'PURE', 'activation_checkpointing': True}
    assert notes == ['fsdp_config: FSDP2 has no counterpart of activation_checkpointing_reentrant, limit_all_gathers; ignored']
    assert fsdp2_settings({'state_dict_type': 'sharded'})[0] == {'state_dict_type': 'sharded', 'reshard_after_forward': True}
    assert fsdp2_settings({'sharding_strategy': '_HYBRID_SHARD_ZERO2'})[0]['reshard_after_forward'] is False
    assert fsdp2_settings({'reshard_after_forward': 4, 'sharding_strategy': 'SHARD_GRAD_OP'})[0]['reshard_after_forward'] == 4


def test_every_key_of_composer_has_its_place() -> None:
    """A key that a later Composer adds, or one that was forgotten here, must not vanish without a word."""
    from composer.utils.parallelism import FSDP2Config, FSDPConfig

    keys = {f.name for cls in (FSDPConfig, FSDP2Config) for f in dataclasses.fields(cls) if not f.name.startswith('_')}
    degrees = {'data_parallel_shard_degree', 'data_parallel_replicate_degree'}
    planners = {'load_planner', 'save_planner'}
    translated = {*sharding.FSDP2_KEYS, 'sharding_strategy', 'reshard_after_forward', *degrees, *planners}
    assert keys <= translated | sharding.WITHOUT_COUNTERPART | set(sharding.REFUSED)
    assert not translated & sharding.WITHOUT_COUNTERPART


def test_offloaded_activations_on_the_cpu() -> None:
    settings, notes = fsdp2_settings({'activation_cpu_offload': True}, has_cuda=False)
    assert settings['activation_cpu_offload'] is False and 'no effect on the CPU' in notes[0]
    assert fsdp2_settings({'activation_cpu_offload': True})[0]['activation_cpu_offload'] is True


@pytest.mark.parametrize(
    ('block', 'expected'),
    [
        ({}, (None, 8)),
        ({'sharding_strategy': 'HYBRID_SHARD'}, (2, 4)),
        ({'sharding_strategy': '_HYBRID_SHARD_ZERO2', 'data_parallel_replicate_degree': 4}, (4, 2)),
        ({'data_parallel_shard_degree': 2}, (4, 2)),
        ({'data_parallel_shard_degree': -1, 'data_parallel_replicate_degree': None}, (None, 8)),
        ({'data_parallel_shard_degree': 4, 'data_parallel_replicate_degree': 2}, (2, 4)),
        ({'data_parallel_replicate_degree': 1}, (None, 8)),
    ],
)
def test_degrees_on_two_nodes_of_four(block: dict[str, Any], expected: tuple[int | None, int]) -> None:
    assert sharding_degrees(block, 8, 4) == expected


def test_degrees_that_do_not_fit() -> None:
    for block in ({'data_parallel_shard_degree': 3}, {'data_parallel_shard_degree': 2, 'data_parallel_replicate_degree': 2}):
        with pytest.raises(ConfigError, match='fsdp_config: data_parallel_shard_degree .* is not the number of ranks 8'):
            sharding_degrees(block, 8, 4)


def test_16_bit_weights_are_trained_as_they_are() -> None:
    block = keep_master_weights_dtype({'mixed_precision': {'param_dtype': 'bf16', 'reduce_dtype': 'fp32'}}, 'bf16')
    assert block['mixed_precision'] == {'param_dtype': None, 'reduce_dtype': 'fp32', 'buffer_dtype': None, 'keep_low_precision_grads': True}
    assert keep_master_weights_dtype({'mixed_precision': 'PURE'}, 'float16')['mixed_precision']['reduce_dtype'] is None
    assert keep_master_weights_dtype({'mixed_precision': 'PURE'}, None) == {'mixed_precision': 'PURE'}
    placement = resolve_placement(None, FSDP, None, world_size=2, rank=0, has_cuda=True, master_weights_dtype='bf16')
    assert placement.fsdp_config is not None and placement.fsdp_config['mixed_precision']['param_dtype'] is None


@pytest.mark.parametrize(('name', 'dtypes'), [('DEFAULT', ('bfloat16', 'float32')), ('PURE', ('bfloat16', 'bfloat16')), ('FULL', (None, None))])
def test_the_three_names_of_mixed_precision_mean_what_they_meant(name: str, dtypes: tuple[str | None, str | None]) -> None:
    """param_dtype and reduce_dtype with amp_bf16, as Composer documents them for FSDP1."""
    from composer.core.precision import Precision
    from composer.distributed.fsdp2 import create_mixed_precision_policy

    policy = create_mixed_precision_policy(Precision.AMP_BF16, fsdp2_settings({'mixed_precision': name.lower()})[0]['mixed_precision'])
    assert (policy.param_dtype, policy.reduce_dtype) == tuple(d and getattr(torch, d) for d in dtypes)


def test_what_fsdp2_cannot_do_is_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        fsdp2_settings({'sharding_strategy': 'SOME', 'cpu_offload': True, 'mixed_precision': {'param': 'bf16'}})
    assert [p.path for p in caught.value.problems] == ['fsdp_config.sharding_strategy', 'fsdp_config.cpu_offload', 'fsdp_config.mixed_precision']


def test_composer_gets_its_fsdp2_object() -> None:
    config, _ = build_parallelism_config(Placement('cpu', FSDP, None), model=None)
    assert isinstance(config['fsdp'], ShardingConfig)
    assert config['fsdp'].activation_checkpointing and config['fsdp'].state_dict_type == 'full'
    assert build_parallelism_config(Placement('cpu', None, None), model=None) == (None, [])


def test_planners_come_from_the_registries() -> None:
    from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner

    with registry.save_registry():
        registry.load_planners.register('partial', func=DefaultLoadPlanner)
        registry.save_planners.register('plain', func=DefaultSavePlanner)
        block = {'load_planner': {'partial': {'allow_partial_load': True}}, 'save_planner': {'plain': None}}
        config, notes = build_sharding_config(block, data_ranks=4, local_world_size=4, has_cuda=False)
    assert config.load_planner.allow_partial_load is True and isinstance(config.save_planner, DefaultSavePlanner) and notes == []
    for planner in ({'partial': {}, 'plain': {}}, {}, 'partial'):
        with pytest.raises(ConfigError, match='fsdp_config.load_planner: expected one entry name: arguments'):
            build_sharding_config({'load_planner': planner}, data_ranks=4, local_world_size=4, has_cuda=False)


def test_what_tensor_parallelism_needs() -> None:
    whole = {'strategy': 'ffn', 'tensor_parallel_degree': 2}
    assert tensor_parallel_degree(whole, 4, sharded=True) == 2 and tensor_parallel_degree(None, 4, sharded=False) == 1
    assert tensor_parallel_degree({**whole, 'tensor_parallel_degree': 1}, 4, sharded=False) == 1
    with pytest.raises(ValueError, match='tp_config: needs tensor_parallel_degree'):
        tensor_parallel_degree({'strategy': 'ffn'}, 4, sharded=True)
    with pytest.raises(ConfigError, match='tp_config.tensor_parallel_degree: 2 does not divide the 3 ranks'):
        tensor_parallel_degree(whole, 3, sharded=True)
    with pytest.raises(ConfigError, match='tp_config: needs an fsdp_config'):
        tensor_parallel_degree(whole, 4, sharded=False)


def test_one_process_has_no_tensor_parallelism() -> None:
    placement = resolve_placement(None, FSDP, {'strategy': 'ffn', 'tensor_parallel_degree': 2}, world_size=1, rank=0, has_cuda=True)
    assert placement.tp_config is None and placement.notes[0] == 'fsdp_config and tp_config: not used in a run of one process, but for activation_checkpointing'
