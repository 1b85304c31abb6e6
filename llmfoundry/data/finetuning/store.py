"""Token ids on disk: a read-only, memory-mapped store of stitched examples, written in parts.

One int32 word per token: the id itself, or its bitwise complement (a negative number) where the token is a target. So ids and mask are one
file, 4 bytes a token, and a row is one slice. The source is cut into parts by row number; a part is three files, of which the small
``.json`` is renamed into place last: it is complete or absent, and a build that is killed loses the part at hand and no other.

The trade-off against an Arrow cache: this format can hold nothing but ids and a mask; in return it needs no offsets column, no schema and no
copy, and the file size and checksums of each part are known, so that a damaged one is found and made anew alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Iterable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np

from llmfoundry.whole_files import appearing_whole, write_whole

__all__ = ['EncodedRow', 'StoreCounts', 'StorePlan', 'TokenStore', 'part_is_whole', 'read_plan', 'remove_leftovers', 'write_part', 'write_plan', 'write_store']

FORMAT = 1
EMPTY_PROMPT, EMPTY_RESPONSE, NO_TARGET = 'empty_prompt', 'empty_response', 'no_target'
_PLAN = 'plan.json'
_FEWEST_ROWS, _MOST_PARTS = 4096, 1024


class EncodedRow(NamedTuple):
    """What became of one row of the source.

    Attributes:
        ids: int32 token ids (length,), None if the row is dropped.
        targets: bool (length,), True where the token is trained.
        dropped: why the row is dropped (``empty_prompt``, ``empty_response``, ``no_target``), else None.
        cut_tokens: tokens that truncation took off.
    """

    ids: np.ndarray | None
    targets: np.ndarray | None
    dropped: str | None = None
    cut_tokens: int = 0


@dataclass(frozen=True)
class StoreCounts:
    """What a store holds and what was left out, in rows unless the name says tokens."""

    rows: int = 0
    kept: int = 0
    empty_prompt: int = 0
    empty_response: int = 0
    no_target: int = 0
    truncated: int = 0
    truncated_tokens: int = 0
    tokens: int = 0
    target_tokens: int = 0

    @property
    def dropped(self) -> int:
        """Rows of the source that the store does not hold."""
        return self.rows - self.kept

    def __add__(self, other: StoreCounts) -> StoreCounts:
        return StoreCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class StorePlan:
    """How a source is cut into parts.

    Attributes:
        rows: rows of the source.
        rows_per_part: source rows of each part but the last.
        source: name of the source, for messages.
        made_from: everything the ids depend on, for a reader of the cache folder.
    """

    rows: int
    rows_per_part: int
    source: str
    made_from: Mapping[str, Any]

    @classmethod
    def for_rows(cls, rows: int, source: str, made_from: Mapping[str, Any] | None = None) -> StorePlan:
        """Parts of at least 4,096 rows, and at most 1,024 parts, since each is one memory map."""
        return cls(rows, max(_FEWEST_ROWS, -(-rows // _MOST_PARTS)), source, dict(made_from or {}))

    @property
    def parts(self) -> int:
        """Number of parts, 0 for an empty source."""
        return -(-self.rows // self.rows_per_part)

    def span(self, part: int) -> tuple[int, int]:
        """First source row of a part, and the one after its last."""
        return part * self.rows_per_part, min(self.rows, (part + 1) * self.rows_per_part)


def _paths(folder: Path, part: int) -> tuple[Path, Path, Path]:
    stem = f'part-{part:05d}'
    return folder / f'{stem}.tokens', folder / f'{stem}.rows', folder / f'{stem}.json'


def _temporary(path: Path) -> Path:
    return path.with_name(f'{path.name}.{socket.gethostname()}-{os.getpid()}.tmp')


def _write(path: Path, data: bytes) -> None:
    write_whole(path, data, _temporary(path))


def write_plan(folder: Path, plan: StorePlan) -> None:
    """Puts the plan into ``folder``, which is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / _PLAN, json.dumps({'format': FORMAT, **asdict(plan)}, indent=2, default=str).encode())


