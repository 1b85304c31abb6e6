"""The tensor-parallel strategy ffn: its plan, and that a split model computes what a whole one does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from llmfoundry import registry
from llmfoundry.models.layers.ffn import MPTGLU, MPTMLP
from llmfoundry.tp.ffn import _GatherSamples
from tests.helpers.processes import run_in_processes


class _Block(nn.Module):
    def __init__(self, ffn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.ffn = ffn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(self.norm(x))


def _model(gated: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(_Block((MPTGLU if gated else MPTMLP)(8, 2)) for _ in range(2)))


def test_plan_names_the_projections_of_every_block() -> None:
    plan = registry.tp_strategies.get('ffn')(_model(gated=True))
    assert {name: type(style) for name, style in plan.items()} == {
        f'{block}.ffn{suffix}': style
        for block in (0, 1)
        for suffix, style in (('', _GatherSamples), ('.up_proj', ColwiseParallel), ('.gate_proj', ColwiseParallel), ('.down_proj', RowwiseParallel))
    }


def test_a_model_without_such_blocks() -> None:
    with pytest.raises(RuntimeError) as error:
        registry.tp_strategies.get('ffn')(nn.Sequential(nn.Linear(2, 2)))
    assert str(error.value) == (
        "tp_config.strategy 'ffn' needs modules named ffn, ffn.up_proj, ffn.down_proj; Sequential has none named ffn, ffn.up_proj, ffn.down_proj. "
        'Use an MPT model with ffn_type mptmlp or mptglu'
    )


def _split_forward(gated: bool) -> dict[str, torch.Tensor]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    model = _model(gated)
    plan = registry.tp_strategies.get('ffn')(model)
    parallelize_module(model, init_device_mesh('cpu', (dist.get_world_size(),)), plan)
    torch.manual_seed(1)
    samples = torch.randn(4, 3, 8).chunk(dist.get_world_size())[dist.get_rank()]
    out = model(samples)
    out.sum().backward()
    grads = {name: param.grad.full_tensor() for name, param in model.named_parameters() if 'proj.weight' in name}
    return {'out': out.detach(), **grads}


@pytest.mark.world_size(2)
def test_split_equals_whole() -> None:
    results = run_in_processes(_split_forward, 2, True)
    model = _model(gated=True)
    torch.manual_seed(1)
    out = model(torch.randn(4, 3, 8))
    out.sum().backward()
    torch.testing.assert_close(torch.cat([result['out'] for result in results]), out.detach())
    for name, param in model.named_parameters():
        if 'proj.weight' in name:
            torch.testing.assert_close(results[0][name], param.grad / 2)  # the mean over the ranks, each of which has a loss of its own
