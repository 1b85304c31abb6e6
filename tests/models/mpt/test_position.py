"""Rotary embeddings: the two implementations agree, scalings follow transformers, and numbers do not depend on how the model was made."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llmfoundry.models.layers.attention import apply_temperature_tuning
from llmfoundry.models.layers.position import PartialLlamaConfig, apply_rotary, gen_rotary_embedding
from tests.helpers.tiny_mpt import tiny_mpt

DAIL, HF = {'type': 'original', 'pos_idx_in_fp32': True, 'xpos_scale_base': 512}, {'type': 'no_scaling', 'factor': 1.0}
LLAMA3 = {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_max_position_embeddings': 16}


def test_dail_equals_hf_in_a_model() -> None:
    ids = torch.randint(0, 101, (2, 40), generator=torch.Generator().manual_seed(1))
    logits = {impl: tiny_mpt({'rope': True, 'rope_impl': impl, 'rope_theta': 300})(ids).logits for impl in ('dail', 'hf')}
    assert torch.equal(logits['dail'], logits['hf'])
    assert (logits['hf'] - tiny_mpt({'rope': True, 'rope_impl': 'hf', 'rope_theta': 9000})(ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize('scaling', [HF, {'type': 'linear', 'factor': 3.0}, {'type': 'dynamic', 'factor': 2.0}, {'type': 'llama3', **LLAMA3}])
@pytest.mark.parametrize('seq_len', [20, 50])
def test_tables_equal_transformers(scaling: dict, seq_len: int) -> None:
    ours = gen_rotary_embedding('hf', 100.0, DAIL, scaling, max_seq_len=32, d_model=64, n_heads=4)
    hf_scaling = None if scaling['type'] == 'no_scaling' else {'rope_type': scaling['type'], **{k: v for k, v in scaling.items() if k != 'type'}}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=32, rope_theta=100.0, rope_scaling=hf_scaling)
    )
    positions = torch.arange(seq_len)[None]
    q = torch.randn(1, 4, seq_len, 16, generator=torch.Generator().manual_seed(2))
    want, _ = apply_rotary_pos_emb(q, q, *theirs(q, positions))
    got = apply_rotary(q.transpose(1, 2), ours(positions, seq_len)).transpose(1, 2)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_xpos_decays_with_distance_only() -> None:
    """xpos multiplies the score of a pair by ``base ** (distance / scale_base)``, whatever the absolute positions."""
    xpos = gen_rotary_embedding('dail', 100.0, {'type': 'xpos', 'xpos_scale_base': 8}, HF, max_seq_len=32, rope_head_dim=4)
    plain = gen_rotary_embedding('dail', 100.0, DAIL, HF, max_seq_len=32, rope_head_dim=4)
    positions = torch.arange(32)[None]
    q = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 32, 1, 4)
    q = q.clone()
    scores, bare = (
        (apply_rotary(q, rope(positions, 32))[0, :, 0] @ apply_rotary(q, rope(positions, 32), is_key=True)[0, :, 0].T) for rope in (xpos, plain)
    )
    distance = (torch.arange(32)[:, None] - torch.arange(32)).float()
    base = (0 + 0.4 * 4) / (1.4 * 4)
    torch.testing.assert_close(scores, bare * base ** (distance / 8), rtol=1e-3, atol=1e-4)


def test_tables_stay_exact_after_a_cast() -> None:
    """No buffer holds frequencies, so casting the model to bf16 cannot round them."""
    rope = gen_rotary_embedding('hf', 10000.0, DAIL, HF, 2048, rope_head_dim=64)
    before = rope(torch.arange(2048)[None], 2048)
    after = rope.to(torch.bfloat16)(torch.arange(2048)[None], 2048)
    assert torch.equal(before.cos, after.cos) and after.sin.dtype == torch.float32
    assert not list(rope.buffers())


def test_errors() -> None:
    with pytest.raises(ValueError, match="attn_config.rope_impl must be dail or hf, got 'x'"):
        gen_rotary_embedding('x', 1.0, DAIL, HF, 8, rope_head_dim=4)
    with pytest.raises(ValueError, match='give either rope_head_dim, or both d_model and n_heads'):
        gen_rotary_embedding('hf', 1.0, DAIL, HF, 8, d_model=4)
    with pytest.raises(ValueError) as e:
        gen_rotary_embedding('hf', 1.0, DAIL, {'type': 'llama3', 'factor': 8.0}, 8, rope_head_dim=4)
    assert str(e.value) == 'attn_config.rope_hf_config: type llama3 also needs low_freq_factor, high_freq_factor, original_max_position_embeddings'


def test_partial_llama_config_holds_rotary_settings_only() -> None:
    config = PartialLlamaConfig(rope_theta=5.0, head_dim=8)
    assert (config.rope_theta, config.head_dim) == (5.0, 8)
    with pytest.raises(AttributeError, match='holds rotary settings only'):
        _ = config.num_key_value_heads


def test_temperature_tuning_is_that_of_llama4() -> None:
    query = torch.ones(1, 6, 2, 3)
    got = apply_temperature_tuning(query, floor_scale=2, attn_scale=0.5)[0, :, 0, 0]
    want = [1 + 0.5 * torch.log1p(torch.tensor(float((p + 1) // 2))).item() for p in range(6)]
    assert got.tolist() == pytest.approx(want)
    assert apply_temperature_tuning(query, 2, 0.0) is query
    assert apply_temperature_tuning(query, 2, 0.5, torch.tensor([[5] * 6]))[0, 0, 0, 0] == got[5]
