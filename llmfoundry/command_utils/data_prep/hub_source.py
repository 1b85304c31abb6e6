"""Data sets for ``convert_dataset_hf``: the splits of the known Hub data sets, streamed row by row, and local or remote folders that hold
the same files."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any, Iterator

from llmfoundry.command_utils.data_prep import remote
from llmfoundry.command_utils.data_prep.convert_dataset_json import JSON_PATTERNS, find_files
from llmfoundry.command_utils.data_prep.readers import BLOCK_BYTES, Block, FileSource, Position
from llmfoundry.command_utils.data_prep.rows import BadRow, Segment, text_of_row

__all__ = ['HUB_DATASETS', 'HubSource', 'SplitSpec', 'resolve_dataset', 'split_source']


@dataclass(frozen=True)
class SplitSpec:
    """A split of ours: the Hub's split that it is taken from, and how many of its first rows (None: all)."""

    hub_split: str
    rows: int | None = None


_C4 = {
    'train': SplitSpec('train'),
    'train_small': SplitSpec('train', 100_000),
    'val': SplitSpec('validation'),
    'val_small': SplitSpec('validation', 10_000),
    'val_xsmall': SplitSpec('validation', 3_000),
    'val_xxsmall': SplitSpec('validation', 100),
}
_PILE = {name: spec for name, spec in _C4.items() if name != 'val_xxsmall'}
HUB_DATASETS = {'allenai/c4': _C4, 'the_pile': _PILE}
_ALIASES = {'c4': 'allenai/c4'}
_LOCAL_NAMES = {'val': ('val', 'validation', 'valid')}


def resolve_dataset(dataset: str) -> str:
    """The name of a known Hub data set, or the folder or URI.

    Raises:
        ValueError: neither.
    """
    name = _ALIASES.get(dataset, dataset)
    if name in HUB_DATASETS or remote.is_remote(dataset) or os.path.isdir(dataset):
        return name
    known = ', '.join([*sorted(HUB_DATASETS), *sorted(_ALIASES)])
    raise ValueError(
        f'--dataset {dataset} is not supported: use one of {known}, or the path or URI of a folder that holds json or parquet files for each split'
    )


def split_source(dataset: str, subset: str | None, split: str) -> Any:
    """Where the rows of ``split`` come from.

    Args:
        dataset: what ``resolve_dataset`` returned.
        subset: configuration on the Hub, or sub-folder; None for none.
        split: one of our split names.

    Raises:
        KeyError: the data set has no such split.
    """
    if dataset in HUB_DATASETS:
        splits = HUB_DATASETS[dataset]
        if split not in splits:
            raise KeyError(f'unknown split {split!r} of {dataset}: it has {", ".join(splits)}')
        return HubSource(dataset, subset, splits[split])
    return _folder_source(dataset, subset, split)


def _folder_source(root: str, subset: str | None, split: str) -> FileSource:
    inner = remote.join(root, subset) if subset else root
    if subset and (remote.is_remote(root) or os.path.isdir(inner)):
        root = inner
    files = find_files(root, (*JSON_PATTERNS, '*.parquet'))
    rows = None
    matching = _files_of(files, root, split)
    if not matching and split in _C4:
        base = 'train' if split.startswith('train') else 'val'
        matching, rows = _files_of(files, root, base), _C4[split].rows
    if not matching:
        raise KeyError(
            f'unknown split {split!r}: no json or parquet file below {root} carries that name (as in {split}.jsonl, {split}/... or ...-{split}-00000.parquet)'
        )
    kinds = {'parquet' if f.path.endswith('.parquet') else 'json' for f in matching}
    if len(kinds) > 1:
        raise ValueError(f'the split {split!r} below {root} has both json and parquet files; remove one of the two copies')
    return FileSource(matching, kinds.pop(), rows)


def _files_of(files: list[Any], root: str, split: str) -> list[Any]:
    names = set(_LOCAL_NAMES.get(split, (split,)))
    return [f for f in files if names & set(re.split(r'[/\\.-]', f.path[len(root) :]))]


class HubSource:
    """Rows of a Hub data set, streamed: nothing but the rows at hand is held or stored.

    Args:
        dataset: name on the Hub.
        subset: its configuration, None for none.
        spec: which rows.
    """

    total_bytes = None

    def __init__(self, dataset: str, subset: str | None, spec: SplitSpec) -> None:
        self._dataset, self._subset, self._spec = dataset, subset, spec

    def fingerprint(self) -> Any:
        """See ``engine.Source``."""
        return [self._dataset, self._subset, self._spec.hub_split, self._spec.rows]

    def _load(self) -> Any:
        import datasets

        return datasets.load_dataset(self._dataset, self._subset, split=self._spec.hub_split, streaming=True)

    def blocks(self, position: dict[str, int]) -> Iterator[Block]:
        """See ``engine.Source``. The position counts rows; a resumed run skips those that are done."""
        done = Position(**position).rows
        rows = self._load()
        if done:
            rows = rows.skip(done)
        where = f'{self._dataset}/{self._spec.hub_split}'
        group: list[Any] = []
        size = read = 0
        for row in rows:
            if self._spec.rows is not None and done + len(group) >= self._spec.rows:
                break
            group.append(_text(row, where, done + len(group) + 1))
            size += len(group[-1]) if isinstance(group[-1], str) else 64
            if size >= BLOCK_BYTES:
                read += size
                yield Block([Segment('rows', where, done + 1, group)], Position(rows=done + len(group)), read)
                done, group, size = done + len(group), [], 0
        if group:
            yield Block([Segment('rows', where, done + 1, group)], Position(rows=done + len(group)), read + size)


def _text(row: Any, where: str, number: int) -> str | BadRow:
    try:
        return text_of_row(row)
    except ValueError as e:
        return BadRow(where, number, str(e))
