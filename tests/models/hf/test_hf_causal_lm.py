"""transformers models in Composer: our loss equals theirs in value and gradients, whatever their head does."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from llmfoundry.models.cpu_autocast import wrap_forward
from llmfoundry.models.hf import fused_head
from llmfoundry.models.hf.causal_lm import ComposerHFCausalLM
from llmfoundry.models.hf.fsdp import find_decoder_layers, rgetattr
from llmfoundry.tokenizers.build import build_tokenizer
from tests.helpers.one_step import one_step, padded_rows, token_mean
from tests.helpers.tiny_hf import ARCHITECTURES, save_config, save_model

VOCAB, SEQ_LEN = 67, 12


def build(folder: Path, architecture: str = 'llama', pretrained: bool = False, changes: dict[str, Any] | None = None, **kwargs: Any) -> ComposerHFCausalLM:
    torch.manual_seed(0)
    return ComposerHFCausalLM(None, save_config(folder, architecture, **(changes or {})), pretrained=pretrained, **kwargs)


def batch_of(num_rows: int = 3) -> dict[str, torch.Tensor]:
    rows = padded_rows(num_rows, SEQ_LEN, VOCAB)
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    return [g for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) if g is not None]


@pytest.mark.parametrize('loss_fn', ['fused_crossentropy', 'torch_crossentropy'])
@pytest.mark.parametrize('architecture', sorted(ARCHITECTURES))
def test_loss_and_gradients_are_those_of_transformers(architecture: str, loss_fn: str, tmp_path: Path) -> None:
    model, batch = build(tmp_path, architecture, loss_fn=loss_fn), batch_of()
    theirs = model.model(**batch).loss
    expected = gradients(model, theirs)
    out = model(batch)
    ours = model.loss(out, batch)
    assert out.get('logits') is None and model.model._fuse_head is True
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for got, want in zip(gradients(model, ours), expected, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm() + 1e-8


@pytest.mark.parametrize(('architecture', 'microbatch'), [('llama', 1), ('gpt2', 2), ('gpt2', 4)])
def test_a_step_of_the_trainer_is_the_token_mean(architecture: str, microbatch: int, tmp_path: Path) -> None:
    rows, model = padded_rows(4, SEQ_LEN, VOCAB), build(tmp_path, architecture)
    expected = token_mean(copy.deepcopy(model).eval(), rows).item()
    found = one_step(model, rows, microbatch)
    assert found['loss'] == pytest.approx(expected, rel=1e-6)
    assert found['metrics']['LanguageCrossEntropy'] == pytest.approx(expected, rel=1e-6)


def test_the_first_pass_under_autocast_trains_every_weight(tmp_path: Path) -> None:
    # The check of the head runs without gradients, and autocast would go on using the weights that it cast there.
    model, batch = wrap_forward(build(tmp_path)), batch_of()
    model.loss(model(batch), batch).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_an_unknown_scaling_falls_back_to_the_models_own_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without this check a model with a scale that we do not know would train on another loss than its own, silently."""
    monkeypatch.setattr(fused_head, '_logit_scale', lambda config: None)
    model, batch = build(tmp_path, 'cohere'), batch_of()
    with caplog.at_level(logging.WARNING):
        loss = model.loss(model(batch), batch)
    assert loss.item() == pytest.approx(model.model(**batch).loss.item(), rel=1e-6)
    assert model.model._fuse_head is False and 'computed from full logits' in caplog.text


def test_router_losses_fall_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, batch = build(tmp_path, 'mixtral', changes={'output_router_logits': True}), batch_of()
    with caplog.at_level(logging.WARNING):
        model(batch)
    assert model.model._fuse_head is False and 'adds a loss of its own' in caplog.text


def test_the_check_leaves_training_mode_and_random_numbers_alone(tmp_path: Path) -> None:
    model, batch = build(tmp_path, 'gpt2', changes={'resid_pdrop': 0.5}).train(), batch_of()
    state = torch.get_rng_state()
    first = model(batch)['loss'].loss_sum.item()
    torch.set_rng_state(state)
    assert model(batch)['loss'].loss_sum.item() == first
    assert all(module.training for module in model.modules())


