"""Rows that were packed before they were saved (document 001's data preparation) -> one row per document, without padding.

The loader plans rows itself, by best fit and with a shuffle, so packed rows are taken apart at ``sequence_id`` rather than trained as they
are: examples stay apart in attention, and the fill is that of our packing, not that of the file. Arrow keeps all ids of a batch of rows in one
array, so taking apart means new offsets over the same memory-mapped ids: nothing is copied.
"""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llmfoundry.data.finetuning.targets import IGNORE_INDEX
from llmfoundry.errors import DataError

__all__ = ['one_row_per_document']

_IDS = ('input_ids', 'labels')


def one_row_per_document(rows: datasets.Dataset, source: str, fingerprint: str) -> datasets.Dataset:
    """Takes packed rows apart; others come back as they are.

    Args:
        rows: packed if they hold ``input_ids``, ``labels`` and ``sequence_id`` (number of the document of each token, negative at padding).
        source: name for errors.
        fingerprint: of ``rows``.

    Raises:
        DataError: the lists of a row differ in length.
    """
    if not {*_IDS, 'sequence_id'} <= set(rows.column_names):
        return rows
    table = rows.select_columns([*_IDS, 'sequence_id']).with_format('arrow')[:]
    batches, kept, done = [], [], 0
    for batch in table.to_batches():
        documents, is_document = _split_batch(batch, source, done)
        batches.append(documents)
        kept.append(is_document)
        done += batch.num_rows
    if not batches:
        return rows
    split = pa.Table.from_batches(batches)
    found = datasets.Dataset(datasets.table.InMemoryTable(split), fingerprint=f'{fingerprint[:16]}-documents')
    return found.select(np.flatnonzero(np.concatenate(kept)))


def _split_batch(batch: pa.RecordBatch, source: str, first_row: int) -> tuple[pa.RecordBatch, np.ndarray]:
    """The documents and stretches of padding of a batch, in order, and which of them are documents."""
    lengths = {name: pc.fill_null(pc.list_value_length(batch.column(name)), 0).to_numpy(zero_copy_only=False) for name in batch.schema.names}
    for name in batch.schema.names:
        wrong = np.flatnonzero(lengths[name] != lengths['input_ids'])
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f'row {first_row + row} has {lengths["input_ids"][row]} input_ids but {lengths[name][row]} {name}; they stand side by side', file=source
            )
    ids, labels = (batch.column(name).flatten() for name in _IDS)
    sequence = batch.column('sequence_id').flatten().to_numpy(zero_copy_only=False)
    row_of_token = np.repeat(np.arange(batch.num_rows), lengths['input_ids'])
    changes = np.flatnonzero((np.diff(sequence) != 0) | (np.diff(row_of_token) != 0)) + 1
    starts = np.concatenate([[0], changes]) if len(sequence) else np.zeros(0, np.int64)
    first_labels = labels.take(pa.array(starts)).to_numpy(zero_copy_only=False)
    if np.any(first_labels != IGNORE_INDEX):
        # Nothing comes before it that could predict it. Without this, a document without a prompt would have no -100 and read as a prompt and its response.
        values = labels.to_numpy(zero_copy_only=False).copy()
        values[starts] = IGNORE_INDEX
        labels = pa.array(values, type=labels.type)
    offsets = pa.array(np.concatenate([starts, [len(sequence)]]), type=pa.int64())
    lists = [pa.LargeListArray.from_arrays(offsets, values) for values in (ids, labels)]
    return pa.RecordBatch.from_arrays(lists, names=list(_IDS)), sequence[starts] >= 0
