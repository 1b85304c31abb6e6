"""Packed documents in transformers models: each gets the loss and gradients that it gets alone, by every route, and models that cannot do it say why."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmfoundry.errors import PackingNotSupportedError
from llmfoundry.models.cpu_autocast import wrap_forward
from llmfoundry.models.hf import document_attention, packing
from llmfoundry.models.hf.fsdp import find_decoder_layers
from llmfoundry.models.hf.packing import PackingRoute, attention_backend, choose_route, has_packed_rows, separate_documents
from tests.helpers.one_step import one_step
from tests.helpers.packed_documents import documents_of, gradients, packed_batch, packed_sums, separate_sums, tiny_model, total_of, worst_gradient

MODELS = ['llama', 'qwen2', 'qwen3', 'gpt_neox', 'mistral', 'gemma', 'gemma2', 'gemma3', 'gpt2', 'opt', 'phi', 'granite', 'cohere', 'mixtral', 'falcon', 'gpt_oss']
# Sliding windows shorter than the documents, in every model that has them.
CHANGES = {
    'gemma2': {'sliding_window': 3, 'attn_logit_softcapping': 2.0, 'layer_types': ['sliding_attention', 'full_attention']},
    'qwen2': {'use_sliding_window': True, 'sliding_window': 3, 'max_window_layers': 1},
    'mixtral': {'sliding_window': 3},
}
BACKENDS = ['sdpa', 'eager', 'sdpa as on cuda']


def build(folder: Path, architecture: str, backend: str = 'sdpa', **kwargs: Any) -> Any:
    try:
        model = tiny_model(folder, architecture, backend.split()[0], CHANGES.get(architecture), **kwargs)
    except ValueError as e:
        if 'does not support an attention implementation' not in str(e):
            raise
        pytest.skip(str(e)[:90])
    if 'cuda' in backend:
        model._packing_routes['cpu'] = choose_route(model.model, 'cuda')
    return model


def assert_packed_is_separate(model: Any, batch: dict[str, torch.Tensor]) -> None:
    alone = separate_sums(model, batch)
    for got, want in zip(packed_sums(model, batch), alone, strict=True):
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
    total = sum(alone)
    packed = total_of(model, batch)
    assert packed.item() == pytest.approx(total.item(), rel=1e-5)
    assert worst_gradient(gradients(model, packed), gradients(model, total)) < 1e-4
    blind = packed_sums(model, batch, with_ids=False)
    assert max(abs(leaky.item() / want.item() - 1) for leaky, want in zip(blind, alone, strict=True)) > 1e-2, 'the documents would not tell a leak'


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('architecture', MODELS)
def test_loss_and_gradients_are_those_of_separate_documents(architecture: str, backend: str, tmp_path: Path) -> None:
    model = build(tmp_path, architecture, backend)
    assert_packed_is_separate(model, packed_batch())
    kind = model._packing_routes['cpu'].kind
    assert kind == 'block_mask' if backend != 'sdpa' or architecture in ('opt', 'falcon') and kind != 'documents' else kind == 'documents'


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('architecture', ['llama', 'mistral', 'gpt2', 'gemma3'])
@pytest.mark.parametrize('broken', ['mask', 'positions', 'window'])
def test_each_part_is_needed(broken: str, architecture: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if broken == 'mask':
        monkeypatch.setattr(packing, '_mask_arguments', lambda *args: {})
    elif broken == 'positions':
        if architecture != 'gpt2':
            pytest.skip('rotary positions only enter as differences')
        monkeypatch.setattr(packing, 'positions_within_documents', lambda ids: torch.arange(ids.shape[1]).expand_as(ids))
    else:
        if architecture not in ('mistral', 'gemma3'):
            pytest.skip('no sliding window')
        monkeypatch.setattr(packing, '_window', lambda config: 99)
        monkeypatch.setattr(document_attention, '_window_mask', lambda size, window, device: torch.ones(size, size, dtype=torch.bool).tril()[None, None])
    with pytest.raises(AssertionError):
        assert_packed_is_separate(build(tmp_path, architecture, backend), packed_batch())


@pytest.mark.parametrize('backend', BACKENDS)
def test_documents_do_not_see_each_other_at_all(backend: str, tmp_path: Path) -> None:
    # Not within rounding: exactly.
    model, batch = build(tmp_path, 'llama', backend), packed_batch()
    before = packed_sums(model, batch)
    row, start, stop = documents_of(batch)[1]
    batch['input_ids'][row, :start] = 3
    batch['input_ids'][row, stop:] = 4
    assert packed_sums(model, batch)[1].item() == before[1].item() and packed_sums(model, batch)[0].item() != before[0].item()


@pytest.mark.parametrize('how', ['checkpoint_wrapper', 'transformers'])
@pytest.mark.parametrize('backend', ['sdpa', 'eager'])
@pytest.mark.parametrize('architecture', ['llama', 'gpt2', 'gemma2'])
def test_activation_checkpointing(architecture: str, backend: str, how: str, tmp_path: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model, batch = build(tmp_path, architecture, backend), packed_batch()
    want = gradients(model, sum(separate_sums(model, batch)))
    if how == 'transformers':
        model.model.gradient_checkpointing_enable({'use_reentrant': False})
    else:
        layers = set(find_decoder_layers(model.model))
        apply_activation_checkpointing(model.model, check_fn=lambda module: module in layers)
    got = gradients(model, total_of(model, batch))
    assert worst_gradient({name.replace('_checkpoint_wrapped_module.', ''): g for name, g in got.items()}, want) < 1e-4


def test_lora(tmp_path: Path) -> None:
    pytest.importorskip('peft')
    model = build(tmp_path, 'llama', peft_config={'r': 2, 'target_modules': ['q_proj', 'v_proj'], 'init_lora_weights': False})
    assert all('lora_' in name for name, p in model.named_parameters() if p.requires_grad)
    assert_packed_is_separate(model, packed_batch())
    assert model._packing_routes['cpu'].kind == 'documents' and model.model.base_model.model._fuse_head is True


def test_reduced_precision(tmp_path: Path) -> None:
    batch = packed_batch()
    exact = sum(separate_sums(build(tmp_path, 'llama'), batch)).item()
    for backend in BACKENDS:
        model = wrap_forward(build(tmp_path, 'llama', backend))
        packed, alone = total_of(model, batch), sum(separate_sums(model, batch))
        assert packed.item() != exact and packed.item() == pytest.approx(exact, rel=1e-2)
        assert packed.item() == pytest.approx(alone.item(), rel=2e-3)
        assert worst_gradient(gradients(model, packed), gradients(model, alone)) < 0.2


def test_evaluation_with_and_without_logits(tmp_path: Path) -> None:
    model, batch = build(tmp_path, 'gpt2').eval(), packed_batch()
    with torch.no_grad():
        total = sum(separate_sums(model, batch)).item()
        assert model.eval_forward(batch)['loss'].loss_sum.item() == pytest.approx(total, rel=1e-5)
        logits = model._logits(batch)
    assert torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch['labels'][:, 1:].flatten(), reduction='sum').item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize('microbatch', [1, 3])
def test_a_step_of_the_trainer(microbatch: int, tmp_path: Path) -> None:
    model, batch = build(tmp_path, 'gpt2'), packed_batch()
    total, count = sum(separate_sums(model, batch)), (batch['labels'] != -100).sum().item()
    want = gradients(model, total / count)
    found = one_step(copy.deepcopy(model), [{key: value[row] for key, value in batch.items()} for row in range(3)], microbatch)
    assert found['loss'] == pytest.approx(total.item() / count, rel=1e-5)
    assert worst_gradient(found['gradients'], want) < 1e-4
    assert found['metrics']['LanguageCrossEntropy'] == pytest.approx(total.item() / count, rel=1e-5)


def test_one_document_per_row_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, 'choose_route', lambda *args: pytest.fail('nothing is packed'))
    model, batch = build(tmp_path, 'llama'), packed_batch(((7,), (20,), (2,)))
    inputs = {key: value for key, value in batch.items() if key != 'sequence_id'}
    # Streams with a token at the beginning of documents count from 1.
    for ids in (batch['sequence_id'], batch['sequence_id'] + 1):
        unchanged = separate_documents(model.model, inputs, ids, {})
        assert set(unchanged) == set(inputs) and all(unchanged[key] is value for key, value in inputs.items())
    monkeypatch.setattr(packing, 'has_packed_rows', lambda ids: pytest.fail('one look is enough'))
    assert total_of(model, batch).item() == total_of(model, inputs).item() and attention_backend(model.model) == 'sdpa'
    assert model.config._attn_implementation == 'sdpa'


@pytest.mark.parametrize(
    ('rows', 'packed'),
    [
        ([[0, 0, 0]], False), ([[0, 0, -1]], False), ([[-1, 0, 0]], False), ([[-1, -1, -1]], False), ([[5, 5, -1], [0, 0, 0]], False), ([[0, 1, -1]], True), ([[0, 0, 0], [2, 2, 3]], True),
        ([[0, -1, 1]], True),
    ],
)
def test_has_packed_rows(rows: list[list[int]], packed: bool) -> None:
    assert has_packed_rows(torch.tensor(rows)) is packed


@pytest.mark.parametrize('backend', BACKENDS)
def test_ids_at_padding_may_be_anything(backend: str, tmp_path: Path) -> None:
    # Loaders of others give ids at padding too, and pad on the left; the attention mask says what is padding.
    model, batch = build(tmp_path, 'gpt2', backend), packed_batch()
    want = total_of(model, batch).item()
    left = {key: torch.stack([value[0].roll(4), *value[1:]]) for key, value in batch.items()}
    left['sequence_id'] = left['sequence_id'].clamp(min=0)
    assert total_of(model, left).item() == pytest.approx(want, rel=1e-5)
    assert 'attention_mask' not in separate_documents(model.model, {'input_ids': batch['input_ids']}, torch.zeros_like(batch['input_ids']), {})


def test_unpacked_batches_after_packed_ones_generation_and_saved_configs(tmp_path: Path) -> None:
    model, batch = build(tmp_path, 'llama'), packed_batch()
    plain = {key: value for key, value in batch.items() if key != 'sequence_id'}
    before, prompt = total_of(model, plain).item(), torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]])
    kwargs = {'attention_mask': torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]), 'max_new_tokens': 4, 'do_sample': False, 'pad_token_id': 0}
    tokens = model.generate(prompt, **kwargs)
    total_of(model, batch)
    assert model.config._attn_implementation == document_attention.IMPLEMENTATION and attention_backend(model.model) == 'sdpa'
    assert total_of(model, plain).item() == before and torch.equal(model.generate(prompt, **kwargs), tokens)
    model.model.save_pretrained(tmp_path / 'saved')
    assert document_attention.IMPLEMENTATION not in (tmp_path / 'saved' / 'config.json').read_text() + json.dumps(model.get_metadata()['model']['config'])
    again = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model.config))
    again.load_state_dict(model.model.state_dict())
    plain.pop('labels')
    assert torch.equal(again(**plain).logits, model.model(**plain).logits)
    twin = copy.deepcopy(model)
    assert total_of(twin, batch).item() == total_of(model, batch).item()


@pytest.mark.parametrize('backend', ['sdpa', 'eager'])
def test_compiled(backend: str, tmp_path: Path) -> None:
    model, batch = build(tmp_path, 'llama', backend), packed_batch()
    want = sum(separate_sums(model, batch))
    got = total_of(torch.compile(model, backend='aot_eager'), batch)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert worst_gradient(gradients(model, got), gradients(model, want)) < 1e-4


def test_refused_with_the_reason(tmp_path: Path) -> None:
    batch = packed_batch()
    model = build(tmp_path, 'mamba', 'eager')
    with pytest.raises(PackingNotSupportedError, match=r'MambaForCausalLM \(attention eager\) cannot keep documents that share a row apart: .* state from one document into the next.*packing: false'):
        model(batch)
    model({**batch, 'sequence_id': batch['attention_mask'] - 1})


RECURRENT = {
    'Mamba2Config': {'vocab_size': 67, 'hidden_size': 16, 'num_hidden_layers': 2, 'state_size': 4, 'num_heads': 4, 'head_dim': 8, 'n_groups': 1},
    'RwkvConfig': {'vocab_size': 67, 'hidden_size': 16, 'num_hidden_layers': 2},
    'RecurrentGemmaConfig': {'vocab_size': 67, 'hidden_size': 16, 'num_hidden_layers': 3, 'num_attention_heads': 2, 'intermediate_size': 32},
    'Lfm2Config': {'vocab_size': 67, 'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 32, 'num_key_value_heads': 1, 'layer_types': ['conv', 'full_attention']},
}
WITHOUT_POSITIONS = {
    'BloomConfig': {'vocab_size': 67, 'hidden_size': 16, 'n_layer': 2, 'n_head': 2},
    'MptConfig': {'vocab_size': 67, 'd_model': 16, 'n_layers': 2, 'n_heads': 2},
    'FalconConfig': {'vocab_size': 67, 'hidden_size': 16, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'alibi': True},
}


@pytest.mark.parametrize(('config', 'reason'), [*((name, 'from one document into the next') for name in RECURRENT), *((name, 'takes no position ids') for name in WITHOUT_POSITIONS)])
def test_architectures_that_no_mask_can_help(config: str, reason: str) -> None:
    settings = getattr(transformers, config)(**{**RECURRENT, **WITHOUT_POSITIONS}[config])
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation='eager')
    route = choose_route(model, 'cpu')
    assert route.kind == 'refused' and reason in route.reason


def test_other_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip('peft')
    model = build(tmp_path, 'llama').model
    tuned = peft.get_peft_model(copy.deepcopy(model), peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=2))
    assert 'virtual tokens' in choose_route(tuned, 'cpu').reason
    model.config.layer_types = ['full_attention', 'linear_attention']
    assert choose_route(model, 'cpu').reason == 'layers of type linear_attention carry state from one document into the next'
    del model.config.layer_types
    model.config._attn_implementation = 'flex_attention'
    assert choose_route(model, 'cpu') == PackingRoute('refused', "there is no known way to tell the attention implementation 'flex_attention' where documents end; set attn_implementation: sdpa")
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=67, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    assert 'encoder-decoder' in choose_route(t5, 'cpu').reason
    mixed = build(tmp_path, 'gemma3', 'eager').model
    assert choose_route(mixed, 'cpu').kind == 'block_mask'
    monkeypatch.setattr(packing, '_source', lambda function: '')
    assert 'sliding-window layers itself' in choose_route(mixed, 'cpu').reason
