"""Where weights are created and how they are sharded."""

from __future__ import annotations

from typing import Any

import pytest

from llmfoundry.command_utils.parallelism import Placement, build_parallelism_config, fsdp2_settings, resolve_placement
from llmfoundry.errors import ConfigError

FSDP = {'sharding_strategy': 'FULL_SHARD', 'mixed_precision': 'PURE', 'activation_checkpointing': True, 'activation_checkpointing_reentrant': False, 'limit_all_gathers': True}


def _resolve(init_device: str | None, fsdp: Any, world_size: int = 2, rank: int = 0, has_cuda: bool = True) -> Placement:
    return resolve_placement(init_device, fsdp, None, world_size=world_size, rank=rank, has_cuda=has_cuda)


def test_one_process_shards_nothing_and_creates_weights_on_the_cpu() -> None:
    for init_device in ('meta', 'mixed'):
        placement = _resolve(init_device, FSDP, world_size=1)
        assert (placement.init_device, placement.fsdp_config) == ('cpu', None)
        assert placement.notes[0] == 'fsdp_config: not used in a run of one process'
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


def test_fsdp1_keys_become_fsdp2_settings() -> None:
    settings, notes = fsdp2_settings({**FSDP, 'sharding_strategy': 'shard_grad_op', 'mixed_precision': 'pure'})
    assert settings == {'state_dict_type': 'full', 'reshard_after_forward': False, 'mixed_precision': 'PURE', 'activation_checkpointing': True}
    assert notes == ['fsdp_config: FSDP2 has no counterpart of activation_checkpointing_reentrant, limit_all_gathers; ignored']
    assert fsdp2_settings({'state_dict_type': 'sharded'})[0] == {'state_dict_type': 'sharded', 'reshard_after_forward': True}


def test_what_fsdp2_cannot_do_is_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        fsdp2_settings({'sharding_strategy': 'NO_SHARD', 'cpu_offload': True, 'save_planner': {'x': {}}})
    assert [p.path for p in caught.value.problems] == ['fsdp_config.sharding_strategy', 'fsdp_config.cpu_offload', 'fsdp_config.save_planner']


def test_composer_gets_its_fsdp2_object() -> None:
    config, _ = build_parallelism_config(Placement('cpu', FSDP, None), model=None)
    assert type(config['fsdp']).__name__ == 'FSDP2Config'
    assert config['fsdp'].activation_checkpointing and config['fsdp'].state_dict_type == 'full'
    assert build_parallelism_config(Placement('cpu', None, None), model=None) == (None, [])


def test_tensor_parallelism_names_what_is_missing() -> None:
    with pytest.raises(ConfigError, match='tp_config: needs tensor_parallel_degree'):
        build_parallelism_config(Placement('cpu', None, {'strategy': 'ffn'}), model=None)
