"""What Composer's OptimizerMonitor logs with our optimizers, compared with norms taken around the step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from composer.callbacks import OptimizerMonitor

from llmfoundry import registry
from llmfoundry.optim.metrics import local_norm, reduce_metrics, squared_norms


def _log(model: torch.nn.Module, optimizer: torch.optim.Optimizer, fsdp_enabled: bool) -> dict[str, float]:
    logged: dict[str, float] = {}
    state = SimpleNamespace(timestamp=SimpleNamespace(batch=SimpleNamespace(value=10)), model=model, optimizers=[optimizer], fsdp_enabled=fsdp_enabled)
    OptimizerMonitor(batch_log_interval=10).batch_end(state, SimpleNamespace(log_metrics=logged.update))
    return logged


@pytest.mark.parametrize('fsdp_enabled', [False, True])
@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [('decoupled_adamw', {}), ('decoupled_adamw', {'amsgrad': True}), ('decoupled_lionw', {}), ('adalr_lion', {}), ('clip_lion', {})],
)
def test_logged_norms_are_those_of_the_step(name: str, kwargs: dict, fsdp_enabled: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 4)
    groups = [{'params': [model.weight]}, {'params': [model.bias], 'lr': 0.3, 'weight_decay': 0.2}]
    optimizer = registry.optimizers.get(name)(groups, lr=0.1, weight_decay=1e-4, **kwargs)
    for step in range(30):
        for param in model.parameters():
            param.grad = torch.randn_like(param) * 0.7**step  # falling, so that amsgrad makes a difference
        before = {key: param.detach().clone() for key, param in model.named_parameters()}
        optimizer.step()
    for group in optimizer.param_groups:
        group['lr'] *= 0.5  # the schedule moves on before the monitor is asked
    logged = _log(model, optimizer, fsdp_enabled)
    for key, param in model.named_parameters():
        assert logged[f'l2_norm/update/{key}'] == pytest.approx((before[key] - param).norm().item(), rel=1e-4)
        assert logged[f'l2_norm/param/{key}'] == pytest.approx(param.norm().item())
        assert logged[f'l2_norm/grad/{key}'] == pytest.approx(param.grad.norm().item())
        assert logged[f'l2_norm/moment/{key}'] == pytest.approx(optimizer.state[param]['exp_avg'].norm().item())
    assert logged['l2_norm/grad/global'] == pytest.approx((model.weight.grad.norm() ** 2 + model.bias.grad.norm() ** 2).sqrt().item())


def test_nothing_is_reported_before_the_first_step_or_without_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = registry.optimizers.get('decoupled_lionw')([weight])
    assert optimizer.report_per_parameter_metrics(weight, 'w', {}) == {}
    weight.grad = torch.ones(2)
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.report_per_parameter_metrics(weight, 'w', {}) == {}


def test_reduction_in_one_process() -> None:
    reduced = reduce_metrics({'l2_norm/a': torch.tensor(9.0), 'layerwise_lr_scale/b': torch.tensor(0.5)}, torch.device('cpu'))
    assert reduced == {'l2_norm/a': 3.0, 'layerwise_lr_scale/b': 0.5}
    assert reduce_metrics({}, torch.device('cpu')) == {}


def test_norms_of_plain_tensors() -> None:
    assert local_norm(torch.tensor([3.0, 4.0], dtype=torch.bfloat16)).item() == 5.0
    assert squared_norms([torch.tensor([3.0, 4.0]), None], torch.device('cpu')).tolist() == [25.0, 0.0]
    assert squared_norms([], torch.device('cpu')).tolist() == []
