"""Documents packed in rows and the same documents alone, for models in Composer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.helpers.tiny_hf import save_config

__all__ = ['LAYOUT', 'SEQ_LEN', 'VOCAB', 'documents_of', 'gradients', 'packed_batch', 'packed_sums', 'separate_sums', 'tiny_model', 'total_of', 'worst_gradient']

VOCAB, SEQ_LEN, IGNORE = 67, 20, -100
# Lengths of the documents of each row: one of a single token, padding on the right, and a row that is one document.
LAYOUT = ((7, 5, 1, 3), (4, 9), (20,))


def tiny_model(folder: Path, architecture: str, attn_implementation: str | None = None, changes: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """A ``ComposerHFCausalLM`` in training mode whose weights are large enough for attention and positions to matter."""
    from llmfoundry.models.hf.causal_lm import ComposerHFCausalLM

    torch.manual_seed(0)
    model = ComposerHFCausalLM(None, save_config(folder, architecture, **(changes or {})), pretrained=False, attn_implementation=attn_implementation, **kwargs).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape) if parameter.dim() < 2 else 0.3 * torch.randn(parameter.shape))
    return model


def packed_batch(layout: tuple[tuple[int, ...], ...] = LAYOUT, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random tokens; ids 0, 1, ... within each row and -1 at padding; the first token of a document is no target."""
    shape = len(layout), SEQ_LEN
    input_ids = torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(seed))
    sequence_id, labels = torch.full(shape, -1), torch.full(shape, IGNORE)
    for row, lengths in enumerate(layout):
        start = 0
        for index, length in enumerate(lengths):
            sequence_id[row, start : start + length] = index
            labels[row, start + 1 : start + length] = input_ids[row, start + 1 : start + length]
            start += length
    return {'input_ids': input_ids, 'attention_mask': (sequence_id >= 0).long(), 'labels': labels, 'sequence_id': sequence_id}


def documents_of(batch: dict[str, torch.Tensor]) -> list[tuple[int, int, int]]:
    """(row, start, stop) of the documents that have a target."""
    found = []
    for row, ids in enumerate(batch['sequence_id'].tolist()):
        for document in sorted({i for i in ids if i >= 0}):
            places = [place for place, i in enumerate(ids) if i == document]
            if len(places) > 1:
                found.append((row, places[0], places[-1] + 1))
    return found


def separate_sums(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Summed loss of each document in a batch of its own, without padding and without ids."""
    sums = []
    for row, start, stop in documents_of(batch):
        ids = batch['input_ids'][row : row + 1, start:stop]
        sums.append(model({'input_ids': ids, 'attention_mask': torch.ones_like(ids), 'labels': ids})['loss'].loss_sum)
    return sums


def packed_sums(model: Any, batch: dict[str, torch.Tensor], with_ids: bool = True) -> list[torch.Tensor]:
    """Summed loss of each document in the packed batch: one pass per document, in which only its tokens are targets. Without ids every document sees those before it."""
    inputs = batch if with_ids else {key: value for key, value in batch.items() if key != 'sequence_id'}
    sums = []
    for row, start, stop in documents_of(batch):
        labels = torch.full_like(batch['labels'], IGNORE)
        labels[row, start + 1 : stop] = batch['labels'][row, start + 1 : stop]
        sums.append(model({**inputs, 'labels': labels})['loss'].loss_sum)
    return sums


def total_of(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed loss of the batch as it is."""
    return model(batch)['loss'].loss_sum


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of each trained parameter that the loss reaches."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def worst_gradient(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """Largest relative difference of a parameter's gradient. Gradients that are 0 but for rounding (biases of keys) count relative to a ten-thousandth of the whole."""
    assert set(got) == set(want)
    floor = 1e-4 * torch.stack([g.norm() for g in want.values()]).norm()
    return max(((got[name] - want[name]).norm() / torch.maximum(want[name].norm(), floor)).item() for name in want)
