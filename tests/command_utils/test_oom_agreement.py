"""One rank runs out of memory in the middle of a pass: all ranks learn it within seconds, and train on as if nothing had happened."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from llmfoundry.command_utils.oom_agreement import all_stay_within_memory, is_out_of_memory
from tests.helpers.processes import run_in_processes


class _Layer(nn.Module):
    """A linear layer that fails where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.fails: str | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails == 'forward':
            torch.empty(1 << 60)  # more than any machine has: the real error of torch's allocator
        if self.fails == 'backward':
            x = x * 1
            x.register_hook(_raise_memory_error)
        return torch.relu(self.linear(x))


def _raise_memory_error(grad: torch.Tensor) -> None:
    raise MemoryError('in the backward pass')


def _work(kind: str, where: str, rank_that_fails: int) -> dict[str, Any]:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from llmfoundry import dist

    dist.fix_gloo_average()
    torch.manual_seed(0)
    model = nn.Sequential(*(_Layer() for _ in range(3)))
    if kind != 'ddp':
        mesh = init_device_mesh('cpu', (distributed.get_world_size(),))
        for layer in model:
            fully_shard(layer, mesh=mesh, reshard_after_forward=kind == 'fsdp')
        fully_shard(model, mesh=mesh)
    batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(distributed.get_rank()))

    def one_pass() -> None:
        model(batch).sum().backward()

    def gradients() -> dict[str, torch.Tensor]:
        grads = {n: p.grad.full_tensor() if hasattr(p.grad, 'full_tensor') else p.grad.clone() for n, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = None
        return grads

    one_pass()
    before = gradients()
    model[1].fails = where if distributed.get_rank() == rank_that_fails else None
    start = time.monotonic()
    answers = [all_stay_within_memory(one_pass, model) for _ in range(2)]
    took = time.monotonic() - start
    model[1].fails = None
    for p in model.parameters():
        p.grad = None
    answers.append(all_stay_within_memory(one_pass, model))
    after = gradients()
    return {'answers': answers, 'same': all(torch.equal(before[n], after[n]) for n in before), 'took': took, 'patched': distributed.all_reduce.__name__ != 'all_reduce'}


CASES = [('ddp', 'forward', 1), ('fsdp', 'forward', 1), ('fsdp', 'backward', 0), ('fsdp without reshard', 'backward', 1)]


def _all_cases() -> list[dict[str, Any]]:
    return [_work(*case) for case in CASES]


@pytest.fixture(scope='module')
def outcomes() -> list[list[dict[str, Any]]]:
    """Per rank, per case."""
    return run_in_processes(_all_cases, 2)


@pytest.mark.parametrize('case', range(len(CASES)), ids=[f'{kind}, {where}' for kind, where, _ in CASES])
def test_all_ranks_agree_and_the_next_pass_is_right(outcomes: list[list[dict[str, Any]]], case: int) -> None:
    for rank in outcomes:
        assert rank[case]['answers'] == [False, False, True]
        assert rank[case]['same'] and not rank[case]['patched']
        assert rank[case]['took'] < 30


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value) and is_out_of_memory(MemoryError()) and is_out_of_memory(torch.cuda.OutOfMemoryError('CUDA out of memory'))
    assert not is_out_of_memory(RuntimeError('mat1 and mat2 shapes cannot be multiplied'))


def test_other_errors_are_raised() -> None:
    def broken() -> None:
        raise RuntimeError('shapes')

    with pytest.raises(RuntimeError, match='shapes'):
        all_stay_within_memory(broken, nn.Linear(1, 1))
