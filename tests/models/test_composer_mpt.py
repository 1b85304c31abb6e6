"""MPT in a real Trainer: exact token means for any microbatch size and number of ranks, and metrics that agree with logits."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torchmetrics import Metric

from llmfoundry import registry
from llmfoundry.models.losses import LossOutput
from llmfoundry.models.mpt.composer_mpt import ComposerMPTCausalLM
from llmfoundry.tokenizers.build import build_tokenizer
from tests.helpers.one_step import one_step, padded_rows, token_mean
from tests.helpers.processes import run_in_processes

VOCAB, SEQ_LEN = 53, 16


def build(seed: int = 0, tokenizer: Any = None, **kwargs: Any) -> ComposerMPTCausalLM:
    torch.manual_seed(seed)
    settings = {'d_model': 16, 'n_heads': 2, 'n_layers': 2, 'vocab_size': VOCAB, 'max_seq_len': SEQ_LEN, 'norm_type': 'layernorm', 'attn_config': {'alibi': True}, **kwargs}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return ComposerMPTCausalLM(tokenizer, **settings)


def batch_of(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def relative_difference(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    assert set(got) == set(want)
    return max(((got[name] - want[name]).norm() / want[name].norm().clamp(min=1e-8)).item() for name in want)


def expected_gradients(model: Any, rows: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
    loss = token_mean(model, rows)
    names = [name for name, _ in model.named_parameters()]
    return loss.item(), dict(zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True))


@pytest.mark.parametrize('loss_fn', ['fused_crossentropy', 'torch_crossentropy'])
@pytest.mark.parametrize('tied', [True, False])
def test_any_microbatch_size_gives_the_token_mean(loss_fn: str, tied: bool) -> None:
    rows = padded_rows(8, SEQ_LEN, VOCAB)
    model = build(loss_fn=loss_fn, tie_word_embeddings=tied)
    loss, gradients = expected_gradients(model, rows)
    for microbatch in (1, 2, 4, 8):
        found = one_step(copy.deepcopy(model), rows, microbatch)
        assert found['loss'] == pytest.approx(loss, rel=1e-6)
        assert relative_difference(found['gradients'], gradients) < 1e-6, microbatch
        assert found['metrics']['LanguageCrossEntropy'] == pytest.approx(loss, rel=1e-6)
        assert found['metrics']['LanguagePerplexity'] == pytest.approx(math.exp(loss), rel=1e-5)


def _two_rank_step(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    return one_step(build(), rows, microbatch=1)


@pytest.mark.world_size(2)
def test_two_ranks_give_the_token_mean_of_one() -> None:
    rows = padded_rows(4, SEQ_LEN, VOCAB)
    loss, gradients = expected_gradients(build(), rows)
    for found in run_in_processes(_two_rank_step, 2, rows):
        assert found['loss'] == pytest.approx(loss, rel=1e-6)
        assert found['metrics']['LanguageCrossEntropy'] == pytest.approx(loss, rel=1e-6)
        assert relative_difference(found['gradients'], gradients) < 2e-6


def test_forward_returns_the_summed_loss_and_no_logits() -> None:
    model, batch = build(), batch_of(padded_rows(3, SEQ_LEN, VOCAB))
    out = model(batch)
    assert isinstance(out['loss'], LossOutput) and out.get('logits') is None
    assert model({key: value for key, value in batch.items() if key != 'labels'})['logits'].shape == (3, SEQ_LEN, VOCAB)


def test_loss_of_a_batch_without_targets_is_zero() -> None:
    model, batch = build(), batch_of(padded_rows(2, SEQ_LEN, VOCAB))
    batch['labels'][:] = -100
    loss = model.loss(model(batch), batch)
    loss.backward()
    assert loss.item() == 0.0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_loss_token_scale_multiplies_the_loss() -> None:
    model, batch = build(), batch_of(padded_rows(2, SEQ_LEN, VOCAB))
    plain = model.loss(model(batch), batch)
    model.loss_token_scale = 0.25
    assert model.loss(model(batch), batch).item() == pytest.approx(plain.item() / 4)


def test_train_metrics_equal_those_from_logits_and_make_no_second_pass() -> None:
    model, batch = build(), batch_of(padded_rows(4, SEQ_LEN, VOCAB))
    out = model(batch)
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    values = {}
    for name, metric in model.get_metrics(is_train=True).items():
        model.update_metric(batch, model.eval_forward(batch, out), metric)
        values[name] = metric.compute().item()
    assert not calls
    logits = model({key: value for key, value in batch.items() if key != 'labels'})['logits']
    for name, metric in model.get_metrics(is_train=False).items():
        metric.update(logits, torch.nn.functional.pad(batch['labels'][:, 1:], (0, 1), value=-100))
        assert values[name] == pytest.approx(metric.compute().item(), rel=1e-6), name
    assert set(values) == {'LanguageCrossEntropy', 'LanguagePerplexity', 'TokenAccuracy'}


class MeanLogit(Metric):
    """A metric that knows nothing of summed losses."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state('value', default=torch.tensor(0.0), dist_reduce_fx='sum')

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        self.value += output[target != -100].mean()

    def compute(self) -> torch.Tensor:
        return self.value


