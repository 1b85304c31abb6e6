"""Packed documents in transformers models on a CUDA device, with real kernels: SDPA's block mask, eager and flash attention."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from llmfoundry.data.checks.packing_self_test import packing_self_test
from tests.helpers.packed_documents import VOCAB, gradients, packed_batch, separate_sums, tiny_model, total_of, worst_gradient

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]

FLASH = pytest.param('flash_attention_2', marks=pytest.mark.skipif(importlib.util.find_spec('flash_attn') is None, reason='flash-attn is not installed'))
ARCHITECTURES = ['llama', 'qwen3', 'gpt_neox', 'mistral', 'gemma3', 'gpt2']


def build(folder: Path, architecture: str, attn_implementation: str) -> Any:
    # flash-attn takes head dimensions that are multiples of 8.
    return tiny_model(folder, architecture, attn_implementation).cuda()


def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.cuda() for key, value in batch.items()}


@pytest.mark.parametrize('attn_implementation', ['sdpa', 'eager'])
@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_fp32_loss_and_gradients(architecture: str, attn_implementation: str, tmp_path: Path) -> None:
    model, batch = build(tmp_path, architecture, attn_implementation), on_gpu(packed_batch())
    packed, alone = total_of(model, batch), sum(separate_sums(model, batch))
    assert packed.item() == pytest.approx(alone.item(), rel=1e-4)
    assert worst_gradient(gradients(model, packed), gradients(model, alone)) < 1e-2
    assert model._packing_routes['cuda'].kind == 'block_mask'


@pytest.mark.parametrize('attn_implementation', ['sdpa', 'eager', FLASH])
@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_bf16(architecture: str, attn_implementation: str, tmp_path: Path) -> None:
    model, batch = build(tmp_path, architecture, attn_implementation), on_gpu(packed_batch())
    with torch.autocast('cuda', torch.bfloat16):
        packed, alone = total_of(model, batch), sum(separate_sums(model, batch))
        assert packed.item() == pytest.approx(alone.item(), rel=2e-2)
        report = packing_self_test(model, VOCAB, 512, 'cuda')
    assert attn_implementation in report.backend and report.leak < 5e-3
