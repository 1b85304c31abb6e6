"""Input files as a sequence of blocks of about 1 MB, the same whatever the number of processes, from any position on.

A block is what one worker encodes at a time. Positions are (file, offset in its decompressed bytes, line), so a killed run goes on where its last
checkpoint stood without tokenising anything twice. Files are read one after the other and never held in memory.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO, Callable, Iterator, NamedTuple

from llmfoundry.command_utils.data_prep.compressed import DECOMPRESSION_ERRORS, broken_file, open_input
from llmfoundry.command_utils.data_prep.remote import local_copy
from llmfoundry.command_utils.data_prep.rows import BadRow, Segment, text_of_row
from llmfoundry.errors import DataError

__all__ = ['BLOCK_BYTES', 'Block', 'FileSource', 'InputFile', 'Position']

BLOCK_BYTES = 1 << 20
_SAFE_CUT_BYTES = 1 << 16
_ROWS_PER_BLOCK = 256


@dataclass(frozen=True)
class InputFile:
    """A file to read: a path or URI, its bytes on disk (0 if unknown) and when it was changed (ns, 0 if unknown)."""

    path: str
    size: int
    mtime_ns: int = 0


@dataclass(frozen=True)
class Position:
    """Where the next block begins: index of the file, offset in its decompressed bytes, lines (or rows) of it already read, rows read in
    all files."""

    file: int = 0
    offset: int = 0
    line: int = 0
    rows: int = 0


class Block(NamedTuple):
    """Segments, the position after them, and the bytes of input read up to there (on disk, for the progress bar)."""

    segments: list[Segment]
    after: Position
    bytes_read: int


class FileSource:
    """Blocks of text from files.

    Args:
        files: in the order in which they are to be read.
        kind: ``json`` (lines or one array), ``text`` or ``parquet``.
        limit: number of rows after which to stop, None for all.
        convert: what is taken of an object of a JSON array; JSON lines and text are converted in the workers.
    """

    def __init__(self, files: list[InputFile], kind: str, limit: int | None = None, convert: Callable[[Any], Any] = text_of_row) -> None:
        self.files, self.kind, self.limit, self._convert = files, kind, limit, convert
        self.total_bytes: int | None = sum(f.size for f in files) or None

    def fingerprint(self) -> Any:
        """What must be equal for a resumed run to read the same text."""
        return [self.kind, self.limit, [asdict(f) for f in self.files]]

    def blocks(self, position: dict[str, int]) -> Iterator[Block]:
        """Blocks from ``position`` (the ``after`` of an earlier block, as a dict; {} for the beginning) on."""
        start = Position(**position)
        before = sum(f.size for f in self.files[: start.file])
        gathered: list[Segment] = []
        gathered_bytes, last = 0, None
        for block, size in self._pieces(start, before):
            gathered += block.segments
            gathered_bytes += size
            last = block
            if gathered_bytes >= BLOCK_BYTES:
                yield block._replace(segments=gathered)
                gathered, gathered_bytes, last = [], 0, None
        if last is not None:
            yield last._replace(segments=gathered)

    def _pieces(self, start: Position, before: int) -> Iterator[tuple[Block, int]]:
        """One segment at a time, with its size in bytes; small files make small pieces, which ``blocks`` gathers."""
        rows = start.rows
        for index in range(start.file, len(self.files)):
            file = self.files[index]
            position = start if index == start.file else Position(index, 0, 0, rows)
            with local_copy(file.path) as path:
                try:
                    for piece, size in self._file_pieces(path, file.path, position, before):
                        rows = piece.after.rows
                        yield piece, size
                        if self.limit is not None and rows >= self.limit:
                            return
                except DECOMPRESSION_ERRORS as e:
                    raise broken_file(file.path, e) from e
            before += file.size

    def _file_pieces(self, path: str, name: str, position: Position, before: int) -> Iterator[tuple[Block, int]]:
        if self.kind == 'parquet':
            yield from self._rows_pieces(_parquet_rows(path, name), name, position, before, self.files[position.file].size)
            return
        stream, raw = open_input(path)
        with raw, stream:
            if self.kind == 'json' and _is_array(stream):
                yield from self._rows_pieces(_array_rows(stream, name, self._convert), name, position, before, self.files[position.file].size)
                return
            stream.seek(position.offset)
            pieces = self._line_pieces if self.kind == 'json' else _text_pieces
            for segment, after in pieces(stream, name, position):
                yield Block([segment], after, before + raw.tell()), len(segment.data)

    def _line_pieces(self, stream: BinaryIO, name: str, position: Position) -> Iterator[tuple[Segment, Position]]:
        """Whole lines, about ``BLOCK_BYTES`` at a time; a longer line makes a longer piece."""
        rest: list[bytes] = []
        while True:
            chunk = stream.read(BLOCK_BYTES)
            cut = chunk.rfind(b'\n') + 1
            if chunk and not cut:
                rest.append(chunk)
                continue
            data = b''.join((*rest, chunk[:cut] if chunk else b''))
            rest = [chunk[cut:]] if chunk[cut:] else []
            if data:
                segment, position = self._limited(Segment('jsonl', name, position.line + 1, data), position)
                yield segment, position
            if not chunk:
                return

    def _limited(self, segment: Segment, position: Position) -> tuple[Segment, Position]:
        lines = segment.data.count(b'\n') + (not segment.data.endswith(b'\n'))
        if self.limit is None:
            return segment, Position(position.file, position.offset + len(segment.data), position.line + lines, 0)
        kept, rows, size = 0, position.rows, 0
        for line in segment.data.removesuffix(b'\n').split(b'\n'):
            if rows >= self.limit:
                break
            rows += bool(line.strip())
            kept, size = kept + 1, size + len(line) + 1
        data = segment.data[:size]
        return segment._replace(data=data), Position(position.file, position.offset + len(data), position.line + kept, rows)

    def _rows_pieces(self, rows: Iterator[Any], name: str, position: Position, before: int, size: int) -> Iterator[tuple[Block, int]]:
        """Rows that the parent has decoded (JSON arrays, parquet), in groups."""
        group: list[Any] = []
        group_bytes, done = 0, position.line
        for number, value in enumerate(rows):
            if number < position.line:
                continue
            if self.limit is not None and position.rows + len(group) >= self.limit:
                break
            group.append(value)
            group_bytes += _size_of(value)
            if len(group) == _ROWS_PER_BLOCK or group_bytes >= BLOCK_BYTES:
                position = replace(position, line=done + len(group), rows=position.rows + len(group))
                yield Block([Segment('rows', name, done + 1, group)], position, before), group_bytes
                done, group, group_bytes = position.line, [], 0
        if group:
            position = replace(position, line=done + len(group), rows=position.rows + len(group))
            yield Block([Segment('rows', name, done + 1, group)], position, before + size), group_bytes


def _size_of(value: Any) -> int:
    """About how many bytes a decoded row holds."""
    texts = (value,) if isinstance(value, str) else value
    return 64 + sum(len(text) for text in texts if isinstance(text, str))


def _is_array(stream: BinaryIO) -> bool:
    """Whether the file is one JSON array (and not JSON lines). Leaves the stream at its beginning."""
    head = stream.read(4096).lstrip(b'\xef\xbb\xbf \t\r\n')
    stream.seek(0)
    # A first line that is a complete array is a bad row of JSON lines, not an array of rows.
    return head.startswith(b'[') and not _is_bad_row(head.split(b'\n')[0])


def _is_bad_row(line: bytes) -> bool:
    """Whether a line is whole JSON, but not an array of objects."""
    try:
        rows = json.loads(line)
    except ValueError:
        return False
    return not (rows and all(isinstance(row, dict) for row in rows))


def _array_rows(stream: BinaryIO, name: str, convert: Callable[[Any], Any]) -> Iterator[Any]:
    """``convert`` (or BadRow) of the objects of a JSON array, read a piece at a time."""
    decoder, reader = json.JSONDecoder(), _utf8_reader(stream, name)
    text, line, ended = next(reader, '').lstrip('\ufeff'), 1, False
    at = text.index('[') + 1
    line += text.count('\n', 0, at)
    while True:
        while at < len(text) and text[at] in ' \t\r\n,':
            line += text[at] == '\n'
            at += 1
        if text[at : at + 1] == ']':
            return
        try:
            value, end = decoder.raw_decode(text, at) if at < len(text) else (None, -1)
        except json.JSONDecodeError as e:
            value, end = e, -1
        # A number may go on in the next piece; objects and strings end with their own mark.
        if end == -1 or (end == len(text) and not ended):
            more = next(reader, '')
            if not more:
                if end == -1:
                    raise DataError(
                        'the JSON array is not closed, or is not JSON from here on. Repair the file, or write one object per line.',
                        file=name,
                        line=line,
                    )
                ended = True
            text, at = text[at:] + more, 0
            continue
        try:
            yield convert(value)
        except ValueError as e:
            yield BadRow(name, line, str(e))
        line += text.count('\n', at, end)
        at = end


def _utf8_reader(stream: BinaryIO, name: str) -> Iterator[str]:
    import codecs

    decoder = codecs.getincrementaldecoder('utf-8')()
    read = 0
    while chunk := stream.read(BLOCK_BYTES):
        try:
            yield decoder.decode(chunk)
        except UnicodeDecodeError as e:
            raise DataError(
                f'not UTF-8 (byte 0x{e.object[e.start]:02x} within the megabyte from byte {read} on). Re-encode the file.', file=name
            ) from None
        read += len(chunk)


def _parquet_rows(path: str, name: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if 'text' not in names:
                raise DataError(f"no 'text' column; the file has {', '.join(map(repr, names))}. Rename the column that holds the text.", file=name)
            for batch in file.iter_batches(batch_size=_ROWS_PER_BLOCK, columns=['text']):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise DataError(f'not a readable parquet file ({e}). Copy or download it again.', file=name) from e


def _text_pieces(stream: BinaryIO, name: str, position: Position) -> Iterator[tuple[Segment, Position]]:
    """Running text in pieces of about ``BLOCK_BYTES``, cut before a single space between words, so that no word is split where that can be helped."""
    offset, rest, full = position.offset, b'', BLOCK_BYTES + _SAFE_CUT_BYTES
    while True:
        data = rest + _read_fully(stream, full - len(rest))
        last = len(data) < full
        cut = len(data) if last else _safe_cut(data)
        after = Position(position.file + 1) if last else Position(position.file, offset + cut)
        yield Segment('text', name, offset + 1, data[:cut], starts=offset == 0, ends=last), after
        if last:
            return
        rest, offset = data[cut:], offset + cut


def _read_fully(stream: BinaryIO, size: int) -> bytes:
    """``size`` bytes, fewer only at the end: decompressors answer in pieces, and where a text is cut must not depend on that."""
    parts = []
    while size and (part := stream.read(size)):
        parts.append(part)
        size -= len(part)
    return b''.join(parts)


def _safe_cut(data: bytes) -> int:
    """Where to cut: before the last single space between two words; failing that, at the end of a character."""
    at = len(data) - 1
    while (at := data.rfind(b' ', _SAFE_CUT_BYTES, at)) > 0:
        if not data[at - 1 : at].isspace() and not data[at + 1 : at + 2].isspace():
            return at
    cut = len(data)
    while cut > len(data) - 4 and data[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    return cut - 1 if data[cut - 1] >= 0xC0 else cut


def local_file(path: str) -> InputFile:
    """A local file as ``InputFile``."""
    found = os.stat(path)
    return InputFile(path, found.st_size, found.st_mtime_ns)
