"""Logits equal those of transformers' own models with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MptForCausalLM
from transformers import MptConfig as HFMptConfig

from tests.helpers.tiny_mpt import randomise, tiny_mpt

VOCAB, SEQ = 101, 48


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('n_heads', [4, 6])
@pytest.mark.parametrize('attn_impl', ['torch', 'flash'])
def test_equals_mpt_of_transformers(ids: torch.Tensor, n_heads: int, attn_impl: str) -> None:
    d_model = 8 * n_heads
    theirs = MptForCausalLM(
        HFMptConfig(
            d_model=d_model, n_heads=n_heads, n_layers=3, vocab_size=VOCAB, max_seq_len=64, layer_norm_epsilon=1e-5, attn_config={'alibi': True}
        ),
    ).eval()
    ours = tiny_mpt({'alibi': True, 'attn_impl': attn_impl}, d_model=d_model, n_heads=n_heads, n_layers=3, no_bias=True)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing and unexpected in ([], ['lm_head.weight'])
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


def copy_llama(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Copies a Llama's weights into an MPT with rope, GLU, RMSNorm and an untied head."""
    source = theirs.state_dict()
    target = {
        'transformer.wte.weight': source['model.embed_tokens.weight'],
        'transformer.norm_f.weight': source['model.norm.weight'],
        'lm_head.weight': source['lm_head.weight'],
    }
    for i in range(theirs.config.num_hidden_layers):
        a, b = f'model.layers.{i}', f'transformer.blocks.{i}'
        target[f'{b}.attn.Wqkv.weight'] = torch.cat([source[f'{a}.self_attn.{n}_proj.weight'] for n in 'qkv'])
        target[f'{b}.attn.out_proj.weight'] = source[f'{a}.self_attn.o_proj.weight']
        target[f'{b}.norm_1.weight'] = source[f'{a}.input_layernorm.weight']
        target[f'{b}.norm_2.weight'] = source[f'{a}.post_attention_layernorm.weight']
        for name in ('gate', 'up', 'down'):
            target[f'{b}.ffn.{name}_proj.weight'] = source[f'{a}.mlp.{name}_proj.weight']
    ours.load_state_dict(target, strict=True)


LLAMA3 = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 16}
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    'none': ({'type': 'no_scaling', 'factor': 1.0}, None),
    'linear': ({'type': 'linear', 'factor': 2.0}, {'rope_type': 'linear', 'factor': 2.0}),
    'llama3': ({'type': 'llama3', **LLAMA3}, {'rope_type': 'llama3', **LLAMA3}),
}


@pytest.mark.parametrize('scaling', SCALINGS)
@pytest.mark.parametrize('attn_impl', ['torch', 'flash'])
def test_equals_llama_of_transformers(ids: torch.Tensor, scaling: str, attn_impl: str) -> None:
    ours_scaling, theirs_scaling = SCALINGS[scaling]
    theirs = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=2,
            intermediate_size=96,
            vocab_size=VOCAB,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            rope_theta=500.0,
            rope_scaling=theirs_scaling,
        ),
    ).eval()
    randomise(theirs)
    ours = tiny_mpt(
        {
            'attn_type': 'grouped_query_attention',
            'kv_n_heads': 2,
            'attn_impl': attn_impl,
            'rope': True,
            'rope_impl': 'hf',
            'rope_theta': 500.0,
            'rope_hf_config': ours_scaling,
        },
        d_model=64,
        ffn_config={'ffn_type': 'mptglu', 'ffn_hidden_size': 96, 'ffn_act_fn': {'name': 'silu'}},
        norm_type='rmsnorm',
        no_bias=True,
        tie_word_embeddings=False,
    )
    copy_llama(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)
        # Padding on the left and on the right, at the real tokens.
        for mask in (torch.arange(SEQ) >= torch.tensor([[7], [0]]), torch.arange(SEQ) < torch.tensor([[30], [SEQ]])):
            mine, other = ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask.long()).logits
            torch.testing.assert_close(mine[mask], other[mask], atol=1e-5, rtol=0)