def read_plan(folder: Path) -> StorePlan | None:
    """The plan of a store folder, None if there is none that this version can read."""
    try:
        found = json.loads((folder / _PLAN).read_text(encoding='utf-8'))
        if found.pop('format') != FORMAT:
            return None
        return StorePlan(**found)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_part(folder: Path, plan: StorePlan, part: int, rows: Iterable[EncodedRow]) -> StoreCounts:
    """Writes one part as its rows come.

    Args:
        folder: of the store.
        plan: of the store.
        part: number of the part.
        rows: one for each source row of ``plan.span(part)``, in order. Only one is held at a time.

    Returns:
        The counts of this part.

    Raises:
        RuntimeError: there were more or fewer rows than the span has.
    """
    token_path, row_path, json_path = _paths(folder, part)
    # A damaged part must not look whole while it is made anew.
    json_path.unlink(missing_ok=True)
    first, stop = plan.span(part)
    with appearing_whole(token_path, _temporary(token_path)) as temporary:  # a killed process leaves it to the next builder
        with open(temporary, 'wb', buffering=1 << 20) as f:
            counts, index, checksum = _write_tokens(f, rows, first)
        if counts['rows'] != stop - first:
            raise RuntimeError(f'part {part} of {plan.source} got {counts["rows"]} rows instead of {stop - first}')
    # (kept, 2): row of the source, length in tokens.
    table = np.asarray(index, dtype='<i8').reshape(-1, 2).tobytes()
    _write(row_path, table)
    entry = {'counts': counts, 'tokens_crc32': checksum, 'rows_crc32': zlib.crc32(table)}
    _write(json_path, json.dumps(entry).encode())
    return StoreCounts(**counts)


def _write_tokens(file: BinaryIO, rows: Iterable[EncodedRow], first: int) -> tuple[dict[str, int], list[tuple[int, int]], int]:
    """Writes the words of rows; returns the counts, (row of the source, length) of those that are kept, and the checksum of the words."""
    counts = dict.fromkeys((f.name for f in fields(StoreCounts)), 0)
    index: list[tuple[int, int]] = []
    checksum = 0
    for number, row in enumerate(rows, first):
        counts['rows'] += 1
        if row.ids is None or row.targets is None:
            counts[row.dropped or NO_TARGET] += 1
            continue
        data = np.where(row.targets, ~row.ids, row.ids).astype('<i4', copy=False).tobytes()
        file.write(data)
        checksum = zlib.crc32(data, checksum)
        index.append((number, len(row.ids)))
        counts['tokens'] += len(row.ids)
        counts['target_tokens'] += int(np.count_nonzero(row.targets))
        counts['truncated'] += bool(row.cut_tokens)
        counts['truncated_tokens'] += row.cut_tokens
    counts['kept'] = len(index)
    return counts, index, checksum


class _Part(NamedTuple):
    counts: StoreCounts
    table: np.ndarray
    tokens_crc32: int


def _read_part(folder: Path, part: int) -> _Part | None:
    """The index of a part; None if it is absent or its files do not have the sizes and checksum that its ``.json`` gives."""
    token_path, row_path, json_path = _paths(folder, part)
    try:
        entry = json.loads(json_path.read_text(encoding='utf-8'))
        counts = StoreCounts(**entry['counts'])
        data = row_path.read_bytes()
        if token_path.stat().st_size != 4 * counts.tokens or len(data) != 16 * counts.kept or zlib.crc32(data) != entry['rows_crc32']:
            return None
        table = np.frombuffer(data, dtype='<i8').reshape(-1, 2)
        return _Part(counts, table, int(entry['tokens_crc32'])) if int(table[:, 1].sum()) == counts.tokens else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def part_is_whole(folder: Path, part: int) -> bool:
    """Whether a part is there undamaged, its ids read and compared with their checksum (about 1 GB/s)."""
    found = _read_part(folder, part)
    if found is None:
        return False
    checksum = 0
    with open(_paths(folder, part)[0], 'rb') as f:
        while block := f.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum == found.tokens_crc32


