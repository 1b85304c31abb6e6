"""The fused loss equals F.cross_entropy in value and gradients, and never holds all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmfoundry.models.losses import (
    LOSS_FUNCTIONS,
    fused_linear_cross_entropy,
    get_loss_fn,
    head_logits,
    loss_from_logits,
    shift_labels,
    torch_linear_cross_entropy,
)

IGNORE = -100


def problem(tokens: int, d_model: int, vocab: int, ignored: float, seed: int, dtype: torch.dtype = torch.float64, bias: bool = False) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORE
    return {
        'hidden': torch.randn(tokens, d_model, generator=generator, dtype=dtype).requires_grad_(),
        'weight': torch.randn(vocab, d_model, generator=generator, dtype=dtype).requires_grad_(),
        'targets': targets,
        'bias': torch.randn(vocab, generator=generator, dtype=dtype).requires_grad_() if bias else None,
    }


def inputs_of(p: dict[str, Any]) -> list[torch.Tensor]:
    return [p[key] for key in ('hidden', 'weight', 'bias') if p[key] is not None]


def reference(p: dict[str, Any], logit_scale: float | None = None, softcap: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(summed loss, logits) by the formula, apart from our code."""
    logits = p['hidden'] @ p['weight'].t()
    if p['bias'] is not None:
        logits = logits + p['bias']
    if logit_scale is not None:
        logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, p['targets'], ignore_index=IGNORE, reduction='sum'), logits


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40), d_model=st.integers(1, 9), vocab=st.integers(2, 70), ignored=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    logit_scale=st.sampled_from([None, 0.0, 0.37, 2.5]), softcap=st.sampled_from([None, 1.5, 30.0]), bias=st.booleans(),
    chunk_rows=st.integers(1, 50), seed=st.integers(0, 1000), name=st.sampled_from(sorted(LOSS_FUNCTIONS)),
)
def test_equals_cross_entropy(tokens: int, d_model: int, vocab: int, ignored: float, logit_scale: Any, softcap: Any, bias: bool, chunk_rows: int, seed: int, name: str) -> None:
    p = problem(tokens, d_model, vocab, ignored, seed, bias=bias)
    options = {'chunk_bytes': 4 * vocab * chunk_rows} if name == 'fused_crossentropy' else {}
    out = get_loss_fn(name)(**p, logit_scale=logit_scale, softcap=softcap, **options)
    expected, logits = reference(p, logit_scale, softcap)
    has_target = p['targets'] != IGNORE
    assert out.loss_sum.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(out.loss_sum.double(), expected, rtol=1e-6, atol=1e-6)
    assert out.num_targets.item() == has_target.sum().item()
    assert out.num_correct.item() == (logits.argmax(-1)[has_target] == p['targets'][has_target]).sum().item()
    got = torch.autograd.grad(out.loss_sum * 0.5, inputs_of(p))
    want = torch.autograd.grad(expected * 0.5, inputs_of(p))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('chunk_rows', [7, 64, 1000])
def test_float32_is_as_exact_as_torch(chunk_rows: int) -> None:
    """Against float64: neither loss nor gradients may be off by more than 1e-6 of their size."""
    p64 = problem(300, 32, 5003, 0.2, seed=1)
    p32 = {key: value.detach().float().requires_grad_() if key in ('hidden', 'weight') else value for key, value in p64.items()}
    expected, _ = reference(p64, logit_scale=0.2)
    out = fused_linear_cross_entropy(**p32, logit_scale=0.2, chunk_bytes=4 * 5003 * chunk_rows)
    assert out.loss_sum.dtype == torch.float32
    assert abs(out.loss_sum.item() / expected.item() - 1) < 1e-6
    for a, b in zip(torch.autograd.grad(out.mean(), inputs_of(p32)), torch.autograd.grad(expected / out.num_targets, inputs_of(p64)), strict=True):
        assert (a - b).norm() / b.norm() < 1e-6


@pytest.mark.parametrize('name', sorted(LOSS_FUNCTIONS))
def test_all_ignored_gives_zero_with_zero_gradients(name: str) -> None:
    p = problem(6, 4, 11, 1.0, seed=0, dtype=torch.float32, bias=True)
    out = get_loss_fn(name)(**p)
    assert out.mean().item() == 0.0 and out.num_targets.item() == 0 and out.num_correct.item() == 0
    for grad in torch.autograd.grad(out.mean(), inputs_of(p)):
        assert torch.equal(grad, torch.zeros_like(grad))


