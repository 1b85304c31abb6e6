"""Cached generation equals full forwards: greedy ids and logits, for every attention class and kind of position, with and without left padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.helpers.tiny_mpt import ATTENTION_CLASSES, POSITIONS, tiny_mpt

PROMPT, NEW = 11, 9
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {**POSITIONS[name], **ATTENTION_CLASSES[kind]} for name in POSITIONS for kind in ('gqa',)},
    **{kind: {**POSITIONS['alibi'], **ATTENTION_CLASSES[kind]} for kind in ATTENTION_CLASSES},
    'unfused': {'rope': True, 'fused_qkv': False},
    'qk_ln': {'rope': True, 'qk_ln': True},
    'qk_gn_clip': {'rope': True, 'qk_gn': True, 'clip_qkv': 0.5, **ATTENTION_CLASSES['gqa']},
    'window': {'rope': True, 'sliding_window_size': 4},
    'window_alibi': {'alibi': True, 'sliding_window_size': 4},
    'softcap': {'rope': True, 'attn_logit_softcapping': 0.5},
    'temperature': {'rope': True, 'attn_temperature_tuning': {'floor_scale': 4, 'attn_scale': 0.5}},
}


def prompts(n_left_pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, 101, (2, PROMPT), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if n_left_pad:
        ids[0, :n_left_pad], mask[0, :n_left_pad] = 0, 0
    return ids, mask


def greedy_by_full_forwards(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Greedy ids of one unpadded row without any cache, and the logits of each step."""
    steps = []
    for _ in range(NEW):
        steps.append(model(ids, use_cache=False).logits[:, -1])
        ids = torch.cat([ids, steps[-1].argmax(-1, keepdim=True)], dim=1)
    return ids, steps


@pytest.mark.parametrize('attn_impl', ['torch', 'flash'])
@pytest.mark.parametrize('variant', VARIANTS)
@torch.no_grad()
def test_generate_equals_full_forward_of_each_row(variant: str, attn_impl: str) -> None:
    model = tiny_mpt({**VARIANTS[variant], 'attn_impl': attn_impl})
    ids, mask = prompts(n_left_pad=4)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    for row in range(2):
        alone, steps = greedy_by_full_forwards(model, ids[row][mask[row].bool()][None])
        assert out.sequences[row, PROMPT:].tolist() == alone[0, -NEW:].tolist()
        for step, logits in enumerate(steps):
            torch.testing.assert_close(out.logits[step][row], logits[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize('attn_impl', ['torch', 'flash'])
@pytest.mark.parametrize('kind', ATTENTION_CLASSES)
@pytest.mark.parametrize('chunk', [1, 3])
@torch.no_grad()
def test_tuple_cache_layout_and_logits(kind: str, attn_impl: str, chunk: int) -> None:
    """Without a Cache object the model returns one tuple per layer, in the layout of the implementation; new tokens may come one or several at a time."""
    model = tiny_mpt({'alibi': True, **ATTENTION_CLASSES[kind], 'attn_impl': attn_impl})
    n_kv_heads = {'mha': 4, 'mqa': 1, 'gqa': 2}[kind]
    ids = prompts(0)[0]
    full = model(ids).logits
    past, seen = None, []
    for start in range(0, PROMPT, chunk):
        out = model(ids[:, start : start + chunk], past_key_values=past, use_cache=True)
        past = out.past_key_values
        seen.append(out.logits)
    torch.testing.assert_close(torch.cat(seen, 1), full, atol=1e-5, rtol=0)
    shapes = {'torch': [(2, n_kv_heads, 8, PROMPT), (2, n_kv_heads, PROMPT, 8)], 'flash': [(2, PROMPT, n_kv_heads * 8)] * 2}[attn_impl]
    assert len(past) == 2 and [tuple(t.shape) for t in past[1]] == shapes


@torch.no_grad()
def test_cache_object_and_tuple_agree() -> None:
    model = tiny_mpt({'rope': True, 'attn_impl': 'torch'})
    ids = prompts(0)[0]
    cache = DynamicCache()
    model(ids[:, :7], past_key_values=cache, use_cache=True)
    by_object = model(ids[:, 7:], past_key_values=cache, use_cache=True)
    assert by_object.past_key_values is cache and cache.get_seq_length() == PROMPT
    by_tuple = model(ids[:, 7:], past_key_values=model(ids[:, :7], use_cache=True).past_key_values, use_cache=True)
    torch.testing.assert_close(by_object.logits, by_tuple.logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize('attn_impl', ['torch', 'flash'])
@torch.no_grad()
def test_beam_search_equals_search_without_cache(attn_impl: str) -> None:
    model = tiny_mpt({'alibi': True, 'attn_impl': attn_impl})
    ids, mask = prompts(n_left_pad=3)
    kwargs = {'attention_mask': mask, 'max_new_tokens': 6, 'num_beams': 3, 'do_sample': False, 'pad_token_id': 0}
    assert model.generate(ids, use_cache=True, **kwargs).tolist() == model.generate(ids, use_cache=False, **kwargs).tolist()


@torch.no_grad()
def test_reorder_cache_moves_rows_of_every_layer() -> None:
    model = tiny_mpt({'alibi': True, 'attn_impl': 'torch'})
    past = model(prompts(0)[0], use_cache=True).past_key_values
    swapped = model._reorder_cache(past, torch.tensor([1, 0]))
    assert all(torch.equal(new[[1, 0]], old) for a, b in zip(swapped, past, strict=True) for new, old in zip(a, b, strict=True))


@torch.no_grad()
def test_generation_from_embeddings() -> None:
    model = tiny_mpt({'rope': True})
    ids = prompts(0)[0]
    kwargs = {'max_new_tokens': 5, 'do_sample': False, 'pad_token_id': 0}
    from_ids = model.generate(ids, **kwargs)[:, PROMPT:]
    from_embeddings = model.generate(inputs_embeds=model.transformer.wte(ids), **kwargs)
    assert from_embeddings.tolist() == from_ids.tolist()


def test_right_padding_is_refused() -> None:
    model = tiny_mpt()
    ids, mask = prompts(0)
    mask[0, -1] = 0
    with pytest.raises(NotImplementedError) as e:
        model.generate(ids, attention_mask=mask, max_new_tokens=2, pad_token_id=0)
    assert (
        str(e.value)
        == "MPT generates with padding on the left only: attention_mask is 0 at the last token of a row; set tokenizer.padding_side = 'left'"
    )


@torch.no_grad()
def test_reorder_cache_reorders_cache_objects_in_place() -> None:
    model = tiny_mpt({'alibi': True})
    cache = DynamicCache()
    ids = prompts(0)[0]
    model(ids[:, :-1], past_key_values=cache, use_cache=True)
    assert model._reorder_cache(cache, torch.tensor([1, 0])) is cache
    got = model(ids[[1, 0], -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(got, model(ids[[1, 0]]).logits[:, -1], atol=1e-5, rtol=0)
