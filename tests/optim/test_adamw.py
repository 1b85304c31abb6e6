"""DecoupledAdamW against Composer's, against torch's with its decay transformed, and against the formula."""

from __future__ import annotations

import io
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfoundry import registry
from llmfoundry.optim.adamw import DecoupledAdamW

SHAPES = [(5, 7), (3,), (), (2, 3, 4)]


def _params(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def _set_grads(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)


def _train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], n_steps: int = 12, first: int = 0) -> None:
    """Steps with a learning rate that warms up from 0 and falls again."""
    for step in range(first, first + n_steps):
        _set_grads(params, step)
        for group in optimizer.param_groups:
            group['lr'] = group['initial_lr'] * min(step / 4, 1.0) * (1 - step / 50)
        optimizer.step()


@settings(max_examples=25, deadline=None)
@given(
    lr=st.floats(1e-5, 1.0),
    weight_decay=st.sampled_from([0.0, 1e-5, 3e-4, 0.1]),
    beta1=st.floats(0.0, 0.99),
    beta2=st.floats(0.5, 0.999),
    eps=st.sampled_from([1e-8, 1e-6, 1e-3]),
    amsgrad=st.booleans(),
)
def test_equals_composers_step_by_step(lr: float, weight_decay: float, beta1: float, beta2: float, eps: float, amsgrad: bool) -> None:
    from composer.optim import DecoupledAdamW as Composers

    kwargs = {'lr': lr, 'weight_decay': weight_decay, 'betas': (beta1, beta2), 'eps': eps, 'amsgrad': amsgrad}
    ours, theirs = _params(), _params()
    our_optimizer, their_optimizer = DecoupledAdamW(ours, **kwargs), Composers(theirs, **kwargs)
    for step in range(8):
        _train(our_optimizer, ours, 1, step)
        _train(their_optimizer, theirs, 1, step)
        for param, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(param, expected, rtol=1e-9, atol=1e-11)
    assert our_optimizer.state_dict()['param_groups'][0].keys() == their_optimizer.state_dict()['param_groups'][0].keys()
    assert our_optimizer.state[ours[0]].keys() == their_optimizer.state[theirs[0]].keys()


def test_equals_torchs_adamw_with_the_decay_over_the_learning_rate() -> None:
    ours, theirs = _params(), _params()
    optimizer = DecoupledAdamW(ours, lr=0.02, weight_decay=1e-4, betas=(0.8, 0.9))
    expected = torch.optim.AdamW(theirs, lr=0.02, weight_decay=1e-4 / 0.02, betas=(0.8, 0.9), foreach=False, fused=False)
    for group in expected.param_groups:
        group['initial_lr'] = group['lr']
    _train(optimizer, ours)
    _train(expected, theirs)
    for param, expected_param in zip(ours, theirs, strict=True):
        torch.testing.assert_close(param, expected_param, rtol=1e-10, atol=1e-12)


def test_first_step_by_hand() -> None:
    """m_hat = g and v_hat = g^2, so the step is lr * g / (|g| + eps)."""
    weight = torch.nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
    weight.grad = torch.tensor([0.3, -4.0, 0.0])
    DecoupledAdamW([weight], lr=0.1, weight_decay=0.05, eps=1e-8).step()
    expected = [0.95 * 2.0 - 0.1, 0.95 * -1.0 + 0.1, 0.95 * 0.5]
    assert weight.tolist() == pytest.approx(expected, abs=1e-6)


def test_decay_follows_the_schedule_and_not_the_size_of_the_learning_rate() -> None:
    for lr in (1e-4, 1e-1):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = DecoupledAdamW([weight], lr=lr, weight_decay=0.01)
        weight.grad = torch.zeros(3)
        optimizer.param_groups[0]['lr'] = lr / 4
        optimizer.step()
        assert weight.tolist() == pytest.approx([1 - 0.01 / 4] * 3)


def test_zero_learning_rate_changes_nothing() -> None:
    params = _params()
    before = [param.detach().clone() for param in params]
    optimizer = DecoupledAdamW(params, lr=0.1, weight_decay=0.5)
    optimizer.param_groups[0]['lr'] = 0.0
    _set_grads(params, 0)
    optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


