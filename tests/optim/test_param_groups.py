"""Frozen parameters and parameter groups by regular expression."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llmfoundry.optim.adamw import DecoupledAdamW
from llmfoundry.optim.param_groups import build_param_groups, disable_grad, split_param_groups


def _model() -> nn.ModuleDict:
    return nn.ModuleDict({'wte': nn.Embedding(3, 2), 'blocks': nn.ModuleList(nn.Linear(2, 2) for _ in range(2)), 'norm': nn.LayerNorm(2)})


def _names(model: nn.Module, params: list[nn.Parameter]) -> list[str]:
    names = {id(param): name for name, param in model.named_parameters()}
    return [names[id(param)] for param in params]


def test_disable_grad_takes_one_pattern_or_several() -> None:
    model = _model()
    assert disable_grad(model.named_parameters(), 'norm') == ['norm.weight', 'norm.bias']
    assert disable_grad(model.named_parameters(), [r'^wte\.', r'blocks\.1.*weight$']) == ['wte.weight', 'blocks.1.weight']
    trainable = [name for name, param in model.named_parameters() if param.requires_grad]
    assert trainable == ['blocks.0.weight', 'blocks.0.bias', 'blocks.1.bias']


def test_first_matching_group_wins_and_the_rest_come_first() -> None:
    model = _model()
    groups = split_param_groups(model.named_parameters(), [{'param_str_match': 'bias$', 'weight_decay': 0.0}, {'param_str_match': 'norm|wte', 'lr': 0.5}])
    assert [_names(model, group['params']) for group in groups] == [
        ['blocks.0.weight', 'blocks.1.weight'],
        ['blocks.0.bias', 'blocks.1.bias', 'norm.bias'],
        ['wte.weight', 'norm.weight'],
    ]
    assert [{key: value for key, value in group.items() if key != 'params'} for group in groups] == [{}, {'weight_decay': 0.0}, {'lr': 0.5}]
    optimizer = DecoupledAdamW(groups, lr=0.1, weight_decay=1e-4)
    assert [(group['lr'], group['initial_lr'], group['weight_decay']) for group in optimizer.param_groups] == [(0.1, 0.1, 1e-4), (0.1, 0.1, 0.0), (0.5, 0.5, 1e-4)]


def test_every_parameter_is_in_one_group() -> None:
    model = _model()
    groups = split_param_groups(model.named_parameters(), [{'param_str_match': '.'}])
    assert len(groups) == 1 and len(groups[0]['params']) == len(list(model.parameters()))


@pytest.mark.parametrize('nothing', [None, []])
def test_without_groups_it_is_the_list_of_parameters(nothing: list | None) -> None:
    model = _model()
    assert all(a is b for a, b in zip(split_param_groups(model.named_parameters(), nothing), model.parameters(), strict=True))


def test_both_keys_together_keep_frozen_parameters_in_their_group() -> None:
    model = _model()
    groups = build_param_groups(model, 'wte', [{'param_str_match': 'norm', 'lr': 1.0}])
    assert not model['wte'].weight.requires_grad
    assert _names(model, groups[0]['params'])[0] == 'wte.weight'
    assert isinstance(build_param_groups(model)[0], torch.nn.Parameter)


@pytest.mark.parametrize(
    ('groups', 'text'),
    [
        ([{'lr': 1.0}], "optimizer.param_groups[0]: the key 'param_str_match' is missing, got {'lr': 1.0}"),
        (['norm'], "optimizer.param_groups[0]: the key 'param_str_match' is missing, got 'norm'"),
        ([{'param_str_match': 'norm'}, {'param_str_match': '('}], "optimizer.param_groups[1].param_str_match: '(' is not a regular expression: missing ), unterminated subpattern at position 0"),
        ([{'param_str_match': 3}], 'optimizer.param_groups[0].param_str_match: a regular expression is expected, got 3'),
        ([{'param_str_match': 'a', 'params': []}], "optimizer.param_groups[0]: the key 'params' is filled from 'param_str_match' and cannot be set"),
        (
            [{'param_str_match': 'nrom'}],
            "optimizer.param_groups[0].param_str_match: 'nrom' is found in no parameter name, so it would do nothing. Names look like wte.weight, blocks.0.weight, blocks.0.bias",
        ),
        (
            [{'param_str_match': '.'}, {'param_str_match': 'norm'}],
            "optimizer.param_groups[1].param_str_match: 'norm' is found in no parameter name, so it would do nothing. Names look like wte.weight, blocks.0.weight, blocks.0.bias",
        ),
    ],
)  # fmt: skip
def test_wrong_groups(groups: list, text: str) -> None:
    with pytest.raises(ValueError) as error:
        split_param_groups(_model().named_parameters(), groups)
    assert str(error.value) == text


def test_disable_grad_that_would_freeze_nothing() -> None:
    with pytest.raises(ValueError) as error:
        disable_grad(_model().named_parameters(), ['norm', 'heads'])
    assert str(error.value) == "optimizer.disable_grad: 'heads' is found in no parameter name, so it would do nothing. Names look like wte.weight, blocks.0.weight, blocks.0.bias"
