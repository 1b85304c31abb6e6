"""Packed documents have the loss and the gradients that they have alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmfoundry.models.mpt.attention_inputs import document_lengths, positions_within_documents
from tests.helpers.tiny_mpt import ATTENTION_CLASSES, POSITIONS, tiny_mpt

DOCS = [[13, 1, 20, 6], [33, 7]]
SEQ = 40
VARIANTS: dict[str, dict[str, Any]] = {
    **POSITIONS,
    **ATTENTION_CLASSES,
    'window': {'rope': True, 'sliding_window_size': 5},
    'window_alibi_gqa': {'alibi': True, 'sliding_window_size': 5, **ATTENTION_CLASSES['gqa']},
    'softcap_alibi': {'alibi': True, 'attn_logit_softcapping': 0.5},
    'temperature': {'rope': True, 'attn_temperature_tuning': {'floor_scale': 4, 'attn_scale': 0.5}},
}


def packed_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, document ids, and labels without the first token of each document (whose prediction would come from the document before)."""
    ids = torch.randint(0, 101, (2, SEQ), generator=torch.Generator().manual_seed(5))
    sequence_id = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in DOCS])
    labels = ids.clone()
    for row, lengths in enumerate(DOCS):
        labels[row, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = -100
    return ids, sequence_id, labels


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction='sum')


@pytest.mark.parametrize('attn_impl', ['torch', 'flash'])
@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('route', ['documents', 'mask'])
def test_packed_equals_separate(variant: str, attn_impl: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mpt({**VARIANTS[variant], 'attn_impl': attn_impl, 'attn_uses_sequence_id': True}).train()
    if route == 'mask':
        # As on a device without the per-document route.
        monkeypatch.setattr('llmfoundry.models.mpt.attention_inputs.document_lengths', lambda sequence_id: None)
    ids, sequence_id, labels = packed_batch()
    packed = loss_sum(model(ids, sequence_id=sequence_id).logits, labels)
    packed.backward()
    packed_grads = gradients(model)
    model.zero_grad()
    total = 0.0
    for row, lengths in enumerate(DOCS):
        for doc, doc_labels in zip(ids[row].split(lengths), labels[row].split(lengths), strict=True):
            loss = loss_sum(model(doc[None], sequence_id=torch.zeros_like(doc)[None]).logits, doc_labels[None])
            loss.backward()
            total += loss.item()
    assert packed.item() == pytest.approx(total, rel=1e-6)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(packed_grads[name], grad, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f'{n}: {m}')


def test_documents_do_attend_to_each_other_without_the_flag() -> None:
    """Guards the test above: it would pass with a model that ignores context."""
    ids, sequence_id, _ = packed_batch()
    separated = tiny_mpt({'alibi': True, 'attn_uses_sequence_id': True})(ids, sequence_id=sequence_id).logits
    mixed = tiny_mpt({'alibi': True})(ids).logits
    assert torch.allclose(separated[:, :13], mixed[:, :13], atol=1e-5)
    assert (separated[:, 34:] - mixed[:, 34:]).abs().max() > 1e-3


@pytest.mark.parametrize('attn_impl', ['torch', 'flash'])
def test_ids_that_are_no_runs_are_pairwise_equality(attn_impl: str) -> None:
    """An id that comes back after another one is the same document: tokens attend to all earlier tokens of their id."""
    ids = torch.randint(0, 101, (1, 12), generator=torch.Generator().manual_seed(6))
    sequence_id = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 2, 2, 1, 0, 2]])
    model = tiny_mpt({'rope': True, 'attn_impl': attn_impl, 'attn_uses_sequence_id': True}, n_layers=1)
    positions = torch.arange(12)[None]
    logits = model(ids, sequence_id=sequence_id, position_ids=positions).logits
    for document in range(3):
        of_document = sequence_id[0] == document
        alone = model(ids[:, of_document], position_ids=positions[:, of_document]).logits
        torch.testing.assert_close(logits[:, of_document], alone, atol=1e-5, rtol=0)


def test_padding_behind_packed_documents() -> None:
    ids, sequence_id, _ = packed_batch()
    model = tiny_mpt({'alibi': True, 'attn_uses_sequence_id': True})
    want = model(ids, sequence_id=sequence_id).logits
    mask = torch.ones_like(ids)
    mask[0, -6:] = 0
    sequence_id = sequence_id.masked_fill(mask == 0, -1)
    got = model(ids, sequence_id=sequence_id, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=0)
    assert got.isfinite().all()


def test_document_lengths_and_positions() -> None:
    sequence_id = torch.tensor([[4, 4, 4, 7, 7], [0, 1, 1, 1, 2]])
    assert document_lengths(sequence_id) == [3, 2, 1, 3, 1]
    assert document_lengths(torch.tensor([[0, 1, 0]])) is None
    assert positions_within_documents(sequence_id).tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 0]]


def test_sequence_id_errors() -> None:
    model = tiny_mpt({'attn_uses_sequence_id': True})
    ids = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError) as e:
        model(ids, sequence_id=ids[:, :3])
    assert str(e.value) == 'sequence_id has length 3, but there are 5 tokens; they must be equal'
    with pytest.raises(ValueError, match='sequence_id is None, but attn_config.attn_uses_sequence_id is true and the model is in training mode'):
        model.train()(ids)
    assert model.eval()(ids).logits.shape == (1, 5, 101)
    with pytest.warns(UserWarning, match='sequence_id was given but is not used'):
        tiny_mpt()(ids, sequence_id=ids)
