"""The mixture of experts against a loop over tokens that follows the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfoundry.models.layers.dmoe import dMoE
from llmfoundry.models.layers.layer_builders import build_ffn
from llmfoundry.models.layers.moe import LearnedRouter

H, FFN = 8, 12
MOE = {
    'moe_num_experts': 4,
    'moe_top_k': 2,
    'mlp_type': 'glu',
    'moe_jitter_eps': None,
    'moe_normalize_expert_weights': None,
    'uniform_expert_assignment': False,
}


def _one_token(moe: dMoE, x: torch.Tensor, mlp_type: str, top_k: int, norm_p: float | None) -> torch.Tensor:
    """The definition for one token (H,), from the raw weights."""
    scores = torch.exp(moe.router.layer.weight @ x)
    scores = scores / scores.sum()
    chosen = sorted(range(len(scores)), key=lambda e: -scores[e])[:top_k]
    weights = [scores[e] for e in chosen]
    if norm_p:
        total = sum(w**norm_p for w in weights) ** (1 / norm_p)
        weights = [w / total for w in weights]
    mlp, out = moe.experts.mlp, torch.zeros_like(x)
    for expert, weight in zip(chosen, weights, strict=True):
        rows = slice(expert * FFN, (expert + 1) * FFN)
        hidden = F.gelu(mlp.w1[rows] @ x)
        if mlp_type == 'glu':
            hidden = hidden * (mlp.v1[rows] @ x)
        out = out + weight * (hidden @ mlp.w2[rows])
    return out if moe.experts.bias is None else out + moe.experts.bias


@settings(max_examples=30, deadline=None)
@given(
    mlp_type=st.sampled_from(['mlp', 'glu']),
    n_experts=st.integers(1, 5),
    data=st.data(),
    norm_p=st.sampled_from([None, 1, 2.0, 3]),
    bias=st.booleans(),
    n_tokens=st.integers(1, 7),
)
def test_equals_the_loop_over_tokens(mlp_type: str, n_experts: int, data: st.DataObject, norm_p: float | None, bias: bool, n_tokens: int) -> None:
    top_k = data.draw(st.integers(1, n_experts))
    torch.manual_seed(n_tokens + 10 * n_experts)
    moe = dMoE(H, FFN, n_experts, top_k, mlp_type, moe_normalize_expert_weights=norm_p, bias=bias).double()
    if bias:
        torch.nn.init.normal_(moe.experts.bias)
    x = torch.randn(2, n_tokens, H, dtype=torch.float64)
    expected = torch.stack([_one_token(moe, token, mlp_type, top_k, norm_p) for token in x.view(-1, H)]).view_as(x)
    torch.testing.assert_close(moe(x), expected)

    grads = torch.autograd.grad(moe(x).square().sum(), list(moe.parameters()), allow_unused=True)
    loop = torch.stack([_one_token(moe, token, mlp_type, top_k, norm_p) for token in x.view(-1, H)])
    expected_grads = torch.autograd.grad(loop.square().sum(), list(moe.parameters()), allow_unused=True)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_jitter_only_in_training_and_within_its_bounds() -> None:
    torch.manual_seed(0)
    moe = dMoE(H, FFN, 4, 2, 'mlp', moe_jitter_eps=0.3)
    x = torch.ones(1, 50, H)
    moe.eval()
    assert torch.equal(moe(x), moe(x))
    moe.train()
    seen: list[torch.Tensor] = []
    moe.router.layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    first, second = moe(x), moe(x)
    assert not torch.equal(first, second)
    assert all(0.7 <= t.min() < 0.72 and 1.28 < t.max() <= 1.3 for t in seen)


def test_uniform_assignment_takes_experts_in_turn() -> None:
    router = LearnedRouter(H, 3, 2, None, None, True)
    _, _, experts = router(torch.randn(6, H))
    assert experts.tolist() == [[0, 1], [2, 0], [1, 2], [0, 1], [2, 0], [1, 2]]
    assert torch.bincount(experts.flatten()).tolist() == [4, 4, 4]


def test_router_returns_all_probabilities() -> None:
    torch.manual_seed(0)
    scores, weights, experts = LearnedRouter(H, 5, 3, None, 1, False)(torch.randn(2, 4, H))
    assert scores.shape == (8, 5) and weights.shape == experts.shape == (8, 3)
    torch.testing.assert_close(scores.sum(-1), torch.ones(8))
    torch.testing.assert_close(weights.sum(-1), torch.ones(8))
    assert experts.dtype == torch.int64


def test_an_idle_expert_gets_a_zero_gradient_and_no_error() -> None:
    moe = dMoE(H, FFN, 8, 1, 'mlp')
    moe(torch.randn(1, 1, H)).sum().backward()
    used = moe.experts.mlp.w1.grad.view(8, FFN, H).abs().sum((1, 2)) > 0
    assert used.sum() == 1


def test_parameter_names_are_those_of_megablocks() -> None:
    shapes = {name: tuple(param.shape) for name, param in build_ffn('torch_dmoe', H, 1.5, 'cpu', True, MOE).named_parameters()}
    assert shapes == {
        'router.layer.weight': (4, H),
        'experts.bias': (H,),
        'experts.mlp.w1': (4 * FFN, H),
        'experts.mlp.v1': (4 * FFN, H),
        'experts.mlp.w2': (4 * FFN, H),
    }


@pytest.mark.parametrize('missing', sorted(MOE))
def test_every_key_is_needed(missing: str) -> None:
    with pytest.raises(KeyError, match=f'missing: {missing}'):
        build_ffn('torch_dmoe', H, 1, 'cpu', True, {key: value for key, value in MOE.items() if key != missing})


@pytest.mark.parametrize(
    ('override', 'text'),
    [
        ({'moe_jiter_eps': 0.1}, 'ffn_config of torch_dmoe has unknown keys: moe_jiter_eps. Allowed: ffn_hidden_size, ffn_act_fn, moe_num_experts, moe_top_k, '
         'mlp_type, moe_jitter_eps, moe_normalize_expert_weights, uniform_expert_assignment'),
        ({'mlp_type': 'swiglu'}, "ffn_config.mlp_type must be one of mlp, glu, got 'swiglu'"),
        ({'moe_top_k': 5}, 'ffn_config.moe_top_k must lie in 1..moe_num_experts=4, got 5'),
    ],
)  # fmt: skip
def test_wrong_keys(override: dict, text: str) -> None:
    with pytest.raises(ValueError) as error:
        build_ffn('torch_dmoe', H, 1, 'cpu', True, {**MOE, **override})
    assert str(error.value) == text


def test_under_autocast_it_computes_in_bfloat16() -> None:
    torch.manual_seed(0)
    moe, x = dMoE(H, FFN, 4, 2, 'glu'), torch.randn(2, 5, H)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = moe(x)
    torch.testing.assert_close(y.float(), moe(x), atol=3e-2, rtol=3e-2)
