"""Counts of parameters and of floating point operations, against counts by hand and by torch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llmfoundry.models.layers.layer_builders import build_ffn
from llmfoundry.models.mpt.param_count import (
    attention_flops_per_sequence,
    flops_per_sequence,
    flops_per_token,
    n_active_params,
    n_params,
    n_trainable_params,
)

D, VOCAB, SEQ, LAYERS = 16, 40, 12, 3
MOE = {'ffn_type': 'torch_dmoe', 'moe_num_experts': 8, 'moe_top_k': 2}


def _config(**changes: object) -> SimpleNamespace:
    base = {
        'd_model': D, 'n_heads': 4, 'head_dim': None, 'n_layers': LAYERS, 'vocab_size': VOCAB, 'ffn_config': {'ffn_type': 'mptmlp'}, 'attn_config': {'sliding_window_size': -1},
        'tie_word_embeddings': True, 'block_overrides': None,
    }  # fmt: skip
    return SimpleNamespace(**{**base, **changes})


class _Model(nn.Module):
    """Matrix products of a decoder with a head that is tied or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCAB, D)
        self.blocks = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(LAYERS))
        self.lm_head = nn.Linear(D, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x)
            x = torch.softmax(x @ x.mT, -1) @ x
        return self.lm_head(x)


def test_tied_parameters_count_once() -> None:
    assert n_params(_Model(tied=True)) == LAYERS * D * D + VOCAB * D
    assert n_params(_Model(tied=False)) == LAYERS * D * D + 2 * VOCAB * D


def test_trainable() -> None:
    model = _Model(tied=True)
    model.blocks[0].requires_grad_(False)
    assert n_trainable_params(model) == n_params(model) - D * D


@pytest.mark.parametrize('tied', [True, False])
def test_flops_are_those_that_torch_counts(tied: bool) -> None:
    model = _Model(tied)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, SEQ, dtype=torch.long))
    forward = counter.get_total_flops()
    assert flops_per_sequence(model, _config(tie_word_embeddings=tied), SEQ) == 3 * forward
    assert flops_per_token(model, _config(tie_word_embeddings=tied), SEQ) == 3 * forward / SEQ


def test_the_formula_in_numbers() -> None:
    model = nn.Linear(10, 10, bias=False)
    assert flops_per_sequence(model, _config(), SEQ) == 6 * 100 * SEQ + 3 * (LAYERS * 4 * D * SEQ * SEQ)


def test_a_window_shortens_attention_and_head_dim_widens_it() -> None:
    assert attention_flops_per_sequence(_config(attn_config={'sliding_window_size': 4}), SEQ) == LAYERS * 4 * D * SEQ * 4
    assert attention_flops_per_sequence(_config(attn_config={'sliding_window_size': 99}), SEQ) == LAYERS * 4 * D * SEQ * SEQ
    assert attention_flops_per_sequence(_config(head_dim=8), SEQ) == LAYERS * 4 * 32 * SEQ * SEQ


def test_only_the_experts_of_a_token_are_active() -> None:
    model = build_ffn('torch_dmoe', D, 2, 'cpu', True, {
        'moe_num_experts': 8, 'moe_top_k': 2, 'mlp_type': 'glu', 'moe_jitter_eps': None, 'moe_normalize_expert_weights': None, 'uniform_expert_assignment': False,
    })  # fmt: skip
    router, bias, one_expert = 8 * D, D, 3 * 2 * D * D
    assert n_params(model) == router + bias + 8 * one_expert
    assert n_active_params(model, _config(ffn_config=MOE)) == router + bias + 2 * one_expert
    assert n_active_params(model, _config()) == n_params(model)


def test_the_experts_of_dbrx_count_alike() -> None:
    from transformers import DbrxConfig, DbrxForCausalLM

    config = DbrxConfig(
        d_model=D, n_heads=2, n_layers=LAYERS, vocab_size=VOCAB, attn_config={'kv_n_heads': 1, 'rope_theta': 1e4},
        ffn_config={'ffn_hidden_size': 8, 'moe_num_experts': 4, 'moe_top_k': 1},
    )  # fmt: skip
    model = DbrxForCausalLM(config)
    assert n_params(model) - n_active_params(model, config) == LAYERS * 3 * (3 * D * 8)


def test_block_overrides_give_zero_and_say_so() -> None:
    with pytest.warns(UserWarning, match='FLOPs are not counted for models with block_overrides: 0 is reported, so there is no MFU'):
        assert flops_per_sequence(_Model(True), _config(block_overrides={'order': []}), SEQ) == 0
