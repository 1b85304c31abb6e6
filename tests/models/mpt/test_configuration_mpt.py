"""MPTConfig: defaults, completion of nested dicts, every rule with its text, old folders, and writing and reading."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from llmfoundry.models.mpt.configuration_mpt import MPTConfig, attn_config_defaults
from tests.helpers.tiny_mpt import tiny_config

MPT_7B = {
    'architectures': ['MPTForCausalLM'],
    'attn_config': {
        'alibi': True,
        'alibi_bias_max': 8,
        'attn_impl': 'torch',
        'attn_pdrop': 0,
        'attn_type': 'multihead_attention',
        'attn_uses_sequence_id': False,
        'clip_qkv': None,
        'prefix_lm': False,
        'qk_ln': False,
        'softmax_scale': None,
    },
    'd_model': 4096,
    'emb_pdrop': 0,
    'embedding_fraction': 1.0,
    'expansion_ratio': 4,
    'init_config': {
        'emb_init_std': None,
        'emb_init_uniform_lim': None,
        'fan_mode': 'fan_in',
        'init_div_is_residual': True,
        'init_gain': 0,
        'init_nonlinearity': 'relu',
        'init_std': 0.02,
        'name': 'kaiming_normal_',
        'verbose': 0,
    },
    'init_device': 'cpu',
    'learned_pos_emb': True,
    'logit_scale': None,
    'max_seq_len': 2048,
    'model_type': 'mpt',
    'n_heads': 32,
    'n_layers': 32,
    'no_bias': True,
    'norm_type': 'low_precision_layernorm',
    'resid_pdrop': 0,
    'tokenizer_name': 'EleutherAI/gpt-neox-20b',
    'torch_dtype': 'bfloat16',
    'transformers_version': '4.28.1',
    'use_cache': False,
    'verbose': 0,
    'vocab_size': 50432,
}


def test_defaults() -> None:
    config = MPTConfig()
    scalars = {
        'd_model': 2048, 'n_heads': 16, 'n_layers': 24, 'head_dim': None, 'expansion_ratio': 4, 'max_seq_len': 2048, 'vocab_size': 50368, 'resid_pdrop': 0.0,
        'emb_pdrop': 0.0, 'learned_pos_emb': True, 'init_device': 'cpu', 'logit_scale': None, 'no_bias': False, 'attention_bias': None, 'embedding_fraction': 1.0,
        'norm_type': 'low_precision_layernorm', 'norm_eps': 1e-5, 'use_cache': False, 'fc_type': {'name': 'torch'}, 'tie_word_embeddings': True,
        'use_pad_tok_in_ffn': True, 'block_overrides': None, 'final_logit_softcapping': None, 'ffn_config': {'ffn_type': 'mptmlp'},
    }  # fmt: skip
    assert {key: getattr(config, key) for key in scalars} == scalars
    assert config.attn_config == attn_config_defaults and config.attn_config is not attn_config_defaults
    assert config.init_config == {
        'name': 'kaiming_normal_', 'fan_mode': 'fan_in', 'init_nonlinearity': 'relu', 'init_div_is_residual': True, 'emb_init_std': None,
        'emb_init_uniform_lim': None, 'init_std': None, 'init_gain': 0.0,
    }  # fmt: skip
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (2048, 24, 16)


def test_partial_dicts_are_completed_recursively_and_not_changed() -> None:
    given = {'rope': True, 'rope_hf_config': {'type': 'linear'}, 'attn_temperature_tuning': {'attn_scale': 0.1}}
    config = tiny_config(given)
    assert given == {'rope': True, 'rope_hf_config': {'type': 'linear'}, 'attn_temperature_tuning': {'attn_scale': 0.1}}
    assert config.attn_config['rope_hf_config'] == {'type': 'linear', 'factor': 1.0}
    assert config.attn_config['attn_temperature_tuning'] == {'floor_scale': 8192, 'attn_scale': 0.1}
    assert config.attn_config['attn_type'] == 'multihead_attention'
    assert tiny_config(max_seq_len=64.0).max_seq_len == 64 and isinstance(tiny_config(max_seq_len=64.0).max_seq_len, int)
    assert tiny_config(fc_type={'name': 'torch', 'x': 1}).fc_type == {'name': 'torch', 'x': 1}
    assert not hasattr(tiny_config(name='mpt_causal_lm', loss_fn='fused_crossentropy'), 'loss_fn')


def test_positions_settle_learned_pos_emb() -> None:
    for name in ('alibi', 'rope'):
        with pytest.warns(UserWarning, match=f'learned_pos_emb is set to False, since attn_config.{name} is true.'):
            assert MPTConfig(attn_config={name: True}).learned_pos_emb is False
    with pytest.warns(UserWarning, match='No positional information is used'):
        MPTConfig(learned_pos_emb=False)


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({'d_model': 30}, 'd_model must be divisible by n_heads, got d_model 30 and n_heads 4'),
    ({'expansion_ratio': 1.01}, 'd_model * expansion_ratio must be an integer, got 32 * 1.01 = 32.32'),
    ({'max_seq_len': 2048.5}, 'max_seq_len must be an integer, got 2048.5'),
    ({'resid_pdrop': 1.5}, 'resid_pdrop is a probability and must be between 0 and 1, got 1.5'),
    ({'emb_pdrop': -0.1}, 'emb_pdrop is a probability and must be between 0 and 1, got -0.1'),
    ({'attn_config': {'attn_pdrop': 2}}, 'attn_config.attn_pdrop is a probability and must be between 0 and 1, got 2'),
    ({'embedding_fraction': 0}, 'embedding_fraction must be above 0 and at most 1, got 0'),
    ({'logit_scale': 'sqrt'}, "logit_scale must be a number or 'inv_sqrt_d_model', got 'sqrt'"),
    (
        {'attn_config': {'attn_impl': 'triton'}},
        "attn_config.attn_impl must be torch or flash, got 'triton' (triton was removed; flash takes its place)",
    ),
    ({'attn_config': {'attn_impl': 'xla'}}, "attn_config.attn_impl must be torch or flash, got 'xla'"),
    ({'attn_config': {'qk_ln': True, 'qk_gn': True}}, 'attn_config.qk_ln and attn_config.qk_gn cannot both be true; choose one'),
    ({'attn_config': {'attn_logit_softcapping': 0}}, 'attn_config.attn_logit_softcapping must be above 0 or null, got 0'),
    (
        {'attn_config': {'kv_dim': 16}},
        'attn_config.kv_dim is 16, which needs attn_config.fused_qkv: false, since keys and values have another input',
    ),
    (
        {'attn_config': {'attn_type': 'grouped_query_attention'}},
        'attn_config.kv_n_heads must be given when attn_config.attn_type is grouped_query_attention',
    ),
    *[
        (
            {'attn_config': {'attn_type': 'grouped_query_attention', 'kv_n_heads': n}},
            f'attn_config.kv_n_heads must be between 1 and n_heads and divide n_heads, got kv_n_heads {n} and n_heads 4',
        )
        for n in (0, 8, 3)
    ],
    ({'attn_config': {'rope': True, 'rope_impl': 'x'}}, "attn_config.rope_impl must be dail or hf, got 'x'"),
    ({'attn_config': {'rope': True, 'rope_dail_config': {'type': 'x'}}}, "attn_config.rope_dail_config.type must be one of original, xpos, got 'x'"),
    (
        {'attn_config': {'rope': True, 'rope_impl': 'hf', 'rope_hf_config': {'type': 'x'}}},
        "attn_config.rope_hf_config.type must be one of no_scaling, linear, dynamic, llama3, got 'x'",
    ),
    ({'attn_config': {'nope': True}}, 'attn_config.nope cannot be true for the whole model; set it for some layers through block_overrides'),
    (
        {'attn_config': {'prefix_lm': True}},
        'attn_config.prefix_lm is true, but prefix language models are no longer supported; set it to false or remove it',
    ),
    ({'ffn_config': {'ffn_type': 'mptgeglu'}}, "ffn_config.ffn_type 'mptgeglu' was renamed: use 'mptglu' (its default activation is gelu)"),
    (
        {'ffn_config': {'ffn_type': 'te_ln_mlp', 'ffn_act_fn': {'name': 'relu'}}},
        'ffn_config.ffn_act_fn cannot be set with ffn_config.ffn_type te_ln_mlp, which has its own activation',
    ),
    ({'fc_type': {'bias': True}}, "fc_type must be a name or a dict with the key name, got {'bias': True}"),
    ({'attn_config': {'attn_type': 'grouped_query_attention', 'kv_n_heads': '2'}}, "attn_config.kv_n_heads must be an integer, got '2'"),
    ({'attn_config': {'attn_type': 'grouped_query_attention', 'kv_n_heads': [2]}}, 'attn_config.kv_n_heads must be an integer, got [2]'),
    ({'attn_config': {'attn_type': 'grouped_query_attention', 'kv_n_heads': 1.5}}, 'attn_config.kv_n_heads must be an integer, got 1.5'),
    ({'attn_config': 'flash'}, "attn_config must be a mapping of settings, got 'flash'"),
    ({'attn_config': {'rope': True, 'rope_dail_config': 'xpos'}}, "attn_config.rope_dail_config must be a mapping of settings, got 'xpos'"),
    ({'attn_config': {'attn_pdrop': '0.1'}}, "attn_config.attn_pdrop must be a number, got '0.1'"),
    ({'attn_config': {'attn_logit_softcapping': '30'}}, "attn_config.attn_logit_softcapping must be a number, got '30'"),
    ({'ffn_config': 'mptmlp'}, "ffn_config must be a mapping of settings, got 'mptmlp'"),
    ({'ffn_config': ['mptmlp']}, "ffn_config must be a mapping of settings, got ['mptmlp']"),
    ({'ffn_config': {'ffn_type': 3}}, 'ffn_config.ffn_type must be a name, got 3'),
    ({'ffn_config': {'ffn_hidden_size': 'big'}}, "ffn_config.ffn_hidden_size must be an integer, got 'big'"),
    ({'ffn_config': {'ffn_act_fn': 'silu'}}, "ffn_config.ffn_act_fn must be a mapping with the key name, such as {name: silu}, got 'silu'"),
    ({'d_model': '32'}, "d_model must be an integer, got '32'"),
    ({'n_layers': None}, 'n_layers must be an integer, got None'),
    ({'n_heads': 0}, 'n_heads must be above 0, got 0'),
    ({'expansion_ratio': '4'}, "expansion_ratio must be a number, got '4'"),
    ({'init_config': {'name': None}}, 'init_config.name must name an initialisation function such as kaiming_normal_, got None'),
]


@pytest.mark.parametrize(('kwargs', 'text'), ERRORS)
def test_value_errors(kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as e:
        tiny_config(**kwargs)
    assert str(e.value) == text


def test_sequence_parallelism() -> None:
    with pytest.raises(NotImplementedError) as e:
        tiny_config({'seq_parallel_world_size': 2})
    assert str(e.value) == 'attn_config.seq_parallel_world_size is 2; sequence parallelism is not supported, set it to 1'
    for value in (None, 1):
        assert 'seq_parallel_world_size' not in tiny_config({'seq_parallel_world_size': value}).attn_config


def test_folder_of_a_released_model_loads(tmp_path: Path) -> None:
    (tmp_path / 'config.json').write_text(json.dumps(MPT_7B))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        config = MPTConfig.from_pretrained(tmp_path)
    assert (config.d_model, config.n_layers, config.vocab_size, config.no_bias) == (4096, 32, 50432, True)
    assert config.learned_pos_emb is False and 'prefix_lm' not in config.attn_config
    assert config.attn_config['rope'] is False and config.init_config['init_std'] == 0.02


@pytest.mark.filterwarnings('ignore')
def test_round_trip(tmp_path: Path) -> None:
    config = tiny_config(
        {'rope': True, 'rope_impl': 'hf', 'attn_impl': 'torch'},
        tie_word_embeddings=False,
        use_cache=True,
        block_overrides={'order': [{'name': 'default'}, {'name': 'a'}], 'overrides': {'a': {'attn_config': {'nope': True}}}},
        my_key=5,
    )
    config.save_pretrained(tmp_path)
    loaded = MPTConfig.from_pretrained(tmp_path)
    keys = set(config.to_dict()) - {'transformers_version', '_name_or_path'}
    assert {'attn_config', 'block_overrides', 'init_config', 'my_key', 'tie_word_embeddings', 'use_cache'} <= keys
    assert {k: loaded.to_dict().get(k) for k in keys} == {k: config.to_dict()[k] for k in keys}
    assert loaded.tie_word_embeddings is False and loaded.use_cache is True and loaded.my_key == 5
    assert json.loads((tmp_path / 'config.json').read_text())['model_type'] == 'mpt'


def test_configuration_needs_no_foreign_package() -> None:
    """The configuration is part of exported folders."""
    code = 'import sys; import llmfoundry.models.mpt.configuration_mpt; bad = {"composer", "omegaconf", "streaming"} & set(sys.modules); sys.exit(str(bad) if bad else 0)'
    subprocess.run([sys.executable, '-c', code], check=True)