def test_metrics_that_want_logits_get_them() -> None:
    rows = padded_rows(3, SEQ_LEN, VOCAB)
    batch = batch_of(rows)
    with registry.save_registry():
        registry.metrics.register('mean_logit', func=MeanLogit)
        model = build(additional_train_metrics=['mean_logit'], additional_eval_metrics=['mean_logit']).eval()
    logits = model({key: value for key, value in batch.items() if key != 'labels'})['logits']
    has_target = torch.nn.functional.pad(batch['labels'][:, 1:], (0, 1), value=-100) != -100
    expected = logits[has_target].mean().item()
    for is_train, outputs in ((True, model(batch)), (False, None)):
        with torch.no_grad():
            outputs = model.eval_forward(batch, outputs)
            metrics = model.get_metrics(is_train)
            for metric in metrics.values():
                model.update_metric(batch, outputs, metric)
        assert metrics['MeanLogit'].compute().item() == pytest.approx(expected, rel=1e-5)
        assert metrics['LanguageCrossEntropy'].compute().item() == pytest.approx(token_mean(model, rows).item(), rel=1e-6)


def test_eval_by_the_trainer_is_the_token_mean_over_batches() -> None:
    from composer import Trainer
    from torch.utils.data import DataLoader

    rows, model = padded_rows(6, SEQ_LEN, VOCAB), build()
    trainer = Trainer(model=model, eval_dataloader=DataLoader(rows, batch_size=2), device='cpu', progress_bar=False)  # type: ignore[arg-type]
    trainer.eval()
    trainer.close()
    assert trainer.state.eval_metric_values['LanguageCrossEntropy'].item() == pytest.approx(token_mean(model, rows).item(), rel=1e-6)


def test_no_train_metrics() -> None:
    model = build(use_train_metrics=False)
    assert model.get_metrics(is_train=True) == {} and len(model.get_metrics(is_train=False)) == 3


def test_wrong_names() -> None:
    with pytest.raises(ValueError, match="loss_fn='cross' is not known; choose one of: fused_crossentropy, torch_crossentropy"):
        build(loss_fn='cross')
    with pytest.raises(ValueError, match='token_accuracy'):
        build(additional_train_metrics=['token_acuracy'])


def test_checkpoint_metadata_has_config_and_tokenizer_and_small_vocab_grows() -> None:
    tokenizer = build_tokenizer('llmfoundry://gpt2', {})
    model = build(tokenizer=tokenizer)
    assert model.model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == len(tokenizer)
    metadata = model.get_metadata()
    assert metadata['model']['config']['content']['d_model'] == 16
    assert metadata['model']['config']['class'].endswith('MPTForCausalLM')
    assert 'tokenizer.json' in metadata['tokenizer']


def test_generates() -> None:
    model = build(use_cache=True).eval()
    out = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 7)


def test_construction_does_not_import_every_causal_lm() -> None:
    """Composer's own check imports every causal LM of transformers, 10 s."""
    import sys

    before = {name for name in sys.modules if name.startswith('transformers.models.')}
    build()
    assert len({name for name in sys.modules if name.startswith('transformers.models.')} - before) < 5


def test_flops_per_batch() -> None:
    model = build()
    n_params = sum(p.numel() for p in model.parameters())
    batch = {'input_ids': torch.zeros(3, 8, dtype=torch.long)}
    assert model.flops_per_batch(batch) == 3 * (6 * n_params * 8 + 12 * 2 * 16 * 8 * 8)


def test_load_balancing_loss_of_megablocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """megablocks needs a GPU; its two functions are stood in for, the joining of the losses is ours."""
    import sys
    import types

    model, batch = build(), batch_of(padded_rows(2, SEQ_LEN, VOCAB))
    cleared: list[int] = []
    fake = types.SimpleNamespace(batched_load_balancing_loss=lambda args: torch.tensor(2.0) * args.moe_loss_weight, clear_load_balancing_loss=lambda: cleared.append(1))
    monkeypatch.setitem(sys.modules, 'megablocks.layers.moe', fake)
    monkeypatch.setattr('llmfoundry.models.mpt.composer_mpt.ffns_with_megablocks', {'mb_dmoe'})  # the registry lists it only where megablocks is installed
    plain = model.loss(model(batch), batch)
    model.config.ffn_config['ffn_type'] = 'mb_dmoe'
    model.model.transformer.args = types.SimpleNamespace(moe_loss_weight=0.5)
    losses = model.loss(model(batch), batch)
    assert losses['lbl'].item() == 1.0 and losses['loss'].item() == plain.item() and losses['total'].item() == pytest.approx(plain.item() + 1.0)
    assert len(cleared) == 2
    model.model.transformer.args.moe_loss_weight = 0.0
    assert isinstance(model.loss(model(batch), batch), torch.Tensor)
