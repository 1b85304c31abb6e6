"""Flash attention's route for packed documents, with an exact stand-in for its kernels, which need a GPU: what transformers hands them, and what comes out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import modeling_flash_attention_utils as flash_utils

from llmfoundry.data.checks.packing_self_test import packing_self_test
from llmfoundry.errors import PackingNotSupportedError, PackingSelfTestError
from llmfoundry.models.hf import packing
from tests.helpers.packed_documents import gradients, packed_batch, packed_sums, separate_sums, tiny_model, total_of, worst_gradient

CALLS: list[dict[str, Any]] = []


def _segment(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool, window: tuple[int, int], softcap: float) -> torch.Tensor:
    """One document: q (length, heads, d), k and v (length, key/value heads, d)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum('qhd,khd->hqk', q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    behind = torch.arange(q.shape[0])[:, None] - torch.arange(k.shape[0])[None]
    sees = (behind >= 0) if causal else torch.ones_like(behind, dtype=torch.bool)
    if window[0] >= 0:
        sees &= behind <= window[0]
    return torch.einsum('hqk,khd->qhd', scores.masked_fill(~sees, -math.inf).softmax(dim=-1), v)


def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,
) -> torch.Tensor:
    assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == q.shape[0] and isinstance(max_seqlen_q, int) and max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    CALLS.append({'ends': cu_seqlens_q.tolist(), 'window': window_size, 'softcap': softcap})
    ends = cu_seqlens_q.tolist()
    return torch.cat([_segment(q[a:b], k[a:b], v[a:b], softmax_scale, causal, window_size, softcap) for a, b in zip(ends, ends[1:], strict=False)])


def flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0, deterministic: bool = False,
) -> torch.Tensor:
    return torch.stack([_segment(*row, softmax_scale, causal, window_size, softcap) for row in zip(q, k, v, strict=True)])


@pytest.fixture(autouse=True)
def _stand_in_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    process = flash_utils._lazy_define_process_function(flash_attn_varlen_func)
    pads = flash_utils._pad_input, flash_utils._unpad_input
    functions: tuple[Any, Any]
    if hasattr(flash_utils, '_loaded_implementation'):  # transformers 5
        functions = (flash_attn_func, flash_attn_varlen_func, None, *pads), (process, dict)
    else:
        functions = (flash_attn_func, flash_attn_varlen_func, *pads), process
    monkeypatch.setattr(flash_utils, 'lazy_import_flash_attention', lambda *args, **kwargs: functions)


def build(folder: Path, architecture: str) -> Any:
    changes = {'gemma2': {'sliding_window': 3, 'attn_logit_softcapping': 2.0, 'layer_types': ['sliding_attention', 'full_attention']}}
    model = tiny_model(folder, architecture, 'eager', changes.get(architecture))
    config = model.model.config
    config._attn_implementation = 'flash_attention_2'  # from_config would ask for the package
    # transformers asks a Linear layer for the dtype of fp32 models, and GPT-2 has none; of quantised models it asks the config.
    config._pre_quantization_dtype, config._is_quantized, config.dtype = torch.float32, True, torch.float32
    return model


@pytest.mark.parametrize('architecture', ['llama', 'qwen2', 'qwen3', 'gpt_neox', 'mistral', 'gemma', 'gemma2', 'gemma3', 'gpt2', 'opt'])
def test_loss_and_gradients_are_those_of_separate_documents(architecture: str, tmp_path: Path) -> None:
    model, batch = build(tmp_path, architecture), packed_batch()
    alone = separate_sums(model, batch)
    assert not CALLS
    for got, want in zip(packed_sums(model, batch), alone, strict=True):
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
    packed = total_of(model, batch)
    assert worst_gradient(gradients(model, packed), gradients(model, sum(alone))) < 1e-4
    assert model._packing_routes['cpu'].kind == 'varlen'
    # Documents and padding of all rows, one row after the other.
    assert all(call['ends'] == [0, 7, 12, 13, 16, 20, 24, 33, 40, 60] for call in CALLS)
    assert {call['window'] for call in CALLS} == {'mistral': {(2, 2)}, 'gemma2': {(2, 2), (-1, -1)}, 'gemma3': {(2, 2), (-1, -1)}}.get(architecture, {(-1, -1)})
    assert {call['softcap'] for call in CALLS} == ({2.0} if architecture == 'gemma2' else {0.0})


def test_packing_self_test_names_flash_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packing_self_test(build(tmp_path, 'llama'), 67, 128, 'cpu').backend == 'LlamaForCausalLM (attention flash_attention_2)'
    monkeypatch.setattr(packing, 'run_lengths', lambda ids: torch.full((ids.shape[0],), ids.shape[1]))
    with pytest.raises(PackingSelfTestError, match=r'LlamaForCausalLM \(attention flash_attention_2\): a document changes'):
        packing_self_test(build(tmp_path, 'llama'), 67, 128, 'cpu')


def test_a_model_that_cannot_hand_the_lengths_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tmp_path, 'llama')
    decoder = type(model.model.base_model)

    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, inputs_embeds: Any = None, use_cache: Any = None) -> Any:
        raise AssertionError('not reached')

    monkeypatch.setattr(decoder, 'forward', forward)
    with pytest.raises(PackingNotSupportedError, match='LlamaModel.forward takes no cu_seq_lens.*set attn_implementation: sdpa'):
        model(packed_batch())


def test_a_model_that_accepts_the_lengths_and_drops_them(tmp_path: Path) -> None:
    import transformers
    from transformers.models.dbrx import modeling_dbrx

    if hasattr(modeling_dbrx, 'ALL_ATTENTION_FUNCTIONS'):
        pytest.skip('this release of transformers hands the lengths on')
    config = transformers.DbrxConfig(
        d_model=16, n_heads=2, n_layers=1, vocab_size=67, attn_config={'kv_n_heads': 1, 'rope_theta': 1e4}, ffn_config={'ffn_hidden_size': 8, 'moe_num_experts': 2, 'moe_top_k': 1},
    )  # fmt: skip
    model = transformers.DbrxForCausalLM(config)
    model.config._attn_implementation = 'flash_attention_2'
    assert packing.choose_route(model, 'cuda') == ('refused', 'DbrxModel.forward takes no cu_seq_lens, so flash attention cannot be told where documents end; set attn_implementation: sdpa')
    model.config._attn_implementation = 'sdpa'
    assert packing.choose_route(model, 'cuda').kind == 'block_mask'
