"""Builders of TransformerEngine's and megablocks' blocks, with stand-ins for packages that need CUDA."""

from __future__ import annotations

import dataclasses
import sys
import types
from typing import Any, Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmfoundry.models.layers import ffn_external, megablocks_args
from llmfoundry.models.layers.layer_builders import build_ffn
from llmfoundry.models.utils.config_moe_args import config_megablocks_moe_args, get_megablocks_device_mesh


@dataclasses.dataclass
class _Arguments:
    hidden_size: int = 1024
    ffn_hidden_size: int = 4096
    num_layers: int = 1
    bias: bool = True
    return_bias: bool = True
    activation_fn: Callable | None = None
    moe_num_experts: int = 1
    moe_top_k: int = 1
    moe_expert_model_parallelism: bool = False
    expert_parallel_group: Any = None
    fp16: bool = True
    bf16: bool = False
    device: Any = None


class _DMoE(nn.Module):
    def __init__(self, args: _Arguments) -> None:
        super().__init__()
        self.args = args
        self.experts = nn.Module()
        self.experts.mlp = nn.Module()
        rows = args.moe_num_experts * args.ffn_hidden_size
        self.experts.mlp.w1 = nn.Parameter(torch.zeros(rows, args.hidden_size))
        self.experts.mlp.w2 = nn.Parameter(torch.zeros(rows, args.hidden_size))


@pytest.fixture()
def megablocks(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {'megablocks': {}, 'megablocks.layers': {}, 'megablocks.layers.arguments': {'Arguments': _Arguments}, 'megablocks.layers.dmoe': {'dMoE': _DMoE}}
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr('llmfoundry.typed_registry._is_importable', lambda module: True)


def test_config_becomes_megablocks_arguments(megablocks: None) -> None:
    config = {'moe_num_experts': 4, 'moe_top_k': 2, 'ffn_act_fn': {'name': 'silu'}, 'lbl_process_group': 'none'}
    prepared = config_megablocks_moe_args(config, d_model=8, expansion_ratio=2, n_layers=6)
    assert config == {'moe_num_experts': 4, 'moe_top_k': 2, 'ffn_act_fn': {'name': 'silu'}, 'lbl_process_group': 'none'}
    ffn = build_ffn('mb_dmoe', 8, 2, 'cpu', False, prepared)
    assert ffn._uses_megablocks and ffn.experts.mlp.ffn_hidden_size == 16
    assert ffn.args == _Arguments(
        hidden_size=8, ffn_hidden_size=16, num_layers=6, bias=False, return_bias=False, activation_fn=F.silu, moe_num_experts=4, moe_top_k=2, fp16=False, device=torch.device('cpu'),
    )  # fmt: skip


def test_keys_that_megablocks_does_not_have(megablocks: None) -> None:
    with pytest.raises(ValueError, match='ffn_config of mb_dmoe has unknown keys: moe_topk. Allowed, as in megablocks: activation_fn, bf16, '):
        build_ffn('mb_dmoe', 8, 2, 'cpu', True, {'moe_topk': 2})


def test_missing_megablocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'megablocks', None)
    with pytest.raises(ImportError, match='^ffn_type mb_moe needs megablocks and a CUDA device .* On other machines use ffn_type torch_dmoe$'):
        ffn_external.build_mb_moe(8, 2)


@pytest.mark.parametrize(
    ('call', 'error_cls', 'text'),
    [
        (
            lambda: get_megablocks_device_mesh((2, 4), 2, 8), RuntimeError,
            'ffn_config.device_mesh: hybrid sharding does not work with megablocks, got a mesh of shape (2, 4). Leave data_parallel_replicate_degree at 1',
        ),
        (lambda: get_megablocks_device_mesh(None, 3, 8), ValueError, 'ffn_config.moe_world_size: the world size 8 must be a multiple of moe_world_size, got 3'),
        (lambda: get_megablocks_device_mesh((6,), 4, 8), ValueError, 'ffn_config.moe_world_size: the world size 6 must be a multiple of moe_world_size, got 4'),
        (
            lambda: config_megablocks_moe_args({'moe_world_size': 2}, 8, 2, 1), ValueError,
            'ffn_config.moe_world_size 2 needs a run of several processes, but no process group has been started',
        ),
        (lambda: megablocks_args.resolve_lbl_process_group('expert_group', None), ValueError, 'ffn_config.lbl_process_group: expert_group needs moe_world_size > 1'),
        (
            lambda: megablocks_args.resolve_lbl_process_group('all', None), ValueError,
            "ffn_config.lbl_process_group must be expert_group, global_group, a group size, a process group or none, got 'all'",
        ),
    ],
)  # fmt: skip
def test_sizes_and_groups_that_do_not_fit(call: Callable, error_cls: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test of this process may have started one.
    monkeypatch.setattr(megablocks_args.dist, 'is_initialized', lambda: False)
    with pytest.raises(error_cls) as error:
        call()
    assert str(error.value) == text


def test_other_blocks_keep_their_config() -> None:
    config = {'ffn_type': 'torch_dmoe', 'moe_num_experts': 2}
    assert megablocks_args.config_moe_args(config, 8, 2, 1) is config


def test_transformer_engine_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    te = types.ModuleType('transformer_engine.pytorch')
    te.LayerNormMLP = type('LayerNormMLP', (nn.Module,), {'__init__': lambda self, **kwargs: (nn.Module.__init__(self), setattr(self, 'kwargs', kwargs))[0]})
    monkeypatch.setitem(sys.modules, 'transformer_engine', types.ModuleType('transformer_engine'))
    monkeypatch.setitem(sys.modules, 'transformer_engine.pytorch', te)
    monkeypatch.setattr('llmfoundry.typed_registry._is_importable', lambda module: True)
    ffn = build_ffn('te_ln_mlp', 8, 3, 'cpu', False, {'fc_type': {'name': 'te'}, 'activation': 'swiglu'})
    assert ffn._has_norm and ffn.kwargs == {'hidden_size': 8, 'ffn_hidden_size': 24, 'bias': False, 'device': 'cpu', 'activation': 'swiglu'}
    with pytest.raises(ValueError) as error:
        build_ffn('te_ln_mlp', 8, 3, 'cpu', False, {'ffn_act_fn': {'name': 'silu'}})
    assert str(error.value) == (
        "ffn_config.ffn_act_fn: te_ln_mlp cannot take a torch function, got {'name': 'silu'}: set ffn_config.activation to a name that TransformerEngine knows"
    )


def test_missing_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'transformer_engine', None)
    with pytest.raises(ImportError, match='^ffn_type te_ln_mlp needs TransformerEngine'):
        ffn_external.build_te_ln_mlp(8, 2)
