"""From raw bytes of an input file to texts, with every unusable row named by file and line. Pure functions, run in the workers."""

from __future__ import annotations

import json
from typing import Any, Callable, Iterator, NamedTuple, TypeVar

__all__ = ['PAIR_COLUMNS', 'BadRow', 'Document', 'Segment', 'documents_of', 'pair_of_row', 'text_of_row', 'values_of_lines']

T = TypeVar('T')

TEXT_COLUMN = 'text'
PAIR_COLUMNS = ('prompt', 'generation')


class Segment(NamedTuple):
    """A piece of one input file.

    ``kind`` says what ``data`` is: ``jsonl`` (bytes of whole lines), ``text`` (bytes of running text), ``rows`` (a list of texts, or of BadRow
    messages). ``first`` is the 1-based number of the first line or row; ``starts`` and ``ends`` say whether the file's first and last byte are in
    it (text only).
    """

    kind: str
    file: str
    first: int
    data: Any
    starts: bool = True
    ends: bool = True


class BadRow(NamedTuple):
    """A row that cannot be used. ``line`` is 1-based; None when the whole file is meant."""

    file: str
    line: int | None
    message: str


class Document(NamedTuple):
    """A text, and whether separators belong before and after it."""

    text: str
    bos: bool = True
    eos: bool = True


def documents_of(segment: Segment) -> tuple[list[Document], list[BadRow]]:
    """The documents of a segment, in order, and its unusable rows."""
    return {'jsonl': _from_jsonl, 'text': _from_text, 'rows': _from_rows}[segment.kind](segment)


def text_of_row(row: Any) -> str:
    """The text of a decoded JSON row.

    Raises:
        ValueError: with what is wrong.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object with a 'text' field, got {_kind(row)}")
    if TEXT_COLUMN not in row:
        keys = ', '.join(repr(k) for k in sorted(row)[:8])
        raise ValueError(f"no 'text' field; the row has {keys or 'no fields'}")
    return checked_text(row[TEXT_COLUMN])


def pair_of_row(row: Any) -> tuple[str, str]:
    """The prompt and the generation of a decoded JSON row.

    Raises:
        ValueError: with what is wrong.
    """
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object with 'prompt' and 'generation', got {_kind(row)}")
    for name in PAIR_COLUMNS:
        if name not in row:
            keys = ', '.join(repr(k) for k in sorted(row)[:8])
            raise ValueError(f"no {name!r} field; the row has {keys or 'no fields'}")
    prompt, generation = (checked_text(row[name], name) for name in PAIR_COLUMNS)
    return prompt, generation


def checked_text(value: Any, name: str = TEXT_COLUMN) -> str:
    """``value`` if it is text that can be encoded; ``name`` is the field that it comes from.

    Raises:
        ValueError: with what is wrong.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a string, got {_kind(value)}")
    if not value.isascii():
        try:
            value.encode('utf-8')
        except UnicodeEncodeError as e:
            raise ValueError(
                f"{name!r} holds half of a surrogate pair (\\u{ord(value[e.start]):04x} at character {e.start}), which is no Unicode text"
            ) from None
    return value


def _kind(value: Any) -> str:
    names = {type(None): 'null', bool: 'a boolean', int: 'a number', float: 'a number', list: 'an array', dict: 'an object', str: 'a string'}
    return names.get(type(value), type(value).__name__)


def _from_jsonl(segment: Segment) -> tuple[list[Document], list[BadRow]]:
    found = list(values_of_lines(segment, text_of_row))
    return [Document(value) for value in found if not isinstance(value, BadRow)], [value for value in found if isinstance(value, BadRow)]


def values_of_lines(segment: Segment, convert: Callable[[Any], T]) -> Iterator[T | BadRow]:
    """``convert`` of the row on each line that is not blank, or a ``BadRow`` where it raises ValueError or the line is not JSON."""
    try:
        # Split at newlines only: str.splitlines would also cut at characters that may stand inside JSON strings.
        lines: list[Any] = segment.data.decode('utf-8').split('\n')
    except UnicodeDecodeError:
        lines = segment.data.split(b'\n')
    for number, line in enumerate(lines, segment.first):
        if not line or line.isspace():
            continue
        try:
            yield convert(_row_of_line(line, number))
        except ValueError as e:
            yield BadRow(segment.file, number, str(e))


def _row_of_line(line: str | bytes, number: int) -> Any:
    if isinstance(line, bytes):
        line = _decode(line)
    if number == 1 and line.startswith('\ufeff'):
        line = line[1:]
    try:
        return json.loads(line)
    except json.JSONDecodeError as e:
        shown = line.strip()
        shown = shown if len(shown) <= 40 else shown[:40] + '...'
        raise ValueError(f'not JSON ({e.msg.removesuffix(" at")} at column {e.colno}): {shown}') from None
    except RecursionError:
        raise ValueError('not usable JSON: nested too deeply') from None


def _decode(data: bytes) -> str:
    try:
        return data.decode('utf-8')
    except UnicodeDecodeError as e:
        raise ValueError(f'not UTF-8 (byte 0x{data[e.start]:02x} at byte {e.start} of the line)') from None


def _from_text(segment: Segment) -> tuple[list[Document], list[BadRow]]:
    try:
        text = segment.data.decode('utf-8')
    except UnicodeDecodeError as e:
        message = f'not UTF-8 (byte 0x{segment.data[e.start]:02x}, {segment.first - 1 + e.start} bytes into the file)'
        # Other pieces of the file may be kept already: its separators stay, so that it does not run into its neighbours.
        empty = [] if segment.starts and segment.ends else [Document('', segment.starts, segment.ends)]
        return empty, [BadRow(segment.file, None, message)]
    return [Document(text, segment.starts, segment.ends)], []


def _from_rows(segment: Segment) -> tuple[list[Document], list[BadRow]]:
    documents, bad = [], []
    for number, value in enumerate(segment.data, segment.first):
        if isinstance(value, BadRow):
            bad.append(value)
            continue
        try:
            documents.append(Document(checked_text(value)))
        except ValueError as e:
            bad.append(BadRow(segment.file, number, str(e)))
    return documents, bad
