"""Rows as the linter sees them: plain arrays, whatever loader they came from.

The linter does not call the code that makes the masks; it gets the arrays that the model gets, and what the source says about them (turns, messages), and compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator, Mapping, Sequence

import numpy as np

__all__ = ['FINETUNING', 'MASKED_TEXT', 'TEXT', 'LintRow', 'Turn', 'spans', 'turns_of']

FINETUNING = 'finetuning'
TEXT = 'text'
MASKED_TEXT = 'masked text'
IGNORED = -100


@dataclass(frozen=True)
class Turn:
    """A prompt and the response to it: tokens ``start`` up to ``middle`` are the prompt, ``middle`` up to ``stop`` the response."""

    start: int
    middle: int
    stop: int


@dataclass(frozen=True)
class LintRow:
    """One row of the data.

    Args:
        name: where it is from: ``17``, or ``batch 0 row 3``.
        ids: int ``(seq,)`` token ids.
        targets: bool ``(seq,)``, True where the token is a label in the loss.
        real: bool ``(seq,)``, False for padding; None if there is none.
        sequence_id: int ``(seq,)``, number of the document of each token, -1 for padding; None if the row holds one document.
        kind: ``finetuning``, ``text``, or ``masked text`` (masked language modelling).
        turns: spans of the turns, if the source knows them; the row then holds one document without padding.
        messages: (role, content) of a chat.
        truncated: whether the end was cut off.
        decoder_only: whether each token is predicted from those before it, so that the label of the very first one does not count.
    """

    name: str
    ids: np.ndarray
    targets: np.ndarray
    real: np.ndarray | None = None
    sequence_id: np.ndarray | None = None
    kind: str = FINETUNING
    turns: tuple[Turn, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    truncated: bool = False
    decoder_only: bool = True

    @classmethod
    def from_batch(cls, name: str, batch: Mapping[str, Any], index: int, kind: str = FINETUNING) -> LintRow:
        """Row ``index`` of a batch of a decoder-only loader."""
        ids = np.asarray(batch['input_ids'][index])
        labels = np.asarray(batch['labels'][index])
        mask, sequence = batch.get('attention_mask'), batch.get('sequence_id')
        return cls(
            name=name,
            ids=ids,
            targets=labels != IGNORED,
            real=None if mask is None else np.asarray(mask[index]).astype(bool),
            sequence_id=None if sequence is None else np.asarray(sequence[index]),
            kind=kind,
        )

    @classmethod
    def from_encoder_decoder_batch(cls, name: str, batch: Mapping[str, Any], index: int) -> LintRow:
        """Row ``index`` of an encoder-decoder batch: the context, then what the decoder is trained on. Padding is left out."""
        context = np.asarray(batch['input_ids'][index])[np.asarray(batch['attention_mask'][index]).astype(bool)]
        labels = np.asarray(batch['labels'][index])
        labels = labels[labels != IGNORED]
        targets = np.concatenate([np.zeros(len(context), bool), np.ones(len(labels), bool)])
        return cls(name=name, ids=np.concatenate([context, labels]), targets=targets, turns=(Turn(0, len(context), len(targets)),), decoder_only=False)

    def is_real(self) -> np.ndarray:
        """bool ``(seq,)``: tokens that are not padding."""
        real = np.ones(len(self.ids), bool) if self.real is None else self.real
        return real if self.sequence_id is None else real & (self.sequence_id >= 0)

    def documents(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of each document, in order; padding belongs to none."""
        real = self.is_real()
        number = np.where(real, 0 if self.sequence_id is None else self.sequence_id, -1)
        edges = np.flatnonzero(np.diff(number)) + 1
        for start, stop in zip([0, *edges.tolist()], [*edges.tolist(), len(number)], strict=True):
            if stop > start and number[start] >= 0:
                yield start, stop


def spans(mask: np.ndarray) -> list[tuple[int, int]]:
    """(start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def turns_of(turns: Sequence[Mapping[str, Any]], length: int) -> tuple[Turn, ...]:
    """Spans of tokenised turns ({'input_ids': prompt ids, 'labels': response ids}) in the row of ``length`` tokens that they were joined into.

    An EOS that was appended belongs to the last response; what truncation cut off has empty spans and is left out.
    """
    found, at = [], 0
    for turn in turns:
        middle = at + len(turn['input_ids'])
        stop = middle + len(turn['labels'])
        found.append((at, middle, stop))
        at = stop
    if found:
        found[-1] = (*found[-1][:2], max(found[-1][2], length))
    return tuple(Turn(a, min(b, length), min(c, length)) for a, b, c in found if a < length)
