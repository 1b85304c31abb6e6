"""Tiny MPT models for tests: fp32, without warnings about positions."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from llmfoundry.models.mpt.configuration_mpt import MPTConfig
from llmfoundry.models.mpt.modeling_mpt import MPTForCausalLM

__all__ = ['ATTENTION_CLASSES', 'POSITIONS', 'randomise', 'tiny_config', 'tiny_mpt']

POSITIONS: dict[str, dict[str, Any]] = {
    'alibi': {'alibi': True},
    'learned': {},
    'rope_dail': {'rope': True, 'rope_impl': 'dail'},
    'rope_xpos': {'rope': True, 'rope_impl': 'dail', 'rope_dail_config': {'type': 'xpos'}},
    'rope_hf': {'rope': True, 'rope_impl': 'hf'},
    'rope_linear': {'rope': True, 'rope_impl': 'hf', 'rope_hf_config': {'type': 'linear', 'factor': 2.0}},
    'rope_dynamic': {'rope': True, 'rope_impl': 'hf', 'rope_hf_config': {'type': 'dynamic', 'factor': 2.0}},
    'rope_llama3': {
        'rope': True,
        'rope_impl': 'hf',
        'rope_hf_config': {'type': 'llama3', 'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 16},
    },
}
ATTENTION_CLASSES: dict[str, dict[str, Any]] = {
    'mha': {'attn_type': 'multihead_attention'},
    'mqa': {'attn_type': 'multiquery_attention'},
    'gqa': {'attn_type': 'grouped_query_attention', 'kv_n_heads': 2},
}


def tiny_config(attn_config: dict[str, Any] | None = None, **kwargs: Any) -> MPTConfig:
    """A config of 2 layers, width 32 and 4 heads, for up to 64 tokens out of 101."""
    settings = {'d_model': 32, 'n_heads': 4, 'n_layers': 2, 'vocab_size': 101, 'max_seq_len': 64, 'norm_type': 'layernorm', **kwargs}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return MPTConfig(attn_config=attn_config, **settings)


def randomise(model: torch.nn.Module, seed: int = 0, std: float = 0.1) -> None:
    """Gives every parameter, biases and norms too, a random value, so that no term of a comparison is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.normal_(1.0 if 'norm' in name and name.endswith('weight') else 0.0, std, generator=generator)


def tiny_mpt(attn_config: dict[str, Any] | None = None, seed: int = 0, **kwargs: Any) -> MPTForCausalLM:
    """The model of ``tiny_config`` with random parameters, in evaluation mode."""
    model = MPTForCausalLM(tiny_config(attn_config, **kwargs))
    randomise(model, seed)
    return model.eval()
