"""The typed MPT block and the MPTConfig that is built from it know the same keys and defaults, and refuse the same values."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from llmfoundry.config.mpt_block import MPT_COMPOSER_KEYS, AttnBlock, FfnBlock, InitBlock, MPTBlock
from llmfoundry.config.signatures import read_signature
from llmfoundry.models.mpt import configuration_mpt
from tests.config.base_config import problems_of

NOT_COMPLETED = {'kv_n_heads', 'seq_parallel_world_size'}  # keys of attn_config that are absent by default


def test_same_keys_and_defaults() -> None:
    parameters = {n: p for n, p in inspect.signature(configuration_mpt.MPTConfig.__init__).parameters.items() if n != 'self' and p.kind is not p.VAR_KEYWORD}
    fields = {n: f for n, f in MPTBlock.model_fields.items() if n not in MPT_COMPOSER_KEYS}
    assert set(fields) == set(parameters)
    assert {n: f.default for n, f in fields.items()} == {n: p.default for n, p in parameters.items()}


@pytest.mark.parametrize(('block', 'defaults', 'absent'), [
    (AttnBlock, configuration_mpt.attn_config_defaults, NOT_COMPLETED),
    (InitBlock, configuration_mpt.init_config_defaults, set()),
])  # fmt: skip
def test_same_nested_keys_and_defaults(block: Any, defaults: dict[str, Any], absent: set[str]) -> None:
    assert {n: f.default for n, f in block.model_fields.items() if n not in absent} == defaults
    assert absent <= set(block.model_fields)


def test_ffn_defaults() -> None:
    for key, value in configuration_mpt.ffn_config_defaults.items():
        assert FfnBlock.model_fields[key].default == value


def test_keys_of_the_composer_model_are_known() -> None:
    signature = read_signature('llmfoundry.models.mpt.composer_mpt:ComposerMPTCausalLM')
    assert signature is not None
    assert set(signature.parameters) - {'tokenizer'} <= set(MPTBlock.model_fields)


@pytest.mark.parametrize('model', [
    {'d_model': 16, 'n_heads': 3},
    {'resid_pdrop': 1.5},
    {'embedding_fraction': 0.0},
    {'attn_config': {'qk_ln': True, 'qk_gn': True}},
    {'attn_config': {'attn_impl': 'triton'}},
    {'attn_config': {'rope': True, 'rope_impl': 'hf', 'rope_hf_config': {'type': 'yarn', 'factor': 2.0}}},
    {'attn_config': {'rope': True, 'rope_dail_config': {'type': 'xposs', 'pos_idx_in_fp32': True, 'xpos_scale_base': 512}}},
    {'attn_config': {'nope': True}},
    {'attn_config': {'kv_dim': 8}},
    {'attn_config': {'attn_type': 'grouped_query_attention', 'kv_n_heads': 3}},
    {'attn_config': {'attn_type': 'grouped_query_attention', 'kv_n_heads': 0}},
    {'attn_config': {'attn_type': 'grouped_query_attention', 'kv_n_heads': 16}},
    {'attn_config': {'attn_logit_softcapping': -1.0}},
    {'ffn_config': {'ffn_type': 'mptgeglu'}},
    {'logit_scale': 'sqrt'},
    {'init_config': {'name': None}},
    {'expansion_ratio': 1.1},
])  # fmt: skip
def test_both_refuse(tmp_path: Path, model: dict[str, Any]) -> None:
    base = {'d_model': 16, 'n_heads': 2, 'n_layers': 2, 'max_seq_len': 64, 'vocab_size': 512}
    with pytest.raises(ValueError):
        configuration_mpt.MPTConfig(**{**base, **model})
    overrides = [f'model.{k}={v}' if not isinstance(v, dict) else f'model.{k}={_inline(v)}' for k, v in model.items()]
    problems = problems_of(tmp_path, overrides=tuple(overrides))
    assert problems and all(p.startswith('model.') for p in problems)


def _inline(value: Any) -> str:
    """YAML flow form of nested dicts."""
    if isinstance(value, dict):
        return '{' + ', '.join(f'{k}: {_inline(v)}' for k, v in value.items()) + '}'
    return 'null' if value is None else str(value).lower() if isinstance(value, bool) else str(value)
