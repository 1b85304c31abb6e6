"""Building modules without their weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmfoundry.models.utils import init_empty_weights, init_on_device


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        shared = nn.Parameter(torch.ones(2), requires_grad=False)
        shared.mark = 'kept'
        self.a = shared
        self.b = shared
        self.norm = nn.BatchNorm1d(3)


def test_parameters_are_meta_buffers_real_ties_and_marks_kept() -> None:
    with init_empty_weights():
        model = _Tied()
    assert all(param.is_meta for param in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.head.weight is model.embedding.weight
    assert model.a is model.b and model.a.mark == 'kept' and not model.a.requires_grad and model.head.weight.requires_grad


def test_buffers_too_if_asked() -> None:
    with init_empty_weights(include_buffers=True):
        assert all(buffer.is_meta for buffer in nn.BatchNorm1d(3).buffers())


def test_values_survive_a_move_to_the_same_device() -> None:
    torch.manual_seed(0)
    expected = nn.Linear(2, 2).weight
    torch.manual_seed(0)
    with init_on_device('cpu'):
        layer = nn.Linear(2, 2)
    assert torch.equal(layer.weight, expected)


def test_construction_is_normal_again_afterwards_even_after_an_error() -> None:
    with pytest.raises(RuntimeError), init_empty_weights(include_buffers=True):
        raise RuntimeError
    layer = nn.BatchNorm1d(2)
    assert not layer.weight.is_meta and not layer.running_mean.is_meta


def test_initialisation_in_constructors_runs_on_the_meta_device() -> None:
    """So that it touches no memory, which would be as large as the model."""
    seen: list[bool] = []

    class Watched(nn.Linear):
        def reset_parameters(self) -> None:
            seen.append(self.weight.is_meta)
            super().reset_parameters()

    with init_empty_weights():
        Watched(2, 2)
    assert seen == [True]


def test_none_parameters_stay_none() -> None:
    with init_empty_weights():
        assert nn.Linear(2, 2, bias=False).bias is None
