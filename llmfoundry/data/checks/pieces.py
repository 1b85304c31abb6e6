"""A row as pieces of text: which tokens make which characters, which of them are trained, and whose words they are.

A token of a byte-level tokenizer may be half a character; such tokens are joined until they make text, so that nothing is shown as a question mark that the model sees as a letter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Sequence

import numpy as np

from llmfoundry.data.checks.rows import LintRow
from llmfoundry.data.checks.tokenizer_facts import TokenizerFacts

__all__ = ['TEMPLATE_ROLE', 'Piece', 'pieces_of', 'role_of_tokens']

TEMPLATE_ROLE = 'template'
_INCOMPLETE = '\ufffd'
_LONGEST_CHARACTER = 4  # bytes of UTF-8


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` up to ``stop`` of a row, which make ``text``. All of a piece is trained or none of it, and all or none of it is padding."""

    start: int
    stop: int
    text: str
    trained: bool
    padding: bool
    role: str = ''


def pieces_of(row: LintRow, facts: TokenizerFacts) -> list[Piece]:
    """Text of each token, in order, with the role of the message that it belongs to where messages are known."""
    real, found, at = row.is_real(), [], 0
    while at < len(row.ids):
        stop = at + 1
        text = facts.piece(int(row.ids[at]))
        if _INCOMPLETE in text:
            stop, text = _join(row, facts, at, real)
        found.append(Piece(at, stop, text, bool(row.targets[at]), not real[at]))
        at = stop
    return _with_roles(found, row.messages) if row.messages else found


def _join(row: LintRow, facts: TokenizerFacts, at: int, real: np.ndarray) -> tuple[int, str]:
    for stop in range(at + 2, min(at + 1 + _LONGEST_CHARACTER, len(row.ids)) + 1):
        if row.targets[stop - 1] != row.targets[at] or real[stop - 1] != real[at]:
            break
        text = facts.decode([int(i) for i in row.ids[at:stop]])
        if _INCOMPLETE not in text:
            return stop, text
    return at + 1, facts.piece(int(row.ids[at]))


def _with_roles(found: list[Piece], messages: Sequence[tuple[str, str]]) -> list[Piece]:
    """Finds the words of each message in the text, one after the other; what lies between them was written by the template."""
    starts = np.cumsum([0, *[len(p.text) for p in found]])
    text, at, roles = ''.join(p.text for p in found), 0, [TEMPLATE_ROLE] * len(found)
    for role, content in messages:
        words = content.strip()
        begin = text.find(words, at) if words else -1
        if begin < 0:
            continue
        at = begin + len(words)
        first, last = np.searchsorted(starts, begin, 'right') - 1, np.searchsorted(starts, at, 'left')
        roles[first:last] = [role] * (last - first)
    return [replace(piece, role=role) for piece, role in zip(found, roles, strict=True)]


def role_of_tokens(pieces: Sequence[Piece], length: int) -> list[str]:
    """Role of each of ``length`` tokens."""
    roles = [''] * length
    for piece in pieces:
        roles[piece.start : piece.stop] = [piece.role] * (piece.stop - piece.start)
    return roles
