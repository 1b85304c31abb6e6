"""Targets of activation checkpointing: parsing, and the modules that are chosen."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from llmfoundry import registry
from llmfoundry.models.act_ckpt import (
    mark_activation_checkpointing,
    parse_activation_checkpointing_target,
    parse_target_blocks,
    should_checkpoint,
    should_wrap_fsdp,
)
from llmfoundry.models.layers.ffn import MPTMLP
from llmfoundry.models.layers.norm import RMSNorm

ALL = list(range(8))


class _Attention(nn.Module):
    pass


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1 = RMSNorm(8)
        self.attn = _Attention()
        self.ffn = MPTMLP(8, 1)


@pytest.mark.parametrize(
    ('value', 'blocks'),
    [
        (3, [0, 1, 2]),
        (0, []),
        (50, ALL),
        ([1, 5], [1, 5]),
        ('first-2', [0, 1]),
        ('last-3', [5, 6, 7]),
        ('middle-2', [3, 4]),
        ('middle-3', [2, 3, 4]),
        ('range-2-5', [2, 3, 4]),
        ('first-99', ALL),
        ('first-1, last-1', [0, 7]),
        (['first-2', 7, 'range-1-4'], [0, 1, 2, 3, 7]),
        (['first-1,middle-2', 7], [0, 3, 4, 7]),
        ([], []),
    ],
)
def test_blocks(value: object, blocks: list[int]) -> None:
    assert parse_target_blocks(value, 8) == blocks


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        ('frist-2', "blocks must be a number n, a list of block indices, first-n, last-n, middle-n or range-i-j, got 'frist-2'"),
        (True, 'blocks must be a number n, a list of block indices, first-n, last-n, middle-n or range-i-j, got True'),
        (1.5, 'blocks must be a number n, a list of block indices, first-n, last-n, middle-n or range-i-j, got 1.5'),
        ([8], 'block 8 does not exist, the model has blocks 0 to 7'),
        ([-1], 'block -1 does not exist, the model has blocks 0 to 7'),
        ('range-3-9', "'range-3-9' must name blocks i to j - 1 with 0 <= i < j <= 8 (the number of layers)"),
        ('range-4-4', "'range-4-4' must name blocks i to j - 1 with 0 <= i < j <= 8 (the number of layers)"),
    ],
)
def test_wrong_blocks(value: object, text: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_activation_checkpointing_target({'ffn': value}, 8)
    assert str(error.value) == f'activation_checkpointing_target.ffn: {text}'


@given(n_layers=st.integers(1, 40), count=st.integers(0, 50))
def test_spans_have_their_length_and_place(n_layers: int, count: int) -> None:
    expected = min(count, n_layers)
    for kind in ('first', 'last', 'middle'):
        blocks = parse_target_blocks(f'{kind}-{count}', n_layers)
        assert len(blocks) == expected and blocks == list(range(blocks[0], blocks[-1] + 1) if blocks else [])
        if blocks:
            before, after = blocks[0], n_layers - 1 - blocks[-1]
            assert {'first': before == 0, 'last': after == 0, 'middle': abs(before - after) <= 1}[kind]


@pytest.mark.parametrize(
    ('target', 'parsed'),
    [
        (None, {'mptblock': ALL}),
        ([], {'mptblock': ALL}),
        ('ffn', {'ffn': ALL}),
        (['ffn', 'norm_attn_norm'], {'ffn': ALL, 'norm_attn_norm': ALL}),
        ('Grouped_Query_Attention', {'grouped_query_attention': ALL}),
        ({'mptblock': 'first-2', 'ffn': 'last-1', 'rmsnorm': [4]}, {'mptblock': [0, 1], 'ffn': [7], 'rmsnorm': [4]}),
    ],
)
def test_targets(target: object, parsed: dict) -> None:
    assert parse_activation_checkpointing_target(target, 8) == parsed


def test_wrong_targets() -> None:
    with pytest.raises(ValueError, match="^activation_checkpointing_target: unknown module 'mtpblock'. Available: mptblock, norm_attn_norm, ffn, grouped_query_attention, "):
        parse_activation_checkpointing_target('mtpblock', 8)
    with pytest.raises(ValueError) as error:
        parse_activation_checkpointing_target({'mptblock': 3, 'ffn': [2]}, 8)
    assert str(error.value) == "activation_checkpointing_target: block 2 is named by both 'mptblock' and 'ffn'; each block may have one target"
    with pytest.raises(ValueError) as error:
        parse_activation_checkpointing_target(['ffn', 'mptblock'], 8)
    assert str(error.value) == 'activation_checkpointing_target: mptblock contains ffn; list one or the other'


def _chosen(target: object, n_blocks: int = 3) -> list[str]:
    blocks = nn.ModuleList(_Block() for _ in range(n_blocks))
    with registry.save_registry():
        registry.attention_classes.register('own_attention', func=_Attention)
        mark_activation_checkpointing(blocks, target)
    return [name for name, module in copy.deepcopy(blocks).named_modules() if should_checkpoint(module)]


def test_chosen_modules() -> None:
    assert _chosen(None) == ['0', '1', '2']
    assert _chosen({'own_attention': 1, 'ffn': [2]}) == ['0.attn', '2.ffn']
    assert _chosen({'norm_attn_norm': [1]}) == ['1.norm_1', '1.attn']
    assert _chosen({'mptmlp': 'last-1', 'rmsnorm': 'first-1'}) == ['0.norm_1', '2.ffn']


def test_marking_again_replaces_the_choice() -> None:
    blocks = [_Block(), _Block()]
    mark_activation_checkpointing(blocks, 'ffn')
    mark_activation_checkpointing(blocks, {'mptblock': [1]})
    assert not should_checkpoint(blocks[0].ffn) and not should_checkpoint(blocks[0]) and should_checkpoint(blocks[1])


def test_a_target_that_would_choose_nothing() -> None:
    with pytest.raises(ValueError) as error:
        _chosen('layernorm')
    assert str(error.value) == (
        "activation_checkpointing_target: block 0 (_Block) has no module 'layernorm', so nothing of it would be checkpointed"
    )


def test_composer_checkpoints_the_chosen_modules() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper, apply_activation_checkpointing

    blocks = nn.Sequential(MPTMLP(8, 2), MPTMLP(8, 2))
    x = torch.randn(2, 8)
    expected = torch.autograd.grad(blocks(x).sum(), list(blocks.parameters()))
    mark_activation_checkpointing(list(blocks), {'mptblock': [1]})
    apply_activation_checkpointing(blocks, check_fn=should_checkpoint)
    assert [isinstance(block, CheckpointWrapper) for block in blocks] == [False, True]
    for grad, expected_grad in zip(torch.autograd.grad(blocks(x).sum(), list(blocks.parameters())), expected, strict=True):
        assert torch.equal(grad, expected_grad)


def test_fsdp_units_are_blocks_and_what_asks_for_it() -> None:
    assert should_wrap_fsdp(_Block(), _Block) is True
    asks, refuses, brings = nn.ReLU(), _Block(), nn.ReLU()
    asks._fsdp_wrap, refuses._fsdp_wrap, brings._fsdp_kwargs_dict = True, False, {'process_group': 'node'}
    assert should_wrap_fsdp(nn.ReLU(), _Block) is False
    assert should_wrap_fsdp(asks, _Block) is True
    assert should_wrap_fsdp(refuses, _Block) is False
    assert should_wrap_fsdp(brings, _Block) == {'process_group': 'node'}
