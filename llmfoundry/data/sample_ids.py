"""Which samples a batch holds: a key ``sample_ids`` beside the tensors, one list of ids for each row, taken out before the model sees the batch.

An id is the number of a sample in its data set, the same in every epoch and for any number of ranks. A packed row has the ids of all its documents, a row that only keeps a rank busy has none.
The ids travel with the sample as an attribute rather than as a key, so that collators of plug-ins get exactly the keys they expect.
"""

from __future__ import annotations

from typing import Any, Mapping, MutableMapping, Sequence

import numpy as np

__all__ = ['SAMPLE_IDS', 'Sample', 'flat_ids', 'ids_per_row', 'silence_idle_rows', 'with_sample_ids', 'without_sample_ids']

SAMPLE_IDS = 'sample_ids'
_IGNORE_INDEX = -100


class Sample(dict):
    """A sample that knows its number.

    Args:
        columns: of the sample.
        sample_ids: its number in the data set; none for a sample that only keeps a rank busy.
    """

    __slots__ = ('sample_ids',)

    def __init__(self, columns: Mapping[str, Any], sample_ids: tuple[int, ...]) -> None:
        super().__init__(columns)
        self.sample_ids = sample_ids


def ids_per_row(examples: Sequence[Any]) -> list[list[int]] | None:
    """The ids of each example, for the collator that makes one row of each; None if some example does not know its own."""
    found = [getattr(example, SAMPLE_IDS, None) for example in examples]
    return None if any(ids is None for ids in found) else [list(ids) for ids in found]  # type: ignore[arg-type]


def flat_ids(batch: Any) -> np.ndarray | None:
    """All ids of a batch, int64; None if it has none."""
    rows = batch.get(SAMPLE_IDS) if isinstance(batch, Mapping) else None
    return None if rows is None else np.fromiter((number for row in rows for number in row), dtype=np.int64)


def with_sample_ids(batch: dict[str, Any], rows: list[list[int]] | None) -> dict[str, Any]:
    """The batch with the ids of its rows, if they are known."""
    return batch if rows is None else {**batch, SAMPLE_IDS: rows}


def without_sample_ids(batch: Any) -> Any:
    """The batch as the model gets it."""
    return {key: value for key, value in batch.items() if key != SAMPLE_IDS} if isinstance(batch, Mapping) and SAMPLE_IDS in batch else batch


def silence_idle_rows(batch: MutableMapping[str, Any], rows: Sequence[Sequence[int]]) -> None:
    """Takes the targets of rows without a sample away."""
    idle = [number for number, ids in enumerate(rows) if not ids]
    if idle and batch.get('labels') is not None:
        batch['labels'][idle] = _IGNORE_INDEX
