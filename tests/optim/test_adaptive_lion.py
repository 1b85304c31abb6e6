"""Outlier detection of the adaptive Lions, and what outliers lead to."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmfoundry import registry
from llmfoundry.optim.adaptive_lion import DecoupledAdaLRLion, DecoupledClipLion, adjusted_lr_scale, is_outlier, running_mean
from llmfoundry.optim.lion import DecoupledLionW
from tests.helpers.processes import run_in_processes

N_CALM = 110  # steps before anything can be an outlier are 100
SPIKE = 1000.0


def _grad(step: int, scale: float = 1.0, size: int = 20) -> torch.Tensor:
    return scale * torch.randn(size, generator=torch.Generator().manual_seed(step))


def _run(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, steps: range, spikes: tuple[int, ...] = ()) -> list[float]:
    """Returns how far each step moved a weight, which is the learning rate that Lion used for it."""
    moved = []
    for step in steps:
        before = weight.detach().clone()
        weight.grad = _grad(step, SPIKE if step in spikes else 1.0)
        optimizer.step()
        moved.append((weight.detach() - before).abs().median().item())
    return moved


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=100))
def test_running_mean_is_the_mean_while_the_window_fills(values: list[float]) -> None:
    mean = 0.0
    for i, value in enumerate(values):
        mean = running_mean(value, mean, i)
    assert mean == pytest.approx(sum(values) / len(values))


def test_running_mean_then_forgets() -> None:
    mean = 1.0
    for i in range(100, 1000):
        mean = running_mean(5.0, mean, i)
    assert mean == pytest.approx(5.0 - 4.0 * 0.99**900)


def test_is_outlier() -> None:
    assert not is_outlier(1e9, 1.0, 99, 5.0)
    assert not is_outlier(5.0, 1.0, 100, 5.0)
    assert is_outlier(5.1, 1.0, 100, 5.0)


def test_scale() -> None:
    assert [adjusted_lr_scale(n, 0.5, 0.2) for n in range(4)] == [1.0, 0.5, 0.25, 0.2]


@pytest.mark.parametrize('cls', [DecoupledAdaLRLion, DecoupledClipLion])
def test_without_outliers_both_are_lion(cls: type) -> None:
    plain, adaptive = torch.nn.Parameter(torch.ones(20)), torch.nn.Parameter(torch.ones(20))
    _run(DecoupledLionW([plain], lr=0.01, weight_decay=1e-4), plain, range(N_CALM))
    optimizer = cls([adaptive], lr=0.01, weight_decay=1e-4)
    _run(optimizer, adaptive, range(N_CALM))
    assert torch.equal(plain, adaptive) and optimizer.state[adaptive]['n_seen'] == N_CALM


def test_adalr_lowers_the_rate_at_once_and_restores_it_after_the_timeout() -> None:
    weight = torch.nn.Parameter(torch.ones(20))
    optimizer = DecoupledAdaLRLion([weight], lr=0.01, timeout=5, lr_penalty=0.5, min_scale=0.1, outlier_threshold=10)
    moved = _run(optimizer, weight, range(N_CALM + 25), spikes=(N_CALM,))
    assert moved[N_CALM - 1] == pytest.approx(0.01, rel=1e-3)
    assert moved[N_CALM] == pytest.approx(0.005, rel=1e-3)
    lowest = min(moved[N_CALM:])
    assert lowest >= 0.001 * 0.999
    assert moved[-1] == pytest.approx(0.01, rel=1e-3)


def test_adalr_never_goes_below_its_smallest_scale() -> None:
    weight = torch.nn.Parameter(torch.ones(20))
    optimizer = DecoupledAdaLRLion([weight], lr=0.01, lr_penalty=0.1, min_scale=0.05)
    optimizer._state_of(weight)['n_outliers'] = 30
    optimizer.state[weight].update(n_seen=3, last_outlier=2)
    assert _run(optimizer, weight, range(1))[0] == pytest.approx(0.01 * 0.05, rel=1e-3)


def test_each_parameter_has_its_own_rate() -> None:
    calm, spiky = torch.nn.Parameter(torch.ones(20)), torch.nn.Parameter(torch.ones(20))
    optimizer = DecoupledAdaLRLion([calm, spiky], lr=0.01)
    for step in range(N_CALM):
        calm.grad, spiky.grad = _grad(step), _grad(step)
        optimizer.step()
    calm.grad, spiky.grad = _grad(N_CALM), _grad(N_CALM, SPIKE)
    optimizer.step()
    metrics = optimizer.report_per_parameter_metrics(calm, 'calm', {}) | optimizer.report_per_parameter_metrics(spiky, 'spiky', {})
    assert metrics['layerwise_lr_scale/calm'] == 1.0 and metrics['layerwise_lr_scale/spiky'] == pytest.approx(0.707)
    assert metrics['l2_norm/update/spiky'] == pytest.approx(0.01 * 0.707 * 20**0.5, rel=1e-3)


def test_clip_lion_clips_the_gradient_to_the_threshold() -> None:
    weight = torch.nn.Parameter(torch.ones(20))
    optimizer = DecoupledClipLion([weight], lr=0.01, outlier_threshold=3.0)
    _run(optimizer, weight, range(N_CALM))
    mean = optimizer.state[weight]['norm_mean']
    assert mean == pytest.approx(20**0.5, rel=0.1)
    moment = optimizer.state[weight]['exp_avg'].clone()
    weight.grad = _grad(N_CALM, SPIKE)
    direction = weight.grad / weight.grad.norm()
    optimizer.step()
    torch.testing.assert_close(weight.grad, direction * 3.0 * mean)
    torch.testing.assert_close(optimizer.state[weight]['exp_avg'], 0.99 * moment + 0.01 * direction * 3.0 * mean)
    assert optimizer.report_per_parameter_metrics(weight, 'w', {})['clipped_batches/w'] == 1.0


@pytest.mark.parametrize('cls', [DecoupledAdaLRLion, DecoupledClipLion])
def test_resumes_bit_identically_with_its_memory(cls: type) -> None:
    spikes, last = (N_CALM, N_CALM + 3), N_CALM + 8
    whole, half = torch.nn.Parameter(torch.ones(20)), torch.nn.Parameter(torch.ones(20))
    _run(cls([whole], lr=0.01), whole, range(last), spikes)
    first = cls([half], lr=0.01)
    _run(first, half, range(N_CALM + 1), spikes)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = cls([half], lr=0.01)
    second.load_state_dict(torch.load(buffer))
    _run(second, half, range(N_CALM + 1, last), spikes)
    assert torch.equal(whole, half)


@pytest.mark.parametrize(
    ('name', 'kwargs', 'text'),
    [
        ('adalr_lion', {'outlier_threshold': 0}, 'Invalid outlier threshold: 0. It must be > 0'),
        ('clip_lion', {'outlier_threshold': -1.0}, 'Invalid outlier threshold: -1.0. It must be > 0'),
        ('adalr_lion', {'timeout': -1}, 'Invalid timeout: -1. It must be >= 0 steps'),
        ('adalr_lion', {'lr_penalty': 1.0}, 'Invalid lr_penalty: 1.0. It must lie between 0 and 1'),
        ('adalr_lion', {'min_scale': 1.5}, 'Invalid min_scale: 1.5. It must lie between 0 and 1'),
        ('clip_lion', {'lr': 0.0}, 'Invalid LR: 0.0. LR must be > 0'),
    ],
)
def test_arguments_out_of_range(name: str, kwargs: dict, text: str) -> None:
    with pytest.raises(ValueError) as error:
        registry.optimizers.get(name)([torch.nn.Parameter(torch.ones(1))], **kwargs)
    assert str(error.value) == text


# Sharded ------------------------------------------------------------------------------------------------------------------------


def _train_sharded(shard: bool) -> dict[str, object]:
    """Every optimizer of the package on a small model, sharded by FSDP2 or not; gradients come from full tensors, so that both see the same ones."""
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    results: dict[str, object] = {}
    for name in ('decoupled_adamw', 'decoupled_lionw', 'adalr_lion', 'clip_lion'):
        torch.manual_seed(0)
        # One row cannot be split: the second rank holds an empty shard.
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1))
        if shard:
            fully_shard(model, mesh=init_device_mesh('cpu', (2,)))
        optimizer = registry.optimizers.get(name)(model.parameters(), lr=0.01, weight_decay=1e-4)
        for step in range(N_CALM + 3):
            for i, param in enumerate(model.parameters()):
                grad = _grad(10 * step + i, SPIKE if step == N_CALM else 1.0, param.numel()).view(param.shape)
                param.grad = distribute_tensor(grad, param.device_mesh, param.placements) if isinstance(param, DTensor) else grad
            optimizer.step()
        metrics: dict[str, object] = {}
        for param_name, param in model.named_parameters():
            optimizer.report_per_parameter_metrics(param, param_name, metrics)
        if shard:
            metrics = optimizer.dist_reduce_metrics(optimizer.pre_reduce_metrics(metrics))
        results[f'{name}.weights'] = [param.full_tensor().detach() if isinstance(param, DTensor) else param.detach() for param in model.parameters()]
        results[f'{name}.metrics'] = {key: float(value) for key, value in metrics.items()}
    return results


@pytest.mark.world_size(2)
def test_sharded_training_and_metrics_equal_unsharded() -> None:
    sharded = run_in_processes(_train_sharded, 2, True)
    whole = _train_sharded(False)
    for key, expected in whole.items():
        for result in sharded:
            if key.endswith('weights'):
                for weight, expected_weight in zip(result[key], expected, strict=True):
                    torch.testing.assert_close(weight, expected_weight, msg=lambda text, key=key: f'{key}: {text}')
            else:
                assert result[key] == pytest.approx(expected, rel=1e-3), key
