"""MPT trains on a CUDA device in bf16: every attention route and both losses give the same loss, and a few steps lower it."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from llmfoundry.models.losses import fused_linear_cross_entropy, torch_linear_cross_entropy
from llmfoundry.models.mpt.configuration_mpt import MPTConfig
from llmfoundry.models.mpt.modeling_mpt import MPTForCausalLM

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]

HAS_FLASH = importlib.util.find_spec('flash_attn') is not None


def build(attn_impl: str) -> MPTForCausalLM:
    torch.manual_seed(0)
    config = MPTConfig(d_model=128, n_heads=2, n_layers=2, vocab_size=512, max_seq_len=128, attn_config={'attn_impl': attn_impl, 'alibi': True})
    return MPTForCausalLM(config).cuda()


@pytest.mark.parametrize('attn_impl', ['torch', pytest.param('flash', marks=pytest.mark.skipif(not HAS_FLASH, reason='flash-attn is not installed'))])
@pytest.mark.parametrize('loss_fn', [fused_linear_cross_entropy, torch_linear_cross_entropy])
def test_loss_is_that_of_float32_on_the_cpu(attn_impl: str, loss_fn: object) -> None:
    model = build(attn_impl)
    ids = torch.randint(0, 512, (2, 128), generator=torch.Generator().manual_seed(0))
    with torch.autocast('cuda', torch.bfloat16):
        loss = model(input_ids=ids.cuda(), labels=ids.cuda(), loss_fn=loss_fn).loss.mean()
    exact = build('torch').cpu()(input_ids=ids, labels=ids, loss_fn=fused_linear_cross_entropy).loss.mean()
    assert abs(loss.item() - exact.item()) < 2e-2


@pytest.mark.parametrize('compiled', [False, True])
def test_learns(compiled: bool) -> None:
    model = build('torch')
    if compiled:
        for block in model.transformer.blocks:
            block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(0, 512, (2, 128), generator=torch.Generator().manual_seed(0)).cuda()
    values = []
    for _ in range(20):
        with torch.autocast('cuda', torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, loss_fn=fused_linear_cross_entropy).loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert values[-1] < 0.7 * values[0]