class LargestTensor(TorchDispatchMode):
    """Records the largest result, in elements, of any operator below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))])
        return result


def test_logits_are_never_whole() -> None:
    tokens, d_model, vocab, chunk_rows = 256, 8, 503, 16
    p = problem(tokens, d_model, vocab, 0.1, seed=0, dtype=torch.float32)
    with LargestTensor() as fused:
        fused_linear_cross_entropy(**p, chunk_bytes=4 * vocab * chunk_rows).mean().backward()
    assert fused.numel <= max(chunk_rows * vocab, vocab * d_model)
    with LargestTensor() as plain:
        torch_linear_cross_entropy(**p).mean().backward()
    assert plain.numel >= tokens * vocab  # the yardstick does hold them, so the mode sees what it should


def test_tokens_without_target_are_not_computed() -> None:
    """Rows that may hold anything, NaN too, when they have no target: padding costs and spoils nothing."""
    p = problem(50, 8, 31, 0.5, seed=3, dtype=torch.float32)
    ignored = p['targets'] == IGNORE
    spoilt = p['hidden'].detach().clone()
    spoilt[ignored] = float('nan')
    spoilt.requires_grad_()
    out = fused_linear_cross_entropy(spoilt, p['weight'], p['targets'])
    grad_hidden, grad_weight = torch.autograd.grad(out.mean(), (spoilt, p['weight']))
    assert torch.isfinite(out.loss_sum) and torch.isfinite(grad_weight).all()
    assert torch.equal(grad_hidden[ignored], torch.zeros_like(grad_hidden[ignored]))


def test_shapes_with_batch_and_sequence() -> None:
    p = problem(24, 4, 13, 0.2, seed=2)
    batched = fused_linear_cross_entropy(p['hidden'].view(2, 12, 4), p['weight'], p['targets'].view(2, 12))
    flat = fused_linear_cross_entropy(**p)
    assert torch.equal(batched.loss_sum, flat.loss_sum)


def test_bf16_autocast_keeps_loss_and_accumulation_in_float32() -> None:
    p = problem(128, 32, 211, 0.1, seed=4, dtype=torch.float32)
    expected, _ = reference(p)
    with torch.autocast('cpu', torch.bfloat16):
        out = fused_linear_cross_entropy(**p, chunk_bytes=4 * 211 * 16)
        theirs = torch_linear_cross_entropy(**p)
    assert out.loss_sum.dtype == torch.float32
    assert abs(out.loss_sum.item() / expected.item() - 1) < 1e-2
    assert abs(out.loss_sum.item() / theirs.loss_sum.item() - 1) < 1e-5
    exact = torch.autograd.grad(expected, inputs_of(p))
    for ours, torchs, truth in zip(torch.autograd.grad(out.loss_sum, inputs_of(p)), torch.autograd.grad(theirs.loss_sum, inputs_of(p)), exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - truth).norm() <= 1.1 * (torchs - truth).norm()


def test_tied_weight_gets_both_gradients() -> None:
    torch.manual_seed(0)
    embedding = torch.randn(31, 8, requires_grad=True)
    ids, targets = torch.randint(0, 31, (20,)), torch.randint(0, 31, (20,))
    got = torch.autograd.grad(fused_linear_cross_entropy(torch.tanh(F.embedding(ids, embedding)), embedding, targets).mean(), embedding)[0]
    want = torch.autograd.grad(F.cross_entropy(torch.tanh(F.embedding(ids, embedding)) @ embedding.t(), targets), embedding)[0]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('frozen', ['hidden', 'weight'])
def test_frozen_inputs_get_no_gradient(frozen: str) -> None:
    p = problem(9, 4, 11, 0.0, seed=0)
    p[frozen] = p[frozen].detach()
    fused_linear_cross_entropy(**p).mean().backward()
    other = 'weight' if frozen == 'hidden' else 'hidden'
    assert p[frozen].grad is None and p[other].grad.abs().sum() > 0


def test_without_gradients_the_loss_is_the_same() -> None:
    p = problem(40, 8, 23, 0.2, seed=5)
    with torch.no_grad():
        silent = fused_linear_cross_entropy(**p)
    assert not silent.loss_sum.requires_grad
    assert torch.equal(silent.loss_sum, fused_linear_cross_entropy(**p).loss_sum.detach())


def test_backward_twice_says_what_to_do() -> None:
    p = problem(5, 4, 7, 0.0, seed=0)
    loss = fused_linear_cross_entropy(**p).mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='cannot go backward twice .* torch_crossentropy'):
        loss.backward()


def test_backward_through_torch_compile() -> None:
    p = problem(12, 4, 17, 0.2, seed=6, dtype=torch.float32)
    expected, _ = reference(p)
    compiled = torch.compile(lambda h, w, t: fused_linear_cross_entropy(torch.tanh(h), w, t).loss_sum, backend='aot_eager')
    got = torch.autograd.grad(compiled(p['hidden'], p['weight'], p['targets']), p['weight'])[0]
    p['hidden'] = torch.tanh(p['hidden'])
    expected, _ = reference(p)
    torch.testing.assert_close(got, torch.autograd.grad(expected, p['weight'])[0], rtol=1e-5, atol=1e-5)


def test_shift_and_loss_from_logits() -> None:
    labels = torch.tensor([[5, 6, IGNORE, 7]])
    assert shift_labels(labels).tolist() == [[6, IGNORE, 7, IGNORE]]
    p = problem(9, 4, 11, 0.3, seed=0)
    logits = head_logits(p['hidden'], p['weight'])
    assert torch.equal(loss_from_logits(logits, p['targets']).loss_sum, torch_linear_cross_entropy(**p).loss_sum)


@pytest.mark.parametrize(('change', 'message'), [
    ({'targets': torch.zeros(4, dtype=torch.long)}, r'hidden \(5, 4\), weight \(7, 4\) and targets \(4,\) do not fit'),
    ({'softcap': 0.0}, 'softcap=0.0 must be positive'),
    ({'chunk_bytes': 0}, 'chunk_bytes=0 must be positive'),
])
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fused_linear_cross_entropy(**{**problem(5, 4, 7, 0.0, seed=0), **change})


def test_unknown_loss_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="loss_fn='focal' is not known; choose one of: fused_crossentropy, torch_crossentropy"):
        get_loss_fn('focal')
