"""Every route of ``attend`` equals a naive softmax over an explicit mask, in values and gradients."""

from __future__ import annotations

import itertools
import math
import types
from typing import Any

import pytest
import torch

from llmfoundry.models.layers import attention, attention_impls
from llmfoundry.models.layers import attention_kernels as kernels
from llmfoundry.models.layers.attention_kernels import AttentionMask, KernelOptions, attend
from llmfoundry.models.mpt.attention_inputs import gen_attention_mask_in_length, gen_flash_attn_padding_info

B, H, D = 2, 4, 8


def tensors(q_len: int, k_len: int, n_kv_heads: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, q_len, H, D), (B, k_len, n_kv_heads, D), (B, k_len, n_kv_heads, D)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, bias: torch.Tensor, softcap: float | None = None) -> torch.Tensor:
    """(b, s, h, d) tensors; ``visible`` and ``bias`` broadcast to (b, h, q, k). Returns (b, q, h * d)."""
    k, v = (x.repeat_interleave(H // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum('bqhd,bkhd->bhqk', q, k) / math.sqrt(D)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores + bias).masked_fill(~visible, float('-inf')).softmax(-1)
    return torch.einsum('bhqk,bkhd->bqhd', weights, v).flatten(2)


def explicit(q_len: int, k_len: int, window: int, alibi: bool) -> tuple[torch.Tensor, torch.Tensor]:
    distance = torch.arange(k_len - q_len, k_len)[:, None] - torch.arange(k_len)
    visible = (distance >= 0) & ((window < 0) | (distance <= window))
    slopes = attention.gen_slopes(H, return_1d=True) if alibi else torch.zeros(H)
    return visible[None, None], -slopes.view(1, H, 1, 1) * distance


def compare(got: torch.Tensor, want: torch.Tensor, inputs: list[torch.Tensor], weight: torch.Tensor | float = 1.0) -> None:
    torch.testing.assert_close(got * weight, want * weight, atol=2e-6, rtol=0)
    seed = torch.randn(got.shape, generator=torch.Generator().manual_seed(9)) * weight
    for a, b in zip(torch.autograd.grad(got, inputs, seed), torch.autograd.grad(want, inputs, seed), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def run(inputs: list[torch.Tensor], mask: AttentionMask, **options: Any) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in inputs)
    return attend(q, k, v, mask, KernelOptions(scale=1 / math.sqrt(D), **options))[0]


CASES = list(itertools.product([(1, 1), (7, 7), (37, 37), (1, 20), (5, 37)], [-1, 0, 3, 12, 100], [False, True], [None, 0.7], [1, 2, 4]))


@pytest.mark.parametrize('chunk', [8, 128])
def test_chunks_windows_alibi_softcap_cache_and_heads(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, 'CPU_CHUNK', chunk)
    for (q_len, k_len), window, alibi, softcap, n_kv_heads in CASES:
        inputs = tensors(q_len, k_len, n_kv_heads)
        visible, bias = explicit(q_len, k_len, window, alibi)
        mask = AttentionMask(alibi_slopes=attention.gen_slopes(H, return_1d=True) if alibi else None)
        got = run(inputs, mask, window=window, softcap=softcap)
        compare(got, naive(*inputs, visible, bias, softcap), inputs)
    assert len(CASES) == 300


@pytest.mark.parametrize('alibi', [False, True])
@pytest.mark.parametrize('window', [-1, 5])
@pytest.mark.parametrize('softcap', [None, 0.7])
def test_padding_inside_and_left(alibi: bool, window: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, 'CPU_CHUNK', 8)
    key_padding = torch.ones(B, 30, dtype=torch.bool)
    key_padding[0, :9], key_padding[1, 11:14] = False, False
    slopes = attention.gen_slopes(H, return_1d=True) if alibi else None
    for q_len in (30, 6, 1):
        inputs = tensors(q_len, 30, 2)
        visible, bias = explicit(q_len, 30, window, alibi)
        mask = AttentionMask(key_padding=key_padding, alibi_slopes=slopes)
        real = key_padding[:, -q_len:, None].float()
        eye = torch.arange(30 - q_len, 30)[:, None] == torch.arange(30)
        want = naive(*inputs, (visible & key_padding[:, None, None]) | eye, bias, softcap)
        got = run(inputs, mask, window=window, softcap=softcap)
        assert got.isfinite().all()
        compare(got, want, inputs, real)


@pytest.mark.parametrize('variant', [{}, {'window': 3}, {'softcap': 0.7}])
@pytest.mark.parametrize('alibi', [False, True])
def test_documents_equal_the_block_mask(variant: dict[str, Any], alibi: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, 'CPU_CHUNK', 8)
    lengths = [[17, 1, 9, 13], [2, 38]]
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    slopes = attention.gen_slopes(H, return_1d=True) if alibi else None
    inputs = tensors(40, 40, 2)
    visible, bias = explicit(40, 40, variant.get('window', -1), alibi)
    for doc_lengths in (sum(lengths, []), None):
        want = naive(*inputs, visible & (ids[:, None, :, None] == ids[:, None, None, :]), bias, variant.get('softcap'))
        compare(run(inputs, AttentionMask(sequence_id=ids, doc_lengths=doc_lengths, alibi_slopes=slopes), **variant), want, inputs)


def test_no_score_matrix_where_none_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain causal attention takes SDPA's ``is_causal``; alibi meets only as many keys as each chunk may see."""
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: Any, dropout: float, is_causal: bool, **kwargs: Any) -> torch.Tensor:
        seen.append((q.shape[2], k.shape[2], None if bias is None else tuple(bias.shape[-2:]), is_causal))
        return real(q, k, v, bias, dropout, is_causal, **kwargs)

    monkeypatch.setattr(kernels.F, 'scaled_dot_product_attention', spy)
    monkeypatch.setattr(kernels, 'CPU_CHUNK', 8)
    run(tensors(20, 20, 4), AttentionMask())
    run(tensors(20, 20, 4), AttentionMask(alibi_slopes=torch.ones(H)))
    run(tensors(20, 20, 4), AttentionMask(), window=2)
    assert seen == [
        (20, 20, None, True),
        *[(8, 8, (8, 8), False), (8, 16, (8, 16), False), (4, 20, (4, 20), False)],
        *[(8, 8, (8, 8), False), (8, 10, (8, 10), False), (4, 6, (4, 6), False)],
    ]


def test_dropout_zeroes_weights_and_keeps_their_mean() -> None:
    inputs = [x.detach() for x in tensors(16, 16, 4)]
    inputs[2] = torch.ones_like(inputs[2])
    torch.manual_seed(0)
    for options in ({}, {'softcap': 5.0}):
        out = run(inputs, AttentionMask(), dropout_p=0.5, **options)
        assert out.std() > 0.1
        assert out.mean().item() == pytest.approx(1.0, abs=0.15)


def test_weights_are_those_of_the_context() -> None:
    inputs = tensors(9, 9, 2)
    q, k, v = (x.transpose(1, 2) for x in inputs)
    context, weights = attend(q, k, v, AttentionMask(), KernelOptions(scale=0.3, needs_weights=True))
    assert weights.shape == (B, H, 9, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, 9))
    torch.testing.assert_close(context, (weights @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(context, attend(q, k, v, AttentionMask(), KernelOptions(scale=0.3))[0], atol=2e-6, rtol=0)


def test_public_torch_function_takes_an_explicit_bias_and_a_tuple_cache() -> None:
    inputs = tensors(12, 12, 4)
    q, k, v = (x.flatten(2) for x in inputs)
    visible, bias = explicit(12, 12, -1, True)
    want = naive(*inputs, visible, bias)
    row = attention.build_alibi_bias(H, 12)
    got, weights, past = attention.scaled_multihead_dot_product_attention(q, k, v, H, attn_bias=row, is_causal=True)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)
    assert weights is None and past is None
    _, _, past = attention.scaled_multihead_dot_product_attention(q[:, :5], k[:, :5], v[:, :5], H, past_key_value=(), is_causal=True)
    assert past[0].shape == (B, H, D, 5) and past[1].shape == (B, H, 5, D)
    got, _, past = attention.scaled_multihead_dot_product_attention(
        q[:, 5:], k[:, 5:], v[:, 5:], H, past_key_value=past, is_causal=True, attn_bias=row
    )
    torch.testing.assert_close(got, want[:, 5:], atol=2e-6, rtol=0)
    with pytest.raises(RuntimeError) as e:
        attention.scaled_multihead_dot_product_attention(q, k, v, H, attn_bias=row[..., :7])
    assert str(e.value) == 'attn_bias of shape (1, 4, 1, 7) does not broadcast to 12 queries and 12 keys'


def test_public_flash_function_refuses_what_flash_cannot_do() -> None:
    q, k, v = (x.flatten(2) for x in tensors(4, 4, 4))
    for kwargs, name in (({'attn_bias': torch.zeros(1, 1, 4, 4)}, 'attn_bias'), ({'needs_weights': True}, 'needs_weights (output_attentions)')):
        with pytest.raises(NotImplementedError) as e:
            attention.flash_attn_fn(q, k, v, H, **kwargs)
        assert str(e.value) == f'attn_impl flash does not support {name}; set attn_config.attn_impl: torch'


def fake_flash_attn() -> types.ModuleType:
    """flash-attn's two functions in plain torch, as its documentation describes them."""
    module = types.ModuleType('flash_attn')
    module.__version__ = '2.7.0'

    def one(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, causal: bool, window_size: Any = (-1, -1), alibi_slopes: Any = None
    ) -> torch.Tensor:
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        visible = (distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
        if window_size[0] >= 0:
            visible &= distance <= window_size[0]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum('qhd,khd->hqk', q, k) * softmax_scale
        if alibi_slopes is not None:
            scores = scores - alibi_slopes.view(-1, 1, 1) * distance.abs()
        return torch.einsum('hqk,khd->qhd', scores.masked_fill(~visible, float('-inf')).softmax(-1), v)

    def func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, **kwargs: Any) -> torch.Tensor:
        return torch.stack([one(*row, **kwargs) for row in zip(q, k, v, strict=True)])

    def varlen(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        **kwargs: Any,
    ) -> torch.Tensor:
        assert cu_seqlens_q.dtype == torch.int32 and max_seqlen_k >= max_seqlen_q
        qs, ks = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        return torch.cat([one(q[qs[i] : qs[i + 1]], k[ks[i] : ks[i + 1]], v[ks[i] : ks[i + 1]], **kwargs) for i in range(len(qs) - 1)])

    module.flash_attn_func, module.flash_attn_varlen_func = func, varlen
    return module


@pytest.mark.parametrize('case', ['plain', 'left_padding', 'cached', 'documents'])
@pytest.mark.parametrize('alibi', [False, True])
def test_flash_library_gets_what_it_documents(case: str, alibi: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls to flash-attn, checked against a stand-in of the library on the CPU, equal torch's at real tokens."""
    monkeypatch.setitem(__import__('sys').modules, 'flash_attn', fake_flash_attn())
    monkeypatch.setattr(attention_impls, '_can_use_flash', lambda *args: True)
    q_len = 3 if case == 'cached' else 14
    q, k, v = (x.flatten(2) for x in tensors(q_len, 14, 2))
    slopes = attention.gen_slopes(H, return_1d=True) if alibi else None
    real, ids = torch.ones(B, 14, dtype=torch.bool), None
    if case in ('left_padding', 'cached'):
        real[0, :5] = False
    if case == 'documents':
        ids = torch.tensor([[0] * 4 + [1] * 10, [0] * 9 + [1] * 3 + [-1] * 2])
        real[1, -2:] = False
    lengths = gen_attention_mask_in_length(ids, 14, True, 'flash', real)
    info = None if case == 'plain' else gen_flash_attn_padding_info(B, q_len, 14 - q_len, q.device, lengths, real)
    mask = AttentionMask(key_padding=None if case in ('plain', 'documents') else real, sequence_id=ids, alibi_slopes=slopes)
    kwargs = {'mask': mask, 'sliding_window_size': 6}
    got, _, _ = attention.flash_attn_fn(q, k, v, H, 2, flash_attn_padding_info=info, **kwargs)
    want, _, _ = attention.scaled_multihead_dot_product_attention(q, k, v, H, 2, **kwargs)
    where = real[:, -q_len:, None]
    torch.testing.assert_close(got * where, want * where, atol=2e-6, rtol=0)


def test_a_broken_flash_attn_is_told_apart_from_a_missing_one(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / 'flash_attn.py').write_text("raise ImportError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(attention_impls, '_said', set())
    attention_impls._flash_version.cache_clear()
    try:
        assert not attention_impls.is_flash_v2_installed()
    finally:
        attention_impls._flash_version.cache_clear()
    assert 'flash-attn is installed but cannot be imported (undefined symbol: _ZN3c10); it was probably built for another torch' in caplog.text


def test_fallback_says_so_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_impls, '_said', set())
    monkeypatch.setattr(attention_impls, '_flash_version', lambda: None)
    q, k, v = (x.flatten(2) for x in tensors(4, 4, 4))
    for _ in range(3):
        attention.flash_attn_fn(q, k, v, H)
    assert [r.message for r in caplog.records] == [
        "attn_impl flash: flash-attn is not installed, torch's scaled_dot_product_attention computes the same."
    ]


def test_bf16_autocast_keeps_the_bias_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast the bias stays fp32: in bf16, slope * 1000 would be off by up to 2."""
    inputs = [x.detach() for x in tensors(40, 40, 4)]
    mask = AttentionMask(alibi_slopes=torch.tensor([0.9, 0.7, 0.3, 0.01]))
    real, seen = torch.nn.functional.scaled_dot_product_attention, []

    def spy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((q.dtype, bias.dtype, torch.is_autocast_enabled('cpu')))
        return real(q, k, v, bias, *args, **kwargs)

    monkeypatch.setattr(kernels.F, 'scaled_dot_product_attention', spy)
    with torch.autocast('cpu', torch.bfloat16):
        got = run(inputs, mask)
    assert got.dtype == torch.bfloat16 and seen == [(torch.bfloat16, torch.float32, False)]
    visible, _ = explicit(40, 40, -1, False)
    distance = torch.arange(40)[:, None] - torch.arange(40)
    want = naive(*(x.bfloat16().float() for x in inputs), visible, -mask.alibi_slopes.view(1, H, 1, 1) * distance)
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=0)


def test_bias_shapes_and_helpers() -> None:
    assert attention.attn_bias_shape('flash', 4, 8, True, True, False) is None
    assert attention.attn_bias_shape('torch', 4, 8, True, True, False) == (1, 4, 1, 8)
    assert attention.attn_bias_shape('torch', 4, 8, True, True, True) == (1, 4, 8, 8)
    assert attention.attn_bias_shape('torch', 4, 8, False, True, True) == (1, 1, 8, 8)
    assert attention.attn_bias_shape('torch', 4, 8, False, True, False) is None
    bias = attention.build_attn_bias('torch', torch.zeros(1, 4, 1, 8), 4, 8, causal=True, alibi=True)
    assert torch.equal(bias, attention.build_alibi_bias(4, 8))
    assert attention.build_attn_bias('flash', torch.zeros(1), 4, 8) is None
    full = attention.build_alibi_bias(4, 3, full=True)
    assert full[0, 0].tolist() == [[0.0, -0.25, -0.5], [-0.25, 0.0, -0.25], [-0.5, -0.25, 0.0]]
    assert attention.check_alibi_support('flash') and attention.check_alibi_support('torch')
    assert attention.gen_slopes(6, return_1d=True).tolist() == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    with pytest.raises(ValueError, match='v2_version must be at least 2.0.0, got 1.0'):
        attention.is_flash_v2_installed('1.0')
