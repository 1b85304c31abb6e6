"""A row as pieces of text: which tokens make which characters, which of them are trained, and whose words they are.

A token of a byte-level tokenizer may be half a character; such tokens are joined until they make text, so that nothing is shown as a question mark that the model sees as a letter.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import numpy as np

from llmfoundry.data.checks.rows import LintRow
from llmfoundry.data.checks.tokenizer_facts import TokenizerFacts

__all__ = ['TEMPLATE_ROLE', 'Piece', 'pieces_of', 'role_of_tokens']

TEMPLATE_ROLE = 'template'
_INCOMPLETE = '\ufffd'
_LONGEST_CHARACTER = 4  # bytes of UTF-8


class Piece(NamedTuple):
    """Tokens ``start`` up to ``stop`` of a row, which make ``text``. All of a piece is trained or none of it, and all or none of it is padding."""

    start: int
    stop: int
    text: str
    trained: bool
    padding: bool
    role: str = ''


def pieces_of(row: LintRow, facts: TokenizerFacts) -> list[Piece]:
    """Text of each token, in order, with the role of the message that it belongs to where messages are known."""
    starts, texts = _texts(row, facts)
    roles = _roles(texts, row.messages) if row.messages else [''] * len(starts)
    targets, real = row.targets.tolist(), row.is_real().tolist()
    stops = [*starts[1:], len(row.ids)]
    return [Piece(start, stop, text, targets[start], not real[start], role) for start, stop, text, role in zip(starts, stops, texts, roles, strict=True)]


def role_of_tokens(row: LintRow, facts: TokenizerFacts) -> np.ndarray:
    """Role of each token of a row whose messages are known, str ``(seq,)``."""
    starts, texts = _texts(row, facts)
    lengths = np.diff([*starts, len(row.ids)])
    return np.repeat(np.array(_roles(texts, row.messages)), lengths)


def _texts(row: LintRow, facts: TokenizerFacts) -> tuple[list[int], list[str]]:
    """First token and text of each piece."""
    ids = row.ids.tolist()
    texts = [facts.piece(i) for i in ids]
    broken = [at for at, text in enumerate(texts) if _INCOMPLETE in text]
    if not broken:
        return list(range(len(ids))), texts
    real = row.is_real()
    joined: set[int] = set()
    for at in broken:
        if at in joined:
            continue
        stop, text = _join(row, facts, at, real)
        if stop > at + 1:
            texts[at] = text
            joined.update(range(at + 1, stop))
    starts = [at for at in range(len(ids)) if at not in joined]
    return starts, [texts[at] for at in starts]


def _join(row: LintRow, facts: TokenizerFacts, at: int, real: np.ndarray) -> tuple[int, str]:
    for stop in range(at + 2, min(at + 1 + _LONGEST_CHARACTER, len(row.ids)) + 1):
        if row.targets[stop - 1] != row.targets[at] or real[stop - 1] != real[at]:
            break
        text = facts.joined(tuple(row.ids[at:stop].tolist()))
        if _INCOMPLETE not in text:
            return stop, text
    return at + 1, ''


def _roles(texts: Sequence[str], messages: Sequence[tuple[str, str]]) -> list[str]:
    """Role of each text: the words of each message are looked up one after the other; what lies between them was written by the template."""
    starts = np.cumsum([0, *map(len, texts)])
    text, at, roles = ''.join(texts), 0, [TEMPLATE_ROLE] * len(texts)
    for role, content in messages:
        words = content.strip()
        begin = text.find(words, at) if words else -1
        if begin < 0:
            continue
        at = begin + len(words)
        first, last = np.searchsorted(starts, begin, 'right') - 1, np.searchsorted(starts, at, 'left')
        roles[first:last] = [role] * (last - first)
    return roles
