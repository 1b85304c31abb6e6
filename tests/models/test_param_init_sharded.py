"""Initialisation of sharded parameters: each rank gets its share of one whole tensor."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from llmfoundry.models.param_init import get_param_init_fn
from tests.helpers.processes import run_in_processes


def _initialise_sharded() -> dict[str, torch.Tensor]:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(100 + dist.get_rank())  # ranks do not share a seed
    with torch.device('meta'):
        model = nn.Sequential(nn.Linear(32, 48, bias=True), nn.Embedding(10, 8, padding_idx=9))
    model[0]._fused = (0, [7, 30])  # cuts that are not those of the shards
    model[0]._is_residual = True
    fully_shard(model)
    model.to_empty(device='cpu')
    model.apply(get_param_init_fn({'name': 'xavier_uniform_', 'init_div_is_residual': 2.0}, 4, 32))
    return {name: param.full_tensor().detach() for name, param in model.named_parameters()}


@pytest.mark.world_size(2)
def test_sharded_weights_are_slices_of_one_initialised_whole() -> None:
    first, second = run_in_processes(_initialise_sharded, 2)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    start = 0
    for end in (7, 30, 48):
        rows = first['0.weight'][start:end]
        limit = math.sqrt(6 / (32 + end - start)) / 2.0
        assert 0.9 * limit < rows.abs().max().item() <= limit
        start = end
    assert not first['0.bias'].any() and not first['1.weight'][9].any()
    # Both halves are drawn from the same stream, not each by its rank's own.
    assert not torch.equal(first['0.weight'][:24], first['0.weight'][24:])
