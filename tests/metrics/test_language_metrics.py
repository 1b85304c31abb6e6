"""Token metrics: the same from a summed loss as from logits, exact sums, clear refusals."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmfoundry import registry
from llmfoundry.metrics.language import LanguageCrossEntropy, LanguagePerplexity
from llmfoundry.metrics.token_acc import TokenAccuracy
from llmfoundry.models.losses import LossOutput, loss_from_logits

METRICS = [LanguageCrossEntropy, LanguagePerplexity, TokenAccuracy]


def logits_and_targets(seed: int, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 5, 11, generator=generator)
    targets = torch.where(torch.rand(rows, 5, generator=generator) < 0.5, logits.argmax(-1), torch.randint(0, 11, (rows, 5), generator=generator))
    targets[torch.rand(rows, 5, generator=generator) < 0.3] = -100
    return logits, targets


@pytest.mark.parametrize('metric_class', METRICS)
def test_every_form_of_output_gives_the_same(metric_class: type) -> None:
    batches = [logits_and_targets(seed, rows=seed + 1) for seed in range(4)]
    values = []
    for form in ('logits', 'mapping', 'loss', 'mapping with loss'):
        metric = metric_class()
        for logits, targets in batches:
            loss = loss_from_logits(logits, targets)
            output = {
                'logits': logits, 'mapping': CausalLMOutputWithPast(logits=logits), 'loss': loss, 'mapping with loss': CausalLMOutputWithPast(loss=loss),
            }[form]
            metric.update(output, targets)
        values.append(metric.compute().item())
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)
    logits, targets = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    right = (logits.argmax(-1) == targets)[targets != -100].float().mean()
    expected = {LanguageCrossEntropy: mean, LanguagePerplexity: mean.exp(), TokenAccuracy: right}[metric_class]
    assert values[0] == pytest.approx(expected.item(), rel=1e-6)


def test_sums_stay_exact_over_many_batches() -> None:
    """In float32 a sum beyond 2^24 stops growing by ones."""
    metric = LanguageCrossEntropy()
    metric.update(LossOutput(torch.tensor(2.0**30), torch.tensor(2**30), torch.tensor(0)))
    for _ in range(64):
        metric.update(LossOutput(torch.tensor(3.0), torch.tensor(1), torch.tensor(1)))
    assert metric.total.item() == 2.0**30 + 64 * 3 and metric.total_items.item() == 2**30 + 64


def test_metric_keeps_no_graph_and_resets() -> None:
    metric = LanguageCrossEntropy()
    metric.update(LossOutput(torch.tensor(3.0, requires_grad=True), torch.tensor(2)))
    assert not metric.total.requires_grad and metric.compute().item() == 1.5
    metric.reset()
    assert math.isnan(metric.compute().item())


def test_refusals() -> None:
    with pytest.raises(ValueError, match='does not count correct tokens; set loss_fn: torch_crossentropy'):
        TokenAccuracy().update(LossOutput(torch.tensor(1.0), torch.tensor(1), None))
    with pytest.raises(ValueError, match='LanguageCrossEntropy got logits but no labels'):
        LanguageCrossEntropy().update(torch.zeros(2, 3))
    with pytest.raises(TypeError, match='needs logits, a summed loss, or a mapping .* got int'):
        LanguageCrossEntropy().update(3)


def test_other_ignore_index() -> None:
    metric = TokenAccuracy(ignore_index=0)
    metric.update(torch.eye(4)[None, :, :], torch.tensor([[0, 1, 2, 0]]))
    assert metric.compute().item() == 1.0 and metric.total_items.item() == 2


@pytest.mark.parametrize('name', ['language_cross_entropy', 'language_perplexity', 'token_accuracy'])
def test_registered(name: str) -> None:
    assert registry.metrics.get(name) in METRICS
