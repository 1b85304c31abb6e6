"""Cutting a stream of tokenised documents into samples of one length, as pure functions over arrays.

Pre-training wants every sample full: documents are laid end to end and cut every ``max_length`` tokens. The state between calls is only the
leftover of the last cut, so that a converter may tokenise in parallel, cut in order, and stop and go on at any point with the same result. Imports
numpy only: worker processes load it.
"""

from __future__ import annotations

import numpy as np

__all__ = ['TOKEN_DTYPE', 'cut_unwrapped', 'cut_wrapped', 'empty_tokens', 'separator_warnings']

TOKEN_DTYPE = np.dtype('<i4')


def empty_tokens() -> np.ndarray:
    """An empty leftover."""
    return np.zeros(0, dtype=TOKEN_DTYPE)


def cut_wrapped(leftover: np.ndarray, tokens: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Appends ``tokens`` to ``leftover`` and cuts full samples off the front; documents may wrap over several samples.

    Args:
        leftover: (l,) tokens not yet in a sample, l < max_length.
        tokens: (t,) tokens of any number of documents, in order, separators included.
        max_length: tokens in a sample.

    Returns:
        Samples (n, max_length) and the new leftover, shorter than ``max_length``. No token is lost or reordered.
    """
    stream = np.concatenate((leftover, tokens)) if len(leftover) else tokens
    full = len(stream) // max_length * max_length
    return stream[:full].reshape(-1, max_length), stream[full:].copy()


def cut_unwrapped(leftover: np.ndarray, tokens: np.ndarray, document_lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """As ``cut_wrapped``, but no document continues in a second sample: what is left of the document at a cut is dropped.

    Args:
        leftover: (l,) tokens of whole documents, l < max_length.
        tokens: (t,) tokens of the documents, in order.
        document_lengths: (d,) number of tokens of each document, summing to t.
        max_length: tokens in a sample.

    Returns:
        Samples (n, max_length) and the new leftover.
    """
    samples = []
    ends = np.cumsum(document_lengths)
    first, start = 0, 0
    while first < len(ends):
        # The document in which the sample fills up: the first whose end reaches max_length - len(leftover) tokens after `start`.
        fills = int(np.searchsorted(ends, start + max_length - len(leftover)))
        if fills == len(ends):
            leftover = np.concatenate((leftover, tokens[start:]))
            break
        samples.append(np.concatenate((leftover, tokens[start : start + max_length - len(leftover)])))
        leftover, start, first = empty_tokens(), int(ends[fills]), fills + 1
    stacked = np.stack(samples) if samples else np.zeros((0, max_length), dtype=TOKEN_DTYPE)
    return stacked, leftover.copy()


def separator_warnings(bos_text: str, eos_text: str, bos_tokens: list[int], eos_tokens: list[int], adds_bos: bool, adds_eos: bool) -> list[str]:
    """What a user should know about the separators before hours of tokenising.

    Args:
        bos_text: text put before each document.
        eos_text: text put after each document.
        bos_tokens: ids of ``bos_text``.
        eos_tokens: ids of ``eos_text``.
        adds_bos: the tokenizer puts its BOS before every text by itself.
        adds_eos: the tokenizer puts its EOS after every text by itself.

    Returns:
        One sentence per finding.
    """
    found = []
    for flag, text, tokens in (('bos_text', bos_text, bos_tokens), ('eos_text', eos_text, eos_tokens)):
        if len(tokens) > 1:
            found.append(
                f'{flag} {text!r} is {len(tokens)} tokens {tokens} with this tokenizer, not one: choose one of its special tokens if a single separator is meant.'
            )
    if adds_bos and bos_text:
        found.append(f'the tokenizer puts its own BOS before every document, and bos_text {bos_text!r} comes on top of it.')
    if adds_eos and eos_text:
        found.append(f'the tokenizer puts its own EOS after every document, and eos_text {eos_text!r} comes on top of it.')
    if not (adds_bos or adds_eos or bos_text or eos_text):
        found.append(
            "nothing separates the documents: the tokenizer adds no BOS and no EOS, and bos_text and eos_text are empty. Pass eos_text, for example '<|endoftext|>'."
        )
    return found
