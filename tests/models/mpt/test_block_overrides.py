"""``block_overrides``: expansion into layers, its errors, and reuse of keys and values against a hand-made oracle."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from llmfoundry.models.mpt.block_overrides import expand_order, resolve_block_overrides
from llmfoundry.models.mpt.configuration_mpt import attn_config_defaults
from tests.helpers.tiny_mpt import ATTENTION_CLASSES, tiny_config, tiny_mpt

OVERRIDES: dict[str, Any] = {
    'window': {'attn_config': {'sliding_window_size': 3}},
    'reuse': {'attn_config': {'reuse_kv_layer_idx': -1}},
    'reuse_x': {'attn_config': {'reuse_kv_x_layer_idx': -1}},
    'nope': {'attn_config': {'nope': True}},
    'warm': {'attn_config': {'attn_temperature_tuning': {'attn_scale': 0.5}}},
}


def overrides(*names: str) -> dict[str, Any]:
    return {'order': [{'name': name} for name in names], 'overrides': {n: OVERRIDES[n] for n in names if n != 'default'}}


def test_nested_order_expands() -> None:
    order = [{'name': 'default'}, {'order': [{'name': 'a', 'repeat': 2}, {'order': [{'name': 'b'}]}], 'repeat': 2}, {'name': 'default'}]
    assert expand_order(order, {'a': {}, 'b': {}}) == ['default', 'a', 'a', 'b', 'a', 'a', 'b', 'default']


def test_layers_are_merged_and_reuse_chains_resolve() -> None:
    layers = resolve_block_overrides({**overrides('default', 'reuse'), 'repeat': 2}, 4, attn_config_defaults)
    assert [layer.get('reuse_kv_layer_idx') for layer in layers] == [None, 0, None, 2]
    layers = resolve_block_overrides(overrides('default', 'window', 'reuse', 'reuse', 'warm'), 5, attn_config_defaults)
    assert [layer.get('reuse_kv_layer_idx') for layer in layers] == [None, None, 1, 1, None]
    assert [layer['sliding_window_size'] for layer in layers] == [-1, 3, -1, -1, -1]
    assert layers[4]['attn_temperature_tuning'] == {'floor_scale': 8192, 'attn_scale': 0.5}
    assert attn_config_defaults['attn_temperature_tuning']['attn_scale'] == 0.0


ERRORS: list[tuple[Any, type[Exception], str]] = [
    ({'order': []}, ValueError, 'block_overrides must have the keys order and overrides, missing: overrides'),
    (
        {'order': [{'name': 'default'}], 'overrides': {'default': {}}},
        ValueError,
        'block_overrides.overrides: default names the layers without overrides and cannot be overridden; choose another name',
    ),
    (
        {'order': [{'name': 'default', 'order': []}], 'overrides': {}},
        ValueError,
        "block_overrides.order[0]: each item must have exactly one of the keys name and order, got {'name': 'default', 'order': []}",
    ),
    (
        {'order': [{'repeat': 2}], 'overrides': {}},
        ValueError,
        "block_overrides.order[0]: each item must have exactly one of the keys name and order, got {'repeat': 2}",
    ),
    (
        {'order': [{'order': [{'name': 'x'}]}], 'overrides': {'y': {}}},
        ValueError,
        "block_overrides.order[0].order[0].name: 'x' is not among block_overrides.overrides; known names: default, y",
    ),
    (
        {'order': [{'name': 'default', 'repeat': 0}], 'overrides': {}},
        ValueError,
        'block_overrides.order[0].repeat must be an integer of at least 1, got 0',
    ),
    ({**overrides('default'), 'repeat': 3}, ValueError, 'block_overrides.order describes 3 layers but n_layers is 2; they must be equal'),
    (
        {**overrides('default', 'default'), 'overrides': {'a': {'attn_config': {'qk_ln': True}}}},
        KeyError,
        'block_overrides.overrides.a.attn_config.qk_ln cannot differ between layers; allowed keys: '
        'sliding_window_size, reuse_kv_layer_idx, reuse_kv_x_layer_idx, attn_temperature_tuning, nope',
    ),
    (
        {**overrides('default', 'default'), 'overrides': {'a': {'ffn_config': {}}}},
        KeyError,
        "block_overrides.overrides.a: ['ffn_config'] cannot differ between layers; only attn_config can",
    ),
    (
        {**overrides('default', 'default'), 'overrides': {'a': {'attn_config': {'sliding_window_size': 'big'}}}},
        ValueError,
        "block_overrides.overrides.a.attn_config.sliding_window_size must be of type int as in attn_config, got 'big'",
    ),
    (
        {**overrides('default', 'default'), 'overrides': {'a': {'attn_config': {'attn_temperature_tuning': 3}}}},
        ValueError,
        'block_overrides.overrides.a.attn_config.attn_temperature_tuning must be a dict, got 3',
    ),
    (
        {'order': [{'name': 'default'}, {'name': 'a'}], 'overrides': {'a': {'attn_config': {'reuse_kv_layer_idx': 0}}}},
        ValueError,
        'layer 1: reuse_kv_layer_idx is relative to the layer and must be a negative integer, got 0',
    ),
    (overrides('reuse', 'default'), ValueError, 'layer 0: reuse_kv_layer_idx -1 points to layer -1; the first layer is 0'),
    (
        {'order': [{'name': 'default'}, {'name': 'a'}], 'overrides': {'a': {'attn_config': {'reuse_kv_layer_idx': -1, 'reuse_kv_x_layer_idx': -1}}}},
        ValueError,
        'layer 1: only one of reuse_kv_layer_idx and reuse_kv_x_layer_idx can be given',
    ),
    (
        overrides('default', 'reuse_x'),
        ValueError,
        'layer 1: reuse_kv_x_layer_idx needs attn_config.fused_qkv: false, since queries and keys come from different inputs',
    ),
    (
        overrides('default', 'nope'),
        ValueError,
        'block_overrides sets nope, but learned_pos_emb is true and adds positions to every layer; set learned_pos_emb: false',
    ),
]


@pytest.mark.parametrize(('value', 'error', 'text'), ERRORS)
def test_errors(value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as e:
        tiny_config(block_overrides=value)
    assert e.value.args[0] == text


def test_nope_with_alibi_under_torch() -> None:
    with pytest.raises(ValueError) as e:
        tiny_config({'alibi': True, 'attn_impl': 'torch'}, block_overrides=overrides('default', 'nope'))
    assert (
        str(e.value)
        == 'block_overrides sets nope with alibi under attn_impl torch, where all layers share one bias; set attn_config.attn_impl: flash'
    )
    assert tiny_config({'alibi': True}, block_overrides=overrides('default', 'nope')).layer_attn_configs[1]['nope']


def run_by_hand(model: Any, ids: torch.Tensor, kv_layer: list[int], is_x: bool) -> torch.Tensor:
    """The model written out, one layer after the other, with keys and values recomputed from scratch from the layer in ``kv_layer``."""
    transformer = model.transformer
    x = transformer.wte(ids)
    normed, key_values = [], []
    for i, block in enumerate(transformer.blocks):
        attn = block.attn
        h = block.norm_1(x)
        normed.append(h)
        source = attn if is_x else transformer.blocks[kv_layer[i]].attn
        key_values.append((source.Wk(normed[kv_layer[i]]), source.Wv(normed[kv_layer[i]])))
        q, (k, v) = attn.Wq(h), key_values[i]
        q, k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in (q, k, v))
        k, v = (t.repeat_interleave(4 // t.shape[1], 1) for t in (k, v))
        distance = torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])
        slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]).view(1, 4, 1, 1)
        scores = q @ k.transpose(-1, -2) / 8**0.5 - slopes * distance
        context = scores.masked_fill(distance < 0, float('-inf')).softmax(-1) @ v
        x = x + attn.out_proj(context.transpose(1, 2).flatten(2))
        x = x + block.ffn(block.norm_2(x))
    return transformer.norm_f(x) @ transformer.wte.weight.T


@pytest.mark.parametrize('attn_impl', ['torch', 'flash'])
@pytest.mark.parametrize('kind', ATTENTION_CLASSES)
@pytest.mark.parametrize('is_x', [False, True])
def test_reuse_equals_a_model_written_out(attn_impl: str, kind: str, is_x: bool) -> None:
    name = 'reuse_x' if is_x else 'reuse'
    attn_config = {'alibi': True, 'fused_qkv': False, 'attn_impl': attn_impl, **ATTENTION_CLASSES[kind]}
    model = tiny_mpt(attn_config, n_layers=4, block_overrides=overrides('default', 'default', name, name))
    assert [hasattr(block.attn, 'Wk') for block in model.transformer.blocks] == [True, True, is_x, is_x]
    ids = torch.randint(0, 101, (2, 10), generator=torch.Generator().manual_seed(1))
    logits = model(ids).logits
    torch.testing.assert_close(logits, run_by_hand(model, ids, [0, 1, 1, 1], is_x), atol=1e-5, rtol=0)
    logits.square().sum().backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    run_by_hand(model, ids, [0, 1, 1, 1], is_x).square().sum().backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(got[n], p.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('attn_impl', ['torch', 'flash'])
@torch.no_grad()
def test_reuse_generates_like_full_forwards(attn_impl: str) -> None:
    model = tiny_mpt({'rope': True, 'attn_impl': attn_impl}, n_layers=4, block_overrides=overrides('default', 'window', 'reuse', 'nope'))
    assert isinstance(model.transformer.blocks[2].attn.Wq, torch.nn.Linear)
    ids = torch.randint(0, 101, (1, 6), generator=torch.Generator().manual_seed(1))
    for kwargs in ({}, {'num_beams': 2}):
        cached = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, **kwargs)
        assert cached.tolist() == model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=False, **kwargs).tolist()
    past = model(ids[:, :4], use_cache=True).past_key_values
    assert past[2] == ()
    torch.testing.assert_close(model(ids[:, 4:], past_key_values=past).logits, model(ids).logits[:, 4:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_each_override_changes_the_output() -> None:
    ids = torch.randint(0, 101, (1, 12), generator=torch.Generator().manual_seed(1))
    base = tiny_mpt({'rope': True, 'attn_temperature_tuning': {'floor_scale': 2, 'attn_scale': 0.0}})
    want = base(ids).logits
    for name in ('window', 'nope', 'warm'):
        config = copy.deepcopy(base.config)
        model = tiny_mpt(config.attn_config, block_overrides=overrides('default', name))
        model.load_state_dict(base.state_dict())
        assert (model(ids).logits - want).abs().max() > 1e-3, name


@pytest.mark.parametrize('positions', [{'alibi': True}, {'rope': True}])
@torch.no_grad()
def test_a_nope_layer_does_not_see_the_order_of_earlier_tokens(positions: dict[str, Any]) -> None:
    ids = torch.randint(0, 101, (1, 12), generator=torch.Generator().manual_seed(1))
    shuffled = ids[:, [*torch.randperm(11, generator=torch.Generator().manual_seed(2)).tolist(), 11]]
    nope, plain = (tiny_mpt(positions, n_layers=1, block_overrides=overrides(name)) for name in ('nope', 'default'))
    torch.testing.assert_close(nope(shuffled).logits[:, -1], nope(ids).logits[:, -1], atol=1e-5, rtol=0)
    assert (plain(shuffled).logits[:, -1] - plain(ids).logits[:, -1]).abs().max() > 1e-3
