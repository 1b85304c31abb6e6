"""Packing self-test: random documents, packed in rows and each alone, through the real model and its attention backend, before the first step.

A packed document must come out as it does alone (this finds wrong positions and masks), and must not change when the other documents change (this finds leaks that are
smaller than the rounding of another shape). Both are measured on logits, relative to their spread: the losses of a newly initialised model are all ln(vocabulary), whatever its
attention does. The last pass takes the way of training, with the loss inside the forward. Eight short passes without gradients, so seconds even on a CPU; every rank of a
sharded run must call it, and all do the same passes.

A choice by model class alone would be faster, and would have missed every silent failure that users reported: a new architecture, another version of the kernel, a config that
switches the mask off.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from llmfoundry.errors import PackingNotSupportedError, PackingSelfTestError
from llmfoundry.models.hf.packing import attention_backend
from llmfoundry.models.losses import LossOutput

__all__ = ['PackingReport', 'packing_self_test']

IGNORE = -100
# Shares of the row. The first row ends in padding; documents differ in length, so that a mask of another row or document cannot pass for the right one.
_SHARES = ((0.25, 0.4, 0.15), (0.55, 0.45))
_ROW_TOKENS = {'cpu': 64}
_MOST_TOKENS = {'cpu': 1024}
# Of the logits' spread. Rounding makes 1e-7 in fp32 and 1e-2 in bf16, positions that run on from the document before 1.
_TOLERANCE = {'fp32': 1e-3, 'tf32': 2e-2, 'reduced': 1e-1}
# The same kernels on the same shapes: 0, except for the order of sums inside mixtures of experts. A visible neighbour makes 3e-2 and more in a model that knows nothing yet.
_LEAK_SHARE = 0.05


@dataclass(frozen=True)
class PackingReport:
    """What the self-test measured.

    Attributes:
        backend: model class and attention implementation.
        documents: number of documents.
        tokens: tokens of all documents together.
        loss_difference: largest difference of a document's mean loss packed and alone, in nats per token.
        deviation: largest difference of a document's logits packed and alone, relative to the spread of the logits.
        leak: largest change of a document's logits when only other documents change, relative to their spread.
        tolerance: the largest allowed deviation.
        seconds: time taken.
    """

    backend: str
    documents: int
    tokens: int
    loss_difference: float
    deviation: float
    leak: float
    tolerance: float
    seconds: float

    def __str__(self) -> str:
        return (
            f'Packing self-test passed for {self.backend}: {self.documents} documents of {self.tokens} tokens, packed and alone: loss differs by {self.loss_difference:.1e}, '
            f'logits by {self.deviation:.1e} of their spread, {self.leak:.1e} when other documents change ({self.seconds:.1f} s).'
        )


@dataclass(frozen=True)
class _Document:
    row: int
    start: int
    stop: int

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """(tokens, ...) of the document, from (rows, seq, ...)."""
        return rows[self.row, self.start : self.stop]


def packing_self_test(model: Any, vocab_size: int, max_seq_len: int, device: torch.device | str) -> PackingReport:
    """Checks that documents packed in a row get what they get alone.

    Args:
        model: a ComposerModel around a causal LM, with weights (not on the meta device), sharded or not.
        vocab_size: token ids are drawn below it.
        max_seq_len: rows of the run, in tokens; the test's rows are shorter, except where sliding windows need their length.
        device: of the batches.

    Returns:
        What was measured.

    Raises:
        PackingSelfTestError: the model refuses packed rows, or documents see each other or wrong positions. The text names the backend.
    """
    begin, device = time.perf_counter(), torch.device(device)
    backend = _backend(model)
    documents, tokens = _draw(vocab_size, _row_tokens(model, max_seq_len, device.type))
    with _evaluation(model):
        try:
            packed = _logits(model, _packed_batch(documents, tokens, device))
        except PackingNotSupportedError as e:
            raise PackingSelfTestError(backend, e.reason) from e
        alone = [_logits(model, _alone(document.of(tokens), device))[0] for document in documents]
        changed = [_logits(model, _packed_batch(documents, _replace(documents[parity::2], tokens, vocab_size), device)) for parity in (0, 1)]
        out = model(_packed_batch(documents, tokens, device))
    deviations = [_relative(document.of(packed), logits) for document, logits in zip(documents, alone, strict=True)]
    # Documents with an even index must not notice that those with an odd one have changed, and the other way round.
    leaks = [_relative(document.of(changed[1 - index % 2]), document.of(packed)) for index, document in enumerate(documents)]
    losses = torch.tensor([[_loss(document.of(packed), document.of(tokens)), _loss(logits, document.of(tokens))] for document, logits in zip(documents, alone, strict=True)])
    tolerance = _tolerance(model, packed.dtype, device.type)
    report = PackingReport(
        backend, len(documents), sum(document.stop - document.start for document in documents), (losses[:, 0] - losses[:, 1]).abs().max().item(),
        max(deviations), max(leaks), tolerance, time.perf_counter() - begin,
    )
    problem = _problem(report, out, documents, losses[:, 1])
    if problem is not None:
        raise PackingSelfTestError(backend, problem, _remedy(backend))
    return report


def _problem(report: PackingReport, out: Any, documents: list[_Document], losses: torch.Tensor) -> str | None:
    """What is wrong, or None. ``losses`` are the mean losses of the documents alone, ``out`` is the model's output on the packed batch with labels."""
    figures = f'logits differ by {report.deviation:.1e} of their spread (allowed {report.tolerance:.0e}), per-document loss by {report.loss_difference:.1e}'
    if not report.leak <= report.tolerance * _LEAK_SHARE:
        return f'a document changes by {report.leak:.1e} when only other documents of its row change, so documents see each other; packed and alone, {figures}'
    if not report.deviation <= report.tolerance:
        return f'documents do not see each other, but packed they do not come out as alone: {figures}. Positions that do not begin anew in each document do this'
    loss = out.get('loss') if isinstance(out, Mapping) else None
    if not isinstance(loss, LossOutput):
        return None
    targets = torch.tensor([float(document.stop - document.start - 1) for document in documents])
    expected, found = (losses * targets).sum().item() / targets.sum().item(), loss.mean().item()
    if not abs(found - expected) <= report.tolerance * max(1.0, expected):
        return f'the loss of a packed batch is {found:.6f}, that of its documents alone {expected:.6f} nats per token'
    return None


