"""Config overrides, where weights are created, and the errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmfoundry.models.hf.adapters import build_peft_config
from llmfoundry.models.hf.causal_lm import ComposerHFCausalLM
from llmfoundry.models.hf.load import apply_config_overrides, load_config, load_model, resolve_attn_implementation
from tests.helpers.processes import run_in_processes
from tests.helpers.tiny_hf import save_config, save_model


def llama(**kwargs: Any) -> LlamaConfig:
    return LlamaConfig(vocab_size=67, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **kwargs)


def test_overrides_are_set_and_merged() -> None:
    config = llama(rope_scaling={'rope_type': 'linear', 'factor': 2.0})
    apply_config_overrides(config, {'num_hidden_layers': 3, 'rope_scaling': {'factor': 4.0}})
    assert config.num_hidden_layers == 3
    assert config.rope_scaling['factor'] == 4.0 and config.rope_scaling['rope_type'] == 'linear'


def test_none_takes_a_new_dict() -> None:
    config = llama()
    config.extra = None
    apply_config_overrides(config, {'extra': {'type': 'dynamic', 'factor': 2.0}})
    assert config.extra == {'type': 'dynamic', 'factor': 2.0}


def rope_facts(config: LlamaConfig) -> dict[str, Any]:
    """What the model makes of a config's rope settings, wherever transformers keeps them."""
    rope = LlamaForCausalLM(config).model.rotary_emb
    return {'type': rope.rope_type, 'inv_freq': rope.inv_freq.tolist()}


@pytest.mark.parametrize(('overrides', 'same_as'), [
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, {'rope_theta': 2e4, 'rope_scaling': {'rope_type': 'dynamic', 'factor': 2.0}}),
    ({'rope_scaling': {'rope_type': 'linear', 'factor': 4.0}}, {'rope_theta': 2e4, 'rope_scaling': {'rope_type': 'linear', 'factor': 4.0}}),
    ({'rope_theta': 5e5}, {'rope_theta': 5e5}),
    ({'rope_theta': 5e5, 'rope_scaling': {'rope_type': 'linear', 'factor': 4.0}}, {'rope_theta': 5e5, 'rope_scaling': {'rope_type': 'linear', 'factor': 4.0}}),
])
def test_rope_overrides_keep_the_rest_of_rope(overrides: dict[str, Any], same_as: dict[str, Any]) -> None:
    config = llama(rope_theta=2e4)
    apply_config_overrides(config, overrides)
    assert rope_facts(config) == rope_facts(llama(**same_as)) != rope_facts(llama(rope_theta=2e4))


def test_rope_scaling_can_be_taken_away() -> None:
    config = llama(rope_theta=2e4, rope_scaling={'rope_type': 'linear', 'factor': 4.0})
    apply_config_overrides(config, {'rope_scaling': None})
    assert rope_facts(config) == rope_facts(llama(rope_theta=2e4))


@pytest.mark.parametrize(('overrides', 'message'), [
    ({'num_layers_': 3}, "config_overrides.num_layers_: LlamaConfig has no attribute 'num_layers_'"),
    ({'rope_scaling': {'factr': 4.0}}, r"config_overrides.rope_scaling: unknown keys \['factr'\]; the config has \['factor', .*'rope_type'"),
    ({'inner': 3}, 'config_overrides.inner: expected a mapping of attributes of LlamaConfig, got 3'),
    ({'inner': {'nothing': 3}}, "config_overrides.inner.nothing: LlamaConfig has no attribute 'nothing'"),
])
def test_wrong_overrides(overrides: dict[str, Any], message: str) -> None:
    config = llama(rope_scaling={'rope_type': 'linear', 'factor': 2.0})
    config.inner = llama()
    with pytest.raises(ValueError, match=message):
        apply_config_overrides(config, overrides)


def test_nested_config_override() -> None:
    config = llama()
    config.inner = llama()
    apply_config_overrides(config, {'inner': {'hidden_size': 8}})
    assert config.inner.hidden_size == 8 and config.hidden_size == 16


