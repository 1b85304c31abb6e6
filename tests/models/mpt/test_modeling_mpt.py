"""MPTForCausalLM and MPTModel: parameter names, loss, options, initialisation, and every error with its text."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmfoundry.models.layers.attention import GroupedQueryAttention, MultiheadAttention
from llmfoundry.models.mpt import modeling_mpt
from llmfoundry.models.mpt.modeling_mpt import MPTForCausalLM, shift_labels
from tests.helpers.tiny_mpt import tiny_config, tiny_mpt

GOLDEN = Path(__file__).parent / 'parameter_names.txt'
MODELS: dict[str, dict[str, Any]] = {
    'mpt-7b style: alibi, no bias': {'attn_config': {'alibi': True}, 'no_bias': True},
    'learned positions with biases': {},
    'llama style: rope, gqa, glu, rmsnorm, untied': {
        'attn_config': {'rope': True, 'attn_type': 'grouped_query_attention', 'kv_n_heads': 2},
        'ffn_config': {'ffn_type': 'mptglu', 'ffn_hidden_size': 48},
        'norm_type': 'rmsnorm',
        'no_bias': True,
        'tie_word_embeddings': False,
    },
    'qk_ln, multi-query': {'attn_config': {'alibi': True, 'qk_ln': True, 'attn_type': 'multiquery_attention'}},
    'qk_gn, unfused': {'attn_config': {'rope': True, 'qk_gn': True, 'fused_qkv': False}},
    'attention_bias without other biases': {'attn_config': {'alibi': True}, 'no_bias': True, 'attention_bias': True},
    'head_dim': {'attn_config': {'rope': True}, 'head_dim': 16, 'no_bias': True},
}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 101, (2, 20), generator=torch.Generator().manual_seed(1))


def test_parameter_names_are_those_of_released_checkpoints() -> None:
    lines = []
    for title, kwargs in MODELS.items():
        lines.append(f'# {title}')
        lines += [f'{name} {tuple(p.shape)}' for name, p in tiny_mpt(**kwargs, n_layers=1).named_parameters()]
    assert '\n'.join(lines) + '\n' == GOLDEN.read_text(encoding='utf-8')


@pytest.mark.parametrize('title', MODELS)
def test_trains_and_every_parameter_gets_a_gradient(title: str, ids: torch.Tensor) -> None:
    model = tiny_mpt(**MODELS[title]).train()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_loss_is_the_mean_over_shifted_labels(ids: torch.Tensor) -> None:
    model = tiny_mpt()
    labels = ids.masked_fill(ids % 3 == 0, -100)
    out = model(ids, labels=labels)
    targets = labels[:, 1:].flatten()
    rows = F.log_softmax(out.logits[:, :-1].flatten(0, 1), -1)
    picked = [-rows[i, t].item() for i, t in enumerate(targets.tolist()) if t != -100]
    assert out.loss.item() == pytest.approx(sum(picked) / len(picked), rel=1e-6)
    assert shift_labels(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, -100]]


@pytest.mark.parametrize('tied', [True, False])
def test_loss_fn_gets_hidden_states_and_makes_no_logits(ids: torch.Tensor, tied: bool) -> None:
    model = tiny_mpt(tie_word_embeddings=tied, logit_scale=0.5, final_logit_softcapping=3.0)
    seen: dict[str, Any] = {}

    def loss_fn(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, logit_scale: float, softcap: float) -> str:
        seen.update(hidden=hidden, weight=weight, targets=targets, logit_scale=logit_scale, softcap=softcap)
        return 'the loss'

    out = model(ids, labels=ids, loss_fn=loss_fn)
    assert out.loss == 'the loss' and out.logits is None
    assert seen['weight'] is (model.transformer.wte.weight if tied else model.lm_head.weight)
    assert torch.equal(seen['targets'], shift_labels(ids)) and (seen['logit_scale'], seen['softcap']) == (0.5, 3.0)
    by_hand = 3.0 * torch.tanh(0.5 * seen['hidden'] @ seen['weight'].T / 3.0)
    torch.testing.assert_close(by_hand, model(ids).logits)
    assert model(ids, loss_fn=loss_fn).logits is not None


def test_logit_options(ids: torch.Tensor) -> None:
    base = tiny_mpt()(ids).logits
    torch.testing.assert_close(tiny_mpt(logit_scale='inv_sqrt_d_model')(ids).logits, base / 32**0.5)
    torch.testing.assert_close(tiny_mpt(final_logit_softcapping=2.0)(ids).logits, 2 * torch.tanh(base / 2))
    torch.testing.assert_close(tiny_mpt()(ids, logits_to_keep=3).logits, base[:, -3:])
    with pytest.warns(UserWarning, match='logit_scale is 0'):
        assert not tiny_mpt(logit_scale=0)(ids).logits.any()


def test_embedding_fraction_shrinks_the_gradient_and_not_the_value(ids: torch.Tensor) -> None:
    grads = {}
    for fraction in (1.0, 0.25):
        model = tiny_mpt(embedding_fraction=fraction, tie_word_embeddings=False)
        out = model(ids, labels=ids)
        out.loss.backward()
        grads[fraction] = (out.loss.detach(), model.transformer.wte.weight.grad, model.lm_head.weight.grad)
    assert grads[1.0][0] == pytest.approx(grads[0.25][0].item(), rel=1e-6)
    torch.testing.assert_close(grads[0.25][1], grads[1.0][1] * 0.25)
    torch.testing.assert_close(grads[0.25][2], grads[1.0][2], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize('key', ['resid_pdrop', 'emb_pdrop', 'attn_pdrop'])
def test_dropout_acts_in_training_only(key: str, ids: torch.Tensor) -> None:
    kwargs: dict[str, Any] = {'attn_config': {key: 0.5}} if key == 'attn_pdrop' else {key: 0.5}
    model = tiny_mpt(**kwargs)
    torch.testing.assert_close(model(ids).logits, tiny_mpt()(ids).logits, atol=1e-5, rtol=0)
    model.train()
    assert (model(ids).logits - model(ids).logits).abs().max() > 1e-3


def test_clip_qkv_and_softmax_scale_and_qk_ln_act(ids: torch.Tensor) -> None:
    base = tiny_mpt()(ids).logits
    for attn_config in ({'clip_qkv': 0.05}, {'softmax_scale': 3.0}):
        assert (tiny_mpt(attn_config)(ids).logits - base).abs().max() > 1e-3, attn_config
    attn = MultiheadAttention(32, 4, clip_qkv=0.1, norm_type='layernorm')
    query, key, value = attn._project(torch.randn(1, 5, 32) * 10, None)
    assert max(t.abs().max().item() for t in (query, key, value)) == pytest.approx(0.1)
    normed = MultiheadAttention(32, 4, qk_ln=True, norm_type='layernorm')._project(torch.randn(1, 5, 32) * 10, None)
    torch.testing.assert_close(normed[0].flatten(2).std(-1, unbiased=False), torch.ones(1, 5), atol=1e-3, rtol=0)
    per_head = MultiheadAttention(32, 4, qk_gn=True, norm_type='layernorm')._project(torch.randn(1, 5, 32) * 10, None)
    torch.testing.assert_close(per_head[1].std(-1, unbiased=False), torch.ones(1, 5, 4), atol=1e-3, rtol=0)


def test_cross_attention_sees_the_whole_other_sequence() -> None:
    attn = GroupedQueryAttention(32, 4, 2, kv_dim=12, fused_qkv=False)
    other = torch.randn(2, 7, 12)
    out, _, _, (key, _) = attn(torch.randn(2, 5, 32), key_value_states=other)
    assert out.shape == (2, 5, 32) and key.shape == (2, 2, 7, 8)
    moved, *_ = attn(torch.zeros(2, 5, 32), key_value_states=other)
    other[:, -1] -= 5
    # The first query, too, sees the last key.
    assert ((attn(torch.zeros(2, 5, 32), key_value_states=other)[0] - moved).abs().sum(-1) > 0).all()


def test_padding_tokens_skip_the_ffn(ids: torch.Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, -6:] = 0
    seen = []
    model = tiny_mpt(use_pad_tok_in_ffn=False)
    model.transformer.blocks[0].ffn.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    got, want = model(ids, attention_mask=mask).logits, tiny_mpt()(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=0)
    assert seen == [(34, 32)]


def test_right_padding_needs_no_bias_and_changes_nothing(ids: torch.Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    for attn_config in ({'alibi': True}, {'rope': True}, {}):
        model = tiny_mpt(attn_config)
        inputs = model.transformer._attention_inputs(model.transformer.wte(ids), 0, mask, None, None)
        assert inputs.mask.key_padding is None
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[1, :-4], model(ids[1:, :-4]).logits[0], atol=1e-5, rtol=0)


def test_hidden_states_and_attentions(ids: torch.Tensor) -> None:
    model = tiny_mpt({'attn_impl': 'torch', 'alibi': True, 'sliding_window_size': 4})
    out = model(ids, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    assert out.attentions[0].shape == (2, 4, 20, 20)
    torch.testing.assert_close(out.attentions[1].sum(-1), torch.ones(2, 4, 20))
    assert not out.attentions[0].triu(1).any() and not out.attentions[0].tril(-5).any()
    torch.testing.assert_close(out.logits, model(ids).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.transformer(ids).last_hidden_state, out.hidden_states[-1], atol=1e-5, rtol=0)


def test_meta_model_materialises_with_param_init_fn() -> None:
    kwargs: dict[str, Any] = {'attn_config': {'rope': True}, 'init_config': {'name': 'baseline_', 'init_std': 0.02}, 'tie_word_embeddings': False}
    meta = MPTForCausalLM(tiny_config(init_device='meta', **kwargs))
    assert all(p.is_meta for p in meta.parameters()) and not list(meta.buffers())
    meta.to_empty(device='cpu')
    torch.manual_seed(1)
    meta.apply(meta.param_init_fn)
    torch.manual_seed(1)
    cpu = MPTForCausalLM(tiny_config(**kwargs))
    assert cpu.transformer.blocks[0].attn.Wqkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert cpu.transformer.blocks[0].attn.out_proj.weight.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.1)
    for (name, a), b in zip(meta.named_parameters(), cpu.parameters(), strict=True):
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.15, abs=1e-6), name
    ids = torch.zeros(1, 4, dtype=torch.long)
    meta.load_state_dict(cpu.state_dict())
    assert torch.equal(meta(ids).logits, cpu(ids).logits)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('title', MODELS)
def test_save_and_load(title: str, tmp_path: Path, ids: torch.Tensor) -> None:
    model = tiny_mpt(**MODELS[title])
    model.save_pretrained(tmp_path)
    loaded, info = MPTForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_embeddings_can_grow(ids: torch.Tensor) -> None:
    for tied in (True, False):
        model = tiny_mpt(tie_word_embeddings=tied)
        want = model(ids).logits
        model.resize_token_embeddings(110, mean_resizing=False)
        got = model(ids).logits
        assert got.shape[-1] == 110 and model.config.vocab_size == 110
        torch.testing.assert_close(got[..., :101], want)


def test_activation_checkpointing_and_sharding_hooks() -> None:
    model = MPTForCausalLM(tiny_config(activation_checkpointing_target={'grouped_query_attention': 'first-1'}))
    blocks = model.transformer.blocks
    assert [model.activation_checkpointing_fn(b.attn) for b in blocks] == [True, False]
    assert not any(hasattr(m, '_fsdp_wrap') for m in tiny_mpt(tie_word_embeddings=False).modules())
    assert model.fsdp_wrap_fn(blocks[0]) is True and model.fsdp_wrap_fn(blocks[0].attn) is False


@pytest.mark.parametrize('target', [None, 'norm_attn_norm', ['grouped_query_attention', 'ffn']])
def test_recomputation_gives_the_same_gradients(ids: torch.Tensor, target: Any) -> None:
    """Blocks wrapped as the trainer wraps them, with reuse of keys between layers."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    overrides = {'order': [{'name': 'default'}, {'name': 'reuse'}], 'overrides': {'reuse': {'attn_config': {'reuse_kv_layer_idx': -1}}}}
    model = tiny_mpt({'alibi': True, 'attn_logit_softcapping': 2.0}, block_overrides=overrides, activation_checkpointing_target=target).train()
    calls: list[int] = []
    wrapped = copy.deepcopy(model)
    apply_activation_checkpointing(wrapped, check_fn=wrapped.activation_checkpointing_fn)
    for m, n_calls in ((model, 2), (wrapped, 4)):
        projections = [module for name, module in m.named_modules() if name.endswith(('.Wqkv', '.Wq'))]
        for projection in projections:
            projection.register_forward_hook(lambda *args: calls.append(1))
        m(ids, labels=ids).loss.backward()
        assert len(calls) == n_calls and len(projections) == 2
        calls.clear()
    for a, b in zip(model.parameters(), wrapped.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_composer_class_is_found_under_the_old_path() -> None:
    assert modeling_mpt.ComposerMPTCausalLM.__name__ == 'ComposerMPTCausalLM'
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = modeling_mpt.nothing


def errors() -> list[tuple[dict[str, Any], dict[str, Any], type[BaseException], str]]:
    ids = torch.zeros(2, 5, dtype=torch.long)
    embeds = torch.zeros(2, 5, 32)
    past = tuple((torch.zeros(2, 62, 32), torch.zeros(2, 62, 32)) for _ in range(2))
    return [
        ({}, {'input_ids': ids, 'inputs_embeds': embeds}, ValueError, 'give either input_ids or inputs_embeds, got both'),
        ({}, {}, ValueError, 'give either input_ids or inputs_embeds, got neither'),
        (
            {},
            {'input_ids': ids, 'return_dict': False},
            NotImplementedError,
            'return_dict is False, but MPT returns its outputs by name only; leave it out or set it to True',
        ),
        ({}, {'input_ids': ids, 'output_attentions': True}, NotImplementedError, "output_attentions needs attn_config.attn_impl: torch, got 'flash'"),
        (
            {},
            {'input_ids': ids, 'past_key_values': past[:1]},
            ValueError,
            'past_key_values must have one entry per layer, got 1 entries for n_layers 2',
        ),
        (
            {},
            {'input_ids': ids, 'past_key_values': past},
            ValueError,
            '62 cached and 5 new tokens exceed max_seq_len 64, beyond which there are no learned positions; shorten the input or generate fewer tokens',
        ),
        (
            {},
            {'input_ids': torch.zeros(1, 65, dtype=torch.long)},
            AssertionError,
            'the input has 65 tokens, but max_seq_len is 64; shorten it or raise max_seq_len',
        ),
        ({}, {'input_ids': ids, 'attention_mask': ids[:, :3]}, ValueError, 'attention_mask has length 3, but there are 5 tokens, 0 of them cached'),
    ]


@pytest.mark.parametrize(('config', 'kwargs', 'error', 'text'), errors())
def test_errors(config: dict[str, Any], kwargs: dict[str, Any], error: type[BaseException], text: str) -> None:
    with pytest.raises(error) as e:
        tiny_mpt(**config)(**kwargs)
    assert str(e.value) == text


def test_left_padding_in_training() -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    model = tiny_mpt()
    assert model(ids, attention_mask=mask).logits.isfinite().all()
    with pytest.raises(NotImplementedError) as e:
        model.train()(ids, attention_mask=mask)
    assert str(e.value) == 'MPT cannot be trained with padding on the left: attention_mask is 0 at the first token of a row; pad on the right'


def test_construction_errors() -> None:
    for attn_config, error, text in (
        ({'atn_pdrop': 0.1}, TypeError, "attn_config.atn_pdrop: unknown key (did you mean 'attn_pdrop'?)"),
        ({'zzz': 1}, TypeError, 'attn_config.zzz: unknown key'),
    ):
        with pytest.raises(error) as e:
            MPTForCausalLM(tiny_config(attn_config))
        assert str(e.value) == text
    with pytest.raises(ValueError) as e:
        GroupedQueryAttention(32, 4, 3)
    assert str(e.value) == 'attn_config.kv_n_heads must be between 1 and n_heads and divide n_heads, got kv_n_heads 3 and n_heads 4'
    attn = MultiheadAttention(32, 4, reuse_kv_layer_idx=0, layer_idx=1)
    with pytest.raises(ValueError) as e:
        attn(torch.zeros(1, 3, 32))
    assert str(e.value) == 'layer 1 reuses the keys and values of layer 0, but prev_layer_key_value was not given'
