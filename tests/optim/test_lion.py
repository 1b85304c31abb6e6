"""Lion against the formula of its paper, and the limits of its arguments."""

from __future__ import annotations

import io
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfoundry import registry
from llmfoundry.optim.lion import DecoupledLionW
from llmfoundry.optim.no_op import NoOp


def _paper(w: list[float], grads: list[list[float]], lrs: list[float], initial_lr: float, betas: tuple[float, float], weight_decay: float) -> list[float]:
    """Algorithm 2 of https://arxiv.org/abs/2302.06675 over Python floats, with the decay decoupled from the learning rate."""
    w, m = list(w), [0.0] * len(w)
    for grad, lr in zip(grads, lrs, strict=True):
        for i, g in enumerate(grad):
            c = betas[0] * m[i] + (1 - betas[0]) * g
            sign = (c > 0) - (c < 0)
            w[i] = w[i] - weight_decay * (lr / initial_lr) * w[i] - lr * sign
            m[i] = betas[1] * m[i] + (1 - betas[1]) * g
    return w


@settings(max_examples=40, deadline=None)
@given(
    lr=st.floats(1e-5, 1.0),
    betas=st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)),
    weight_decay=st.sampled_from([0.0, 1e-4, 0.1]),
    seed=st.integers(0, 10**6),
)
def test_equals_the_paper(lr: float, betas: tuple[float, float], weight_decay: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(6, generator=generator, dtype=torch.float64)
    grads = torch.randn(7, 6, generator=generator, dtype=torch.float64)
    lrs = [lr * factor for factor in (0.0, 0.5, 1.0, 1.0, 0.7, 0.3, 0.1)]
    weight = torch.nn.Parameter(start.clone())
    optimizer = DecoupledLionW([weight], lr=lr, betas=betas, weight_decay=weight_decay)
    for grad, step_lr in zip(grads, lrs, strict=True):
        optimizer.param_groups[0]['lr'] = step_lr
        weight.grad = grad.clone()
        optimizer.step()
        assert torch.equal(weight.grad, grad)  # monitors read it after the step
    expected = _paper(start.tolist(), grads.tolist(), lrs, lr, betas, weight_decay)
    assert weight.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_one_step_by_hand() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    weight.grad = torch.tensor([5.0, -0.001, 0.0])
    optimizer = DecoupledLionW([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    optimizer.step()
    assert weight.tolist() == pytest.approx([0.5 - 0.1, -1.0 + 0.1, 1.5])
    assert optimizer.state[weight]['exp_avg'].tolist() == pytest.approx([0.05, -0.00001, 0.0])


def test_resumes_bit_identically() -> None:
    def run(weight: torch.nn.Parameter, optimizer: DecoupledLionW, steps: range) -> None:
        for step in steps:
            weight.grad = torch.randn(4, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    whole, half = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(4))
    run(whole, DecoupledLionW([whole], lr=0.1, weight_decay=1e-4), range(6))
    first = DecoupledLionW([half], lr=0.1, weight_decay=1e-4)
    run(half, first, range(3))
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = DecoupledLionW([half], lr=1.0)
    second.load_state_dict(torch.load(buffer))
    run(half, second, range(3, 6))
    assert torch.equal(whole, half)


def test_frozen_and_untouched_parameters() -> None:
    frozen, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    frozen.grad = torch.ones(2)
    frozen.requires_grad_(False)
    optimizer = DecoupledLionW([frozen, unused], lr=0.1, weight_decay=0.1)
    optimizer.step()
    assert frozen.tolist() == unused.tolist() == [1.0, 1.0] and not optimizer.state


@pytest.mark.parametrize(
    ('kwargs', 'text'),
    [
        ({'lr': 0.0}, 'Invalid LR: 0.0. LR must be > 0'),
        ({'lr': -1e-4}, 'Invalid LR: -0.0001. LR must be > 0'),
        ({'betas': (0.9, 1.1)}, 'Invalid beta values: (0.9, 1.1). There must be two, all between 0 and 1.'),
        ({'betas': (-0.1, 0.9)}, 'Invalid beta values: (-0.1, 0.9). There must be two, all between 0 and 1.'),
        ({'betas': (0.9,)}, 'Invalid beta values: (0.9,). There must be two, all between 0 and 1.'),
    ],
)
def test_arguments_out_of_range(kwargs: dict, text: str) -> None:
    with pytest.raises(ValueError) as error:
        DecoupledLionW([torch.nn.Parameter(torch.ones(1))], **kwargs)
    assert str(error.value) == text


def test_defaults_and_eps() -> None:
    cls = registry.optimizers.get('decoupled_lionw')
    group = cls([torch.nn.Parameter(torch.ones(1))]).param_groups[0]
    assert (group['lr'], group['betas'], group['weight_decay'], group['initial_lr']) == (1e-4, (0.9, 0.99), 0.0, 1e-4)
    with pytest.raises(TypeError, match="unexpected keyword argument 'eps'"):
        cls([torch.nn.Parameter(torch.ones(1))], eps=1e-8)


def test_high_weight_decay_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        DecoupledLionW([torch.nn.Parameter(torch.ones(1))], weight_decay=0.01)
    assert 'for the `DecoupledLionW` optimizer' in caplog.text


def test_no_op_changes_nothing_and_has_a_learning_rate() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = registry.optimizers.get('no_op')([weight])
    assert isinstance(optimizer, NoOp) and optimizer.param_groups[0]['lr'] == 0.0
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert optimizer.step(lambda: 3.0) == 3.0 and optimizer.step() is None
    assert weight.tolist() == [1.0, 1.0] and not optimizer.state
    with pytest.raises(TypeError, match='lr'):
        NoOp([weight], lr=1.0)