def test_initial_learning_rate_zero_decays_fully() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    DecoupledAdamW([weight], lr=0.0, weight_decay=0.25).step()
    assert weight.tolist() == [0.75, 0.75]


def test_parameters_without_gradient_or_frozen_are_left_alone() -> None:
    params = _params()
    _set_grads(params, 0)
    params[0].grad = None
    params[1].requires_grad_(False)
    before = [param.detach().clone() for param in params]
    optimizer = DecoupledAdamW(params, lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert [torch.equal(param, old) for param, old in zip(params, before, strict=True)] == [True, True, False, False]
    assert params[0] not in optimizer.state and params[1] not in optimizer.state


def test_groups_have_their_own_settings() -> None:
    params, expected = _params(), _params()
    optimizer = DecoupledAdamW([{'params': params[:2]}, {'params': params[2:], 'lr': 0.5, 'weight_decay': 0.0}], lr=0.01, weight_decay=1e-4)
    first, second = DecoupledAdamW(expected[:2], lr=0.01, weight_decay=1e-4), DecoupledAdamW(expected[2:], lr=0.5, weight_decay=0.0)
    for step in range(3):
        _set_grads(params, step)
        _set_grads(expected, step)
        for each in (optimizer, first, second):
            each.step()
    for param, expected_param in zip(params, expected, strict=True):
        assert torch.equal(param, expected_param)


def test_low_precision_gradients_of_full_precision_weights() -> None:
    """As FSDP leaves them with keep_low_precision_grads; torch refuses to assign such a gradient to a leaf, so it is put in through ``.data``."""
    mixed, same = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    gradient = torch.tensor([1.0, -2.0, 0.5, 3.0])
    for weight in (mixed, same):
        weight.grad = gradient.clone()
    mixed.grad.data = gradient.bfloat16()
    assert mixed.grad.dtype == torch.bfloat16
    for weight in (mixed, same):
        DecoupledAdamW([weight], lr=0.1).step()
    assert torch.equal(mixed, same)


def test_resumes_bit_identically() -> None:
    whole, half = _params(torch.float32), _params(torch.float32)
    _train(DecoupledAdamW(whole, lr=0.1, weight_decay=1e-4), whole, 10)
    first = DecoupledAdamW(half, lr=0.1, weight_decay=1e-4)
    _train(first, half, 5)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = DecoupledAdamW(half, lr=0.7, weight_decay=0.5)
    second.load_state_dict(torch.load(buffer))
    _train(second, half, 5, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole, half, strict=True))


def test_sparse_gradients_are_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.sparse_coo_tensor([[0]], [[1.0, 1.0]], (3, 2))
    with pytest.raises(RuntimeError, match='DecoupledAdamW does not support sparse gradients'):
        DecoupledAdamW([weight]).step()


def test_closure_and_defaults() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = registry.optimizers.get('decoupled_adamw')([weight])
    group = optimizer.param_groups[0]
    assert (group['lr'], group['betas'], group['eps'], group['weight_decay'], group['amsgrad'], group['initial_lr']) == (1e-3, (0.9, 0.95), 1e-8, 1e-5, False, 1e-3)

    def closure() -> torch.Tensor:
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0 and weight.item() < 1.0


def test_high_weight_decay_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        DecoupledAdamW(_params(), weight_decay=9.9e-4)
        assert not caplog.records
        DecoupledAdamW(_params(), weight_decay=1e-3)
    assert caplog.messages == [
        'You are using a high value of `weight_decay=0.001` for the `DecoupledAdamW` optimizer. Are you sure you want to do this? '
        "Your model's weights will be multiplied by 0.999 on every step!",
    ]


def test_one_step_reads_each_tensor_once() -> None:
    """The fused kernel is what runs: no separate multiplication, no temporaries."""
    weight = torch.nn.Parameter(torch.randn(1000))
    weight.grad = torch.randn(1000)
    optimizer = DecoupledAdamW([weight])
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    names = {event.name for event in profile.events()}
    assert 'aten::_fused_adamw_' in names and 'aten::sqrt' not in names
    assert math.isfinite(weight.sum().item())