def _remedy(backend: str) -> str:
    if 'attn_impl' in backend:
        return 'let the model keep documents apart (attn_config.attn_uses_sequence_id: true)'
    return f'use another attention implementation (model.attn_implementation: {"eager" if "sdpa" in backend else "sdpa"})'


def _backend(model: Any) -> str:
    inner = model.model
    attn_config = getattr(getattr(inner, 'config', None), 'attn_config', None)
    if isinstance(attn_config, Mapping) and 'attn_impl' in attn_config:
        return f'{type(inner).__name__} (attn_impl {attn_config["attn_impl"]})'
    inner = inner.get_base_model() if hasattr(inner, 'get_base_model') else inner
    return f'{type(inner).__name__} (attention {attention_backend(inner)})'


def _row_tokens(model: Any, max_seq_len: int, device_type: str) -> int:
    """A row short enough for seconds; long enough that a document reaches beyond a sliding window, where that is possible."""
    tokens = _ROW_TOKENS.get(device_type, 256)
    config = getattr(model.model, 'config', None)
    attn_config = getattr(config, 'attn_config', None)
    # DBRX has an object of that name.
    window = getattr(config, 'sliding_window', None) or (attn_config.get('sliding_window_size', -1) if isinstance(attn_config, Mapping) else -1)
    if window > 0 and 2 * window + 32 <= _MOST_TOKENS.get(device_type, 8192):
        tokens = max(tokens, 2 * window + 32)
    return min(max_seq_len, tokens)


def _draw(vocab_size: int, row_tokens: int) -> tuple[list[_Document], torch.Tensor]:
    """Documents and (rows, row_tokens) random tokens, the same on every rank."""
    documents = []
    for row, shares in enumerate(_SHARES):
        stop = 0
        for index, share in enumerate(shares):
            start, stop = stop, min(row_tokens, stop + max(2, int(share * row_tokens)))
            if row == 1 and index == len(shares) - 1:
                stop = row_tokens
            if stop - start >= 2:
                documents.append(_Document(row, start, stop))
    return documents, torch.randint(0, vocab_size, (len(_SHARES), row_tokens), generator=torch.Generator().manual_seed(0))


def _replace(documents: list[_Document], tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The tokens with those of ``documents`` exchanged for others."""
    tokens = tokens.clone()
    for document in documents:
        tokens[document.row, document.start : document.stop] = (document.of(tokens) + vocab_size // 2) % vocab_size
    return tokens


def _packed_batch(documents: list[_Document], tokens: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    sequence_id, labels = torch.full_like(tokens, -1), torch.full_like(tokens, IGNORE)
    for index, document in enumerate(documents):
        sequence_id[document.row, document.start : document.stop] = index if document.row == 0 else index - sum(d.row == 0 for d in documents)
        labels[document.row, document.start + 1 : document.stop] = document.of(tokens)[1:]
    return {key: value.to(device) for key, value in (('input_ids', tokens), ('attention_mask', (sequence_id >= 0).long()), ('labels', labels), ('sequence_id', sequence_id))}


def _alone(tokens: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    tokens = tokens[None].to(device)
    return {'input_ids': tokens, 'attention_mask': torch.ones_like(tokens), 'sequence_id': torch.zeros_like(tokens)}


@contextlib.contextmanager
def _evaluation(model: torch.nn.Module) -> Iterator[None]:
    """No gradients and no dropout; each module's mode is restored, since frozen parts may be in another one than the model."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(rows, seq, vocab), in the dtype in which the model computes them, on the CPU."""
    return model({key: value for key, value in batch.items() if key != 'labels'})['logits'].cpu()


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Distance of two (tokens, vocab), relative to the spread of the second over the vocabulary. The first token is left out: it sees itself alone, whatever goes wrong."""
    got, want = got[1:].float(), want[1:].float()
    return ((got - want).norm() / (want - want.mean(dim=-1, keepdim=True)).norm().clamp(min=1e-12)).item()


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    return F.cross_entropy(logits[:-1].float(), tokens[1:]).item()


def _tolerance(model: Any, logits_dtype: torch.dtype, device_type: str) -> float:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} | {logits_dtype}
    under_autocast = torch.is_autocast_enabled(device_type) or getattr(type(model), 'cpu_autocast_dtype', None) is not None
    # Sharded weights are float32 between the passes, whatever dtype they are gathered in.
    may_be_cast = device_type != 'cpu' and any(isinstance(p, DTensor) for p in model.parameters())
    if dtypes != {torch.float32} or under_autocast or may_be_cast:
        return _TOLERANCE['reduced']
    return _TOLERANCE['fp32' if device_type == 'cpu' else 'tf32']
