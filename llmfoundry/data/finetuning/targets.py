"""Which tokens of a finetuning example are trained: stitching turns into one row, as pure functions over arrays.

A row is a pair ``(ids, targets)``: int32 token ids ``(tokens,)`` and a bool mask ``(tokens,)`` that is True where the model learns to predict the token. The mask is kept instead of
a copy of the ids with -100 in it, because a bool is a quarter of the memory and can be packed, cut and counted without knowing the ids; labels are made when a batch is collated.
"""

from __future__ import annotations

import re
from typing import Any, Collection, Mapping, Sequence

import numpy as np

__all__ = ['IGNORE_INDEX', 'ends_with_eos', 'holds_labels_of_ids', 'line_break_ids', 'prompt_threshold', 'row_from_labels', 'stitch_example', 'stitch_turns', 'truncate', 'validate_target_settings']

IGNORE_INDEX = -100
"""The label of a token that is not trained: what torch's cross entropy skips."""

_LENGTH_FORM = 'length>='
_TARGET_RESPONSES = ('last', 'all')


def prompt_threshold(target_prompts: str) -> int | None:
    """The least number of tokens at which a prompt is trained: 0 for ``all``, N for ``length>=N``, None for ``none``.

    Raises:
        ValueError: another value.
    """
    value = str(target_prompts).lower()
    if value == 'none':
        return None
    if value == 'all':
        return 0
    if not value.startswith(_LENGTH_FORM):
        raise ValueError(f'target_prompts must be "none", "all" or "length>=N" where N is a positive integer, got {target_prompts!r}')
    digits = value[len(_LENGTH_FORM) :]
    if not re.fullmatch('[0-9]+', digits):
        raise ValueError(
            f'target_prompts starts with "length>=" but {digits!r} after it is not digits (target_prompts={target_prompts!r}). Write "length>=N" with a positive integer N: '
            'prompts of at least N tokens are then trained.',
        )
    if int(digits) < 1:
        raise ValueError(f'target_prompts={target_prompts!r}: the length must be at least 1. To train every prompt, set target_prompts: all')
    return int(digits)


def validate_target_settings(target_prompts: str, target_responses: str, decoder_only_format: bool) -> None:
    """Checks the two settings (upper or lower case) and that they suit the model.

    Args:
        target_prompts: ``none``, ``all`` or ``length>=N`` (N tokens, positive).
        target_responses: ``last`` or ``all``.
        decoder_only_format: False for encoder-decoder models, which can train nothing but the last response.

    Raises:
        ValueError: a value that is none of these, or an encoder-decoder model with other settings than none and last.
    """
    if str(target_responses).lower() not in _TARGET_RESPONSES:
        raise ValueError(f'target_responses must be "last" or "all", got {target_responses!r}')
    threshold = prompt_threshold(target_prompts)
    if not decoder_only_format and (threshold is not None or str(target_responses).lower() != 'last'):
        raise ValueError(
            'When using encoder_decoder format, you must use target_prompts="none" and target_responses="last": the encoder reads all but the last response. '
            f'Got target_prompts={target_prompts!r}, target_responses={target_responses!r}',
        )


def stitch_turns(
    turns: Sequence[Mapping[str, Any]],
    target_prompts: str = 'none',
    target_responses: str = 'last',
    eos_token_id: int | None = None,
    line_breaks: Collection[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Joins the turns of one example to one row and marks what is trained.

    Args:
        turns: each holds ``input_ids``, the ids of its prompt, and ``labels``, the ids of its response.
        target_prompts: ``none``, ``all`` or ``length>=N``: which prompts are trained.
        target_responses: ``last`` or ``all``: which responses are trained.
        eos_token_id: appended to the last response, and trained, unless that response ends with it, or with it and line breaks, which chat templates put behind
            it. None appends nothing.
        line_breaks: ids of line breaks and spaces, see ``line_break_ids``.

    Returns:
        ids int32 ``(tokens,)`` and targets bool ``(tokens,)``. Nothing is cut: see ``truncate``.
    """
    threshold = prompt_threshold(target_prompts)
    every_response = str(target_responses).lower() == 'all'
    pieces: list[tuple[Sequence[int], bool]] = []
    for i, turn in enumerate(turns):
        prompt, response = turn['input_ids'], turn['labels']
        is_last = i == len(turns) - 1
        pieces.append((prompt, threshold is not None and len(prompt) >= threshold))
        pieces.append((response, every_response or is_last))
        if is_last and eos_token_id is not None and not ends_with_eos(response, eos_token_id, line_breaks):
            pieces.append(([eos_token_id], True))

    total = sum(len(ids) for ids, _ in pieces)
    ids, targets = np.empty(total, np.int32), np.zeros(total, bool)
    start = 0
    for piece, trained in pieces:
        end = start + len(piece)
        ids[start:end] = piece
        targets[start:end] = trained
        start = end
    return ids, targets


def ends_with_eos(ids: Sequence[int], eos_token_id: int, line_breaks: Collection[int] = ()) -> bool:
    """Whether a response needs no end token: it ends with one, or with one and line breaks behind it."""
    end = len(ids)
    while end and ids[end - 1] in line_breaks:
        end -= 1
    return end > 0 and ids[end - 1] == eos_token_id


def line_break_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that a tokenizer gives to line breaks and spaces: what may stand between the end token of a chat's last turn and the end of the row."""
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return frozenset(i for text in ('\n', '\n\n', ' ') for i in tokenizer(text, add_special_tokens=False)['input_ids']) - special


def holds_labels_of_ids(turn: Mapping[str, Any]) -> bool:
    """Whether ``labels`` are the labels of ``input_ids`` (-100 where nothing is trained), as data prepared outside carry them, rather than the ids of a response."""
    return bool(np.any(np.asarray(turn['labels']) == IGNORE_INDEX))


def row_from_labels(input_ids: Sequence[int], labels: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The row of an example that is stitched already: ``labels`` repeat ``input_ids`` where the token is trained and are -100 elsewhere.

    Raises:
        ValueError: the two differ in length, or a label is neither -100 nor the id at its place (labels that are shifted by one, for example).
    """
    ids, label_ids = np.asarray(input_ids, np.int64), np.asarray(labels, np.int64)
    if ids.shape != label_ids.shape or ids.ndim != 1:
        raise ValueError(f'input_ids and labels must be two lists of one length, got the shapes {ids.shape} and {label_ids.shape}')
    targets = label_ids != IGNORE_INDEX
    wrong = np.flatnonzero(targets & (label_ids != ids))
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(f'labels[{at}] is {label_ids[at]}, but must be {IGNORE_INDEX} or input_ids[{at}], which is {ids[at]}: labels are not shifted, the model does that')
    return ids.astype(np.int32), targets


def stitch_example(
    turns: Sequence[Mapping[str, Any]],
    target_prompts: str = 'none',
    target_responses: str = 'last',
    eos_token_id: int | None = None,
    line_breaks: Collection[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """The row of an example in either form: labels that mark their ids are taken as they are (``row_from_labels``), turns are stitched (``stitch_turns``)."""
    if len(turns) == 1 and holds_labels_of_ids(turns[0]):
        return row_from_labels(turns[0]['input_ids'], turns[0]['labels'])
    return stitch_turns(turns, target_prompts, target_responses, eos_token_id, line_breaks)


def truncate(ids: np.ndarray, targets: np.ndarray, max_seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a row to its first ``max_seq_len`` tokens."""
    return ids[:max_seq_len], targets[:max_seq_len]
