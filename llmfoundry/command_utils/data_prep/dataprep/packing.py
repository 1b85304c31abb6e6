"""Example packing: rows of different lengths, in their order, into rows of one length.

A row goes into the open pack if it fits whole; else the pack is padded and a new one opened. No row is ever split, and ``sequence_id``
says which tokens belong together, so that training attends within one example only. Best fit over a look-ahead would fill
more of each pack, but this order is the documented one, and the loader's own packing does the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable, Iterator

__all__ = ['TokenisedRow', 'pack_rows']

PAD_ID = 0
NO_DOCUMENT = -1


@dataclass(frozen=True)
class TokenisedRow:
    """One example.

    Attributes:
        input_ids: token ids, prompt first.
        num_prompt_tokens: how many of them are not trained.
        text: what they stand for.
    """

    input_ids: list[int]
    num_prompt_tokens: int
    text: str


def pack_rows(rows: Iterable[TokenisedRow], chunksize: int, ignore_index: int = -100) -> Iterator[dict[str, Any]]:
    """Packs rows into rows of ``chunksize`` tokens.

    Args:
        rows: the examples.
        chunksize: tokens in a packed row.
        ignore_index: label of what is not trained.

    Yields:
        ``input_ids`` (padded with 0), ``labels``, ``attention_mask`` (0 at padding), ``sequence_id`` (0, 1, ... per example, -1 at padding), each
        of length ``chunksize``, and ``full_text``.

    Raises:
        ValueError: a row is longer than ``chunksize``.
    """
    pack: list[TokenisedRow] = []
    used = 0
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        if length > chunksize:
            raise ValueError(f'row {index} has {length} tokens, which do not fit into chunksize={chunksize}; a row is never split')
        if used + length > chunksize:
            yield _packed(pack, chunksize, ignore_index)
            pack, used = [], 0
        pack.append(row)
        used += length
    if pack:
        yield _packed(pack, chunksize, ignore_index)


def _packed(pack: list[TokenisedRow], chunksize: int, ignore_index: int) -> dict[str, Any]:
    ids: list[int] = []
    labels: list[int] = []
    sequence: list[int] = []
    for number, row in enumerate(pack):
        ids += row.input_ids
        labels += [ignore_index] * row.num_prompt_tokens + row.input_ids[row.num_prompt_tokens :]
        sequence += [number] * len(row.input_ids)
    missing = chunksize - len(ids)
    return {
        'input_ids': ids + [PAD_ID] * missing,
        'labels': labels + [ignore_index] * missing,
        'attention_mask': [1] * len(ids) + [0] * missing,
        'sequence_id': sequence + [NO_DOCUMENT] * missing,
        'full_text': '\n'.join(row.text for row in pack),
    }