class TokenStore:
    """Stitched examples, memory-mapped. Reads nothing but what is asked for; pickles as its path.

    Args:
        folder: with a plan and all its parts.

    Attributes:
        folder: where it lies.
        source: name of the source, for messages.
        lengths: int32 (rows,), tokens of each example.
        row_ids: int64 (rows,), index of each example in the source.
        counts: what was kept and what was left out.

    Raises:
        FileNotFoundError: the folder is no complete store.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        plan = read_plan(self.folder)
        if plan is None:
            raise FileNotFoundError(f'{folder}: no token store (there is no {_PLAN})')
        parts: list[_Part] = []
        for number in range(plan.parts):
            part = _read_part(self.folder, number)
            if part is None:
                raise FileNotFoundError(f'{folder}: part {number} of {plan.parts} is missing or damaged')
            parts.append(part)
        self.source = plan.source
        self.made_from = dict(plan.made_from)
        self.counts = sum((p.counts for p in parts), StoreCounts())
        table = np.concatenate([p.table for p in parts]) if parts else np.zeros((0, 2), dtype=np.int64)
        self.row_ids = np.ascontiguousarray(table[:, 0])
        self.lengths = table[:, 1].astype(np.int32)
        # First example of each part, and where each example begins in the file of its part.
        self._first = np.cumsum([0, *(p.counts.kept for p in parts)])
        ends = np.cumsum(table[:, 1])
        starts = ends - table[:, 1]
        part_of = np.repeat(np.arange(len(parts)), [p.counts.kept for p in parts])
        first_token = np.cumsum([0, *(p.counts.tokens for p in parts)])
        self._starts = starts - first_token[part_of] if len(table) else starts
        self._maps: list[np.ndarray | None] = [None] * len(parts)
        self.digest = f'{zlib.crc32(json.dumps([[p.tokens_crc32, p.counts.tokens, p.counts.kept] for p in parts]).encode()):08x}'

    def __len__(self) -> int:
        return len(self.lengths)

    def __repr__(self) -> str:
        return f'TokenStore({self.source}: {len(self):,} examples, {self.counts.tokens:,} tokens, in {self.folder})'

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self.folder),)

    def words(self, index: int) -> np.ndarray:
        """The words of an example as they are stored, int32 (length,): an id, or the complement of the id of a target. Not to be written to."""
        if not 0 <= index < len(self):
            raise IndexError(f'example {index} of a store with {len(self)}')
        part = int(np.searchsorted(self._first, index, side='right')) - 1
        tokens = self._maps[part]
        if tokens is None:
            # A plain view, since slicing a memmap costs ten times as much.
            tokens = np.asarray(np.memmap(_paths(self.folder, part)[0], dtype='<i4', mode='r'))
            self._maps[part] = tokens
        start = int(self._starts[index])
        return tokens[start : start + int(self.lengths[index])]

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (length,) and targets bool (length,) of an example."""
        words = self.words(index)
        # x ^ -1 is ~x and x ^ 0 is x.
        return words ^ (words >> 31), words < 0

    def labels(self, index: int) -> np.ndarray:
        """int32 (length,): the id where the token is a target, -100 elsewhere."""
        words = self.words(index)
        return np.where(words < 0, ~words, -100).astype(np.int32, copy=False)


def write_store(folder: str | os.PathLike[str], rows: Sequence[EncodedRow | tuple[np.ndarray, np.ndarray]], source: str = 'rows') -> TokenStore:
    """Writes a store of rows that are at hand: (ids, targets) pairs or ``EncodedRow``."""
    plan = StorePlan.for_rows(len(rows), source)
    write_plan(Path(folder), plan)
    for part in range(plan.parts):
        write_part(Path(folder), plan, part, _encoded(rows[slice(*plan.span(part))]))
    return TokenStore(folder)


def _encoded(rows: Iterable[EncodedRow | tuple[np.ndarray, np.ndarray]]) -> Iterator[EncodedRow]:
    for row in rows:
        yield row if isinstance(row, EncodedRow) else EncodedRow(np.asarray(row[0], dtype=np.int32), np.asarray(row[1], dtype=bool))


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Removes the files of a store that match, such as the temporary ones of killed builds. To be called by the only builder."""
    for path in folder.glob(pattern):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