def test_overrides_reach_the_model(tmp_path: Path) -> None:
    model = ComposerHFCausalLM(None, save_config(tmp_path, 'gpt2'), pretrained=False, config_overrides={'n_layer': 1})
    assert len(model.model.transformer.h) == 1


def test_attn_implementation(tmp_path: Path) -> None:
    assert resolve_attn_implementation(None, False) is None
    with pytest.raises(ValueError, match='flash_attention_2 needs the flash-attn package'):
        resolve_attn_implementation('flash_attention_2', False)
    with pytest.warns(UserWarning, match='overrides attn_implementation: eager'), pytest.raises(ValueError, match='flash-attn'):
        resolve_attn_implementation('eager', True)
    name = save_config(tmp_path, 'llama')
    for implementation in ('eager', 'sdpa'):
        model = ComposerHFCausalLM(None, name, pretrained=False, attn_implementation=implementation)
        assert model.config._attn_implementation == implementation


def test_meta_builds_without_memory_and_keeps_buffers(tmp_path: Path) -> None:
    name = save_config(tmp_path, 'llama')
    model = ComposerHFCausalLM(None, name, pretrained=False, init_device='meta')
    assert all(p.device.type == 'meta' for p in model.parameters())
    assert all(b.device.type == 'cpu' for b in model.buffers())


def test_meta_parameters_initialise_module_by_module(tmp_path: Path) -> None:
    model = ComposerHFCausalLM(None, save_config(tmp_path, 'llama'), pretrained=False, init_device='meta').model
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(torch.full_like(p, float('nan'), device='cpu')))
        if list(module.parameters(recurse=False)):
            model.param_init_fn(module)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.equal(model.model.norm.weight, torch.ones(16))


def test_meta_with_pretrained_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='init_device: meta with pretrained: true .* use init_device: mixed'):
        ComposerHFCausalLM(None, save_model(tmp_path, 'gpt2'), init_device='meta')


def test_unknown_init_device_and_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="init_device='gpu' is not known; choose one of: cpu, meta, mixed"):
        ComposerHFCausalLM(None, save_config(tmp_path, 'gpt2'), pretrained=False, init_device='gpu')
    with pytest.raises(TypeError, match='pretraind'):
        ComposerHFCausalLM(None, str(tmp_path), pretraind=False)


def _load_mixed(name: str, init_device: str) -> str:
    config = load_config(name, False, None, None, None)
    try:
        model = load_model(name, config, pretrained=True, init_device=init_device)
    except RuntimeError as e:
        return str(e)
    return next(model.parameters()).device.type


@pytest.mark.world_size(2)
def test_ranks_agree(tmp_path: Path) -> None:
    """With mixed only rank 0 holds weights; when rank 0 alone fails (meta), rank 1 hears of it."""
    name = save_model(tmp_path, 'gpt2')
    assert run_in_processes(_load_mixed, 2, name, 'mixed') == ['cpu', 'meta']
    for text in run_in_processes(_load_mixed, 2, name, 'meta'):
        assert text.startswith('Loading the model failed on rank(s) [0]. rank 0: ValueError: init_device: meta with pretrained')


@pytest.mark.parametrize(('config', 'message'), [
    ({'peft_type': 'QORA'}, r"peft_config.peft_type: got 'QORA', PEFT \S+ has no such method. Supported: .*IA3.*LORA.*PREFIX_TUNING"),
    ({'peft_type': 'adalora'}, 'peft_config.peft_type: ADALORA cannot be trained here: its ranks are reallocated by a call after each step. Supported: .*LORA'),
    ({'task_type': 'SEQ_CLS'}, "peft_config.task_type: got 'SEQ_CLS', only CAUSAL_LM is supported"),
    ({'rank': 4}, 'peft_config: .*rank.*arguments of peft.LoraConfig'),
])
def test_wrong_peft_config(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_peft_config(config)
