"""hf_t5: our loss on labels as they stand equals transformers', one optimiser step of the Trainer, and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from llmfoundry import registry
from llmfoundry.models.hf import hf_t5
from llmfoundry.models.hf.causal_lm import ComposerHFCausalLM
from llmfoundry.models.hf.t5 import ComposerHFT5
from llmfoundry.models.losses import LossOutput
from tests.helpers.one_step import one_step
from tests.helpers.tiny_hf import save_config

VOCAB = 67


def save_t5(folder: Path, **changes: Any) -> str:
    sizes = {'vocab_size': VOCAB, 'd_model': 16, 'd_kv': 8, 'd_ff': 32, 'num_layers': 2, 'num_heads': 2, 'dropout_rate': 0.0, 'decoder_start_token_id': 0, 'pad_token_id': 0}
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**{**sizes, **changes})).save_pretrained(folder)
    return str(folder)


def encoder_decoder_rows(num_rows: int = 4) -> list[dict[str, torch.Tensor]]:
    """Rows as the finetuning collator makes them, with targets of different lengths."""
    generator, rows = torch.Generator().manual_seed(0), []
    for index in range(num_rows):
        context, target = (torch.randint(1, VOCAB, (size,), generator=generator) for size in (9, 6))
        context_mask, target_mask = torch.arange(9) < 4 + index, torch.arange(6) < 2 + index
        rows.append({
            'input_ids': context * context_mask, 'attention_mask': context_mask.long(),
            'decoder_input_ids': torch.cat([torch.zeros(1, dtype=torch.long), target[:-1]]) * target_mask, 'decoder_attention_mask': target_mask.long(),
            'labels': torch.where(target_mask, target, -100),
        })
    return rows


def batch_of(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize('changes', [{}, {'tie_word_embeddings': False}, {'feed_forward_proj': 'gated-gelu'}])
@pytest.mark.parametrize('loss_fn', ['fused_crossentropy', 'torch_crossentropy'])
def test_loss_and_gradients_are_those_of_transformers(changes: dict[str, Any], loss_fn: str, tmp_path: Path) -> None:
    model, batch = ComposerHFT5(None, save_t5(tmp_path, **changes), loss_fn=loss_fn), batch_of(encoder_decoder_rows())
    out = model(batch)
    assert isinstance(out['loss'], LossOutput) and out.get('logits') is None
    ours = model.loss(out, batch)
    ours_gradients = torch.autograd.grad(ours, list(model.parameters()), allow_unused=True)
    theirs = T5ForConditionalGeneration.from_pretrained(tmp_path)
    want = theirs(**batch).loss
    assert ours.item() == pytest.approx(want.item(), rel=1e-6)
    for got, expected in zip(ours_gradients, torch.autograd.grad(want, list(theirs.parameters()), allow_unused=True), strict=True):
        assert (got is None) == (expected is None) and (got is None or (got - expected).norm() <= 1e-5 * expected.norm() + 1e-8)
    del batch['decoder_input_ids']
    assert model.loss(model(batch), batch).item() == pytest.approx(want.item(), rel=1e-6), 'labels moved right take their place'


def test_a_head_with_more_than_a_product_keeps_its_own_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bart = BartForConditionalGeneration(BartConfig(
        vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, dropout=0.0,
        pad_token_id=0, decoder_start_token_id=0,
    ))
    bart.final_logits_bias.normal_()
    bart.save_pretrained(tmp_path)
    model, batch = ComposerHFT5(None, str(tmp_path)), batch_of(encoder_decoder_rows())
    assert model.loss(model(batch), batch).item() == pytest.approx(bart(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize('microbatch', [1, 4])
def test_a_step_of_the_trainer_and_its_metrics(microbatch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmfoundry.data.batch_stats import get_tokens_per_batch_func
    from tests.helpers import one_step as steps

    monkeypatch.setattr(steps, 'get_tokens_per_batch_func', lambda: get_tokens_per_batch_func(decoder_only=False))
    rows, model = encoder_decoder_rows(), registry.construct_from_registry(
        'hf_t5', registry.models, kwargs={'tokenizer': None, 'name': 'hf_t5', 'pretrained_model_name_or_path': save_t5(tmp_path)},
    )
    batch, theirs = batch_of(rows), T5ForConditionalGeneration.from_pretrained(tmp_path)
    output = theirs(**batch)
    found = one_step(model, rows, microbatch)
    assert found['loss'] == pytest.approx(output.loss.item(), rel=1e-6)
    assert found['metrics']['LanguageCrossEntropy'] == pytest.approx(output.loss.item(), rel=1e-6)
    kept = batch['labels'] != -100
    assert found['metrics']['MaskedAccuracy'] == pytest.approx(((output.logits.argmax(-1) == batch['labels']) & kept).sum().item() / kept.sum().item())
    assert sorted(found['metrics']) == ['LanguageCrossEntropy', 'MaskedAccuracy'] == sorted(model.get_metrics(is_train=False))
    assert any(gradient.norm() > 0 for gradient in found['gradients'].values())


def test_evaluation_with_a_metric_that_needs_logits(tmp_path: Path) -> None:
    from torchmetrics import Metric

    class NeedsLogits(Metric):
        seen: tuple[int, ...] = ()

        def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
            self.seen = (*logits.shape, int((labels != -100).sum()))

        def compute(self) -> torch.Tensor:
            return torch.zeros(())

    model, batch = ComposerHFT5(None, save_t5(tmp_path)).eval(), batch_of(encoder_decoder_rows())
    model.val_metrics['NeedsLogits'] = NeedsLogits()
    out = model.eval_forward(batch)
    for metric in model.val_metrics.values():
        model.update_metric(batch, out, metric)
    assert model.val_metrics['NeedsLogits'].seen == (4, 6, VOCAB, 2 + 3 + 4 + 5)
    assert float(model.val_metrics['LanguageCrossEntropy'].compute()) == pytest.approx(model.loss(model(batch), batch).item(), rel=1e-6)


def test_wrong_kind_of_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hf_t5 trains encoder-decoder models, and '.*' \(model type 'llama'\) is not one. Use hf_causal_lm"):
        ComposerHFT5(None, save_config(tmp_path / 'llama', 'llama'), pretrained=False)
    with pytest.raises(ValueError, match=r"hf_causal_lm trains decoder-only models, and '.*' \(model type 't5'\) is an encoder-decoder. Use hf_t5"):
        ComposerHFCausalLM(None, save_t5(tmp_path / 't5'))


def test_generates_and_saves_and_has_its_old_import_path(tmp_path: Path) -> None:
    assert hf_t5.ComposerHFT5 is ComposerHFT5
    model = ComposerHFT5(None, save_t5(tmp_path / 'base')).eval()
    assert model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 4)
    model.model.save_pretrained(tmp_path / 'out')
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / 'out')).__name__ == 'T5ForConditionalGeneration'
    # T5Block is the class of encoder and decoder layers alike, so both are sharded layer by layer.
    assert sum(model.model.fsdp_wrap_fn(module) for module in model.model.modules()) == 4
