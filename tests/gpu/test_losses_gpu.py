"""The fused losses on a CUDA device: values, gradients and memory, chunked and by Liger."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmfoundry.models import losses

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]

TOKENS, D_MODEL, VOCAB = 4096, 512, 50368


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, D_MODEL, device='cuda', requires_grad=True)
    weight = (torch.randn(VOCAB, D_MODEL, device='cuda') * 0.05).requires_grad_()
    targets = torch.randint(0, VOCAB, (TOKENS,), device='cuda')
    targets[::5] = -100
    return hidden, weight, targets


@pytest.fixture(params=['chunked', 'liger'])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == 'chunked':
        monkeypatch.setattr(losses, '_liger_function', lambda: None)
    elif losses._liger_function() is None:
        pytest.skip('liger-kernel is not installed, or too old to count correct tokens')
    return request.param


@pytest.mark.parametrize('options', [{}, {'logit_scale': 0.3}, {'softcap': 5.0}])
@pytest.mark.parametrize('autocast', [False, True])
def test_equals_torch(implementation: str, options: dict[str, Any], autocast: bool) -> None:
    hidden, weight, targets = problem()
    with torch.autocast('cuda', torch.bfloat16, enabled=autocast):
        ours = losses.fused_linear_cross_entropy(hidden, weight, targets, **options)
        theirs = losses.torch_linear_cross_entropy(hidden, weight, targets, **options)
    tolerance = 2e-2 if autocast or implementation == 'liger' else 1e-5
    assert ours.num_targets.item() == theirs.num_targets.item()
    assert abs(ours.num_correct.item() - theirs.num_correct.item()) <= (TOKENS * 0.01 if tolerance > 1e-3 else 1)
    assert abs(ours.loss_sum.item() / theirs.loss_sum.item() - 1) < tolerance / 10
    wanted = torch.autograd.grad(theirs.mean(), (hidden, weight))
    for got, want in zip(torch.autograd.grad(ours.mean(), (hidden, weight)), wanted, strict=True):
        assert got.dtype == want.dtype and (got - want).norm() / want.norm() < tolerance


def test_memory_stays_below_the_logits(implementation: str) -> None:
    hidden, weight, targets = problem()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    options = {'chunk_bytes': 64 * 2**20}
    losses.fused_linear_cross_entropy(hidden, weight, targets, **options).mean().backward()
    gradients = 2 * 4 * (TOKENS * D_MODEL + VOCAB * D_MODEL)
    assert torch.cuda.max_memory_allocated() - before < gradients + 4 * TOKENS * VOCAB / 2