def test_copies_use_their_own_weights_and_names_stay(tmp_path: Path) -> None:
    model, batch = build(tmp_path), batch_of()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert twin.loss(twin(batch), batch).item() == pytest.approx(torch.log(torch.tensor(float(VOCAB))).item(), rel=1e-6)
    assert type(model.model).__name__ == 'LlamaForCausalLM'
    assert model.get_metadata()['model']['config']['class'] == 'transformers.models.llama.modeling_llama.LlamaForCausalLM'
    model.model.save_pretrained(tmp_path / 'out')
    assert '"LlamaForCausalLM"' in (tmp_path / 'out' / 'config.json').read_text()


def test_generates(tmp_path: Path) -> None:
    model = build(tmp_path).eval()
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 6)


def test_pretrained_weights_float32_and_cache_off(tmp_path: Path) -> None:
    name = save_model(tmp_path, 'gpt2')
    model = ComposerHFCausalLM(None, name)
    again = ComposerHFCausalLM(None, name)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert all(p.dtype == torch.float32 for p in model.parameters()) and model.config.use_cache is False


def test_vocabulary_smaller_than_the_tokenizer(tmp_path: Path) -> None:
    tokenizer, name = build_tokenizer('llmfoundry://gpt2', {}), save_config(tmp_path, 'gpt2')
    with pytest.raises(ValueError, match='allow_embedding_resizing'):
        ComposerHFCausalLM(tokenizer, name, pretrained=False)
    model = ComposerHFCausalLM(tokenizer, name, pretrained=False, allow_embedding_resizing=True)
    assert model.model.get_input_embeddings().weight.shape[0] == len(tokenizer)


def test_lora_trains_the_adapter_only(tmp_path: Path) -> None:
    model = ComposerHFCausalLM(None, save_model(tmp_path, 'llama'), peft_config={'peft_type': 'lora', 'task_type': 'causal_lm', 'r': 2, 'target_modules': ['q_proj']})
    batch = batch_of()
    model.loss(model(batch), batch).backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained and all('lora_' in name for name in trained)
    assert set(model.state_dict()) and all('lora_' in name for name in model.state_dict())
    assert model.model.base_model.model._fuse_head is True


def test_lora_on_the_head_falls_back(tmp_path: Path) -> None:
    model = build(tmp_path, peft_config={'r': 2, 'target_modules': ['lm_head'], 'init_lora_weights': False})
    batch = batch_of()
    loss = model.loss(model(batch), batch)
    assert loss.item() == pytest.approx(model.model(**batch).loss.item(), rel=1e-6)
    assert model.model.base_model.model._fuse_head is False


@pytest.mark.parametrize('architecture', ['llama', 'gpt2', 'gpt_neox', 'opt'])
def test_fsdp_wraps_and_checkpoints_layers(architecture: str, tmp_path: Path) -> None:
    model = build(tmp_path, architecture).model
    layers = find_decoder_layers(model)
    assert [m for m in model.modules() if model.fsdp_wrap_fn(m)] == list(layers) == [m for m in model.modules() if model.activation_checkpointing_fn(m)]


@pytest.mark.parametrize(('architecture', 'start'), [('llama', 1.0), ('gemma2', 0.0)])
def test_norms_of_meta_models_start_where_their_own_class_starts_them(architecture: str, start: float, tmp_path: Path) -> None:
    # Gemma scales by 1 + weight: ones would double every activation.
    from llmfoundry.models.hf import hf_fsdp

    model = build(tmp_path, architecture).model
    hf_fsdp.prepare_hf_model_for_fsdp(model)
    norm = model.model.norm
    torch.nn.init.constant_(norm.weight, float('nan'))
    model.param_init_fn(norm)
    assert torch.equal(norm.weight, torch.full((16,), start))


def test_unconventional_names_are_reported_when_sharding() -> None:
    with pytest.raises(ValueError, match='Linear: cannot find its decoder layers'):
        find_decoder_layers(torch.nn.Linear(2, 2))
    with pytest.raises(AttributeError):
        rgetattr(torch.nn.Linear(2, 2), 'weight.nothing')


def test_flops_per_batch(tmp_path: Path) -> None:
    model = build(tmp_path)
    n_params = sum(p.numel() for p in model.parameters())
    assert model.flops_per_batch({'input_ids': torch.zeros(2, 8)}) == 2 * (6 * n_params * 8 + 12 * 2 * 16 * 8 * 8)
