"""Checks the zip archive that ``torch.save`` writes, without reading what is in it.

torch's own check comes with loading: it needs the memory of the whole checkpoint, ends in messages that name neither file nor record, and is skipped when the file is memory-mapped.
Here each record is compared with its CRC32 in pieces. Python's ``zipfile`` would do that too, but takes the number of entries, sizes and offsets on trust; torch does not, so a file that
``zipfile`` accepts may still not load. The archive may be a part of a larger file, as the items of a sharded checkpoint are.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO, Sequence

__all__ = ['NotWhole', 'ZipRecord', 'damaged_record', 'is_legacy', 'read_directory']

_END = struct.Struct('<4s4H2LH')
_END64 = struct.Struct('<4sQ2H2L4Q')
_LOCATOR = struct.Struct('<4sLQL')
_CENTRAL = struct.Struct('<4s6H3L5H2L')
_LOCAL = struct.Struct('<4s5H3L2H')
_STORED = 0
_ZIP64_EXTRA = 1
_PIECE_BYTES = 4 << 20
# How a file in torch's format from before 1.6 begins: two pickles of fixed numbers.
_LEGACY_START = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'


class NotWhole(ValueError):
    """What is wrong with an archive, in words."""


@dataclass(frozen=True)
class ZipRecord:
    """One record: its name, where its header starts in the file, its length and checksum."""

    name: bytes
    start: int
    size: int
    crc: int
    flags: int


def is_legacy(file: BinaryIO) -> bool:
    """Whether the file is in torch's old format, which has no checksums."""
    file.seek(0)
    return file.read(len(_LEGACY_START)) == _LEGACY_START


def read_directory(file: BinaryIO, offset: int, length: int) -> list[ZipRecord]:
    """The records of the archive in the ``length`` bytes from ``offset``.

    Raises:
        NotWhole: cut short, or the directory contradicts itself.
    """
    tail_size = min(length, _END.size + _LOCATOR.size + _END64.size)
    tail = _read(file, offset + length - tail_size, tail_size)
    if tail_size < _END.size or tail[-_END.size :][:4] != b'PK\x05\x06':
        raise NotWhole('the directory at the end of the archive is missing: it was cut short, or is another kind of file')
    _, disk, first_disk, here, count, size, start, comment = _END.unpack(tail[-_END.size :])
    directory_end = length - _END.size
    if len(tail) == _END.size + _LOCATOR.size + _END64.size and tail[_END64.size : _END64.size + 4] == b'PK\x06\x07':
        directory_end -= _LOCATOR.size + _END64.size
        wide = _END64.unpack(tail[: _END64.size])
        narrow = (min(wide[6], 0xFFFF), min(wide[7], 0xFFFF), min(wide[8], 0xFFFFFFFF), min(wide[9], 0xFFFFFFFF))
        locator = _LOCATOR.unpack(tail[_END64.size : _END64.size + _LOCATOR.size])
        if wide[0] != b'PK\x06\x06' or any(value not in (small, cap) for value, small, cap in zip((here, count, size, start), narrow, (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF), strict=True)):
            raise NotWhole('the two ends of its directory differ')
        if locator[1:] != (0, directory_end, 1) or wide[1] != _END64.size - 12 or wide[4:6] != (0, 0):
            raise NotWhole('the end of its directory is damaged')
        here, count, size, start = wide[6:]
    if comment or disk or first_disk or here != count or start + size != directory_end:
        raise NotWhole('the end of its directory is damaged')
    return _parse_directory(_read(file, offset + start, size), count, start)


def _parse_directory(data: bytes, count: int, end: int) -> list[ZipRecord]:
    """The entries of the central directory, in the order of their places."""
    records = []
    position = 0
    for _ in range(count):
        if len(data) - position < _CENTRAL.size or data[position : position + 4] != b'PK\x01\x02':
            raise NotWhole('an entry of its directory is damaged')
        fields = _CENTRAL.unpack_from(data, position)
        flags, method, crc, packed, size = fields[3], fields[4], fields[7], fields[8], fields[9]
        name_length, extra_length, start = fields[10], fields[11], fields[16]
        position += _CENTRAL.size
        name = data[position : position + name_length]
        extra = data[position + name_length : position + name_length + extra_length]
        position += name_length + extra_length
        size, packed, start = _widen(extra, size, packed, start)
        # fields 12 and 13: comment and disk, which torch does not use
        if method != _STORED or size != packed or fields[12] or fields[13]:
            raise NotWhole(f'the record {_shown(name)} is not stored as torch stores records')
        records.append(ZipRecord(name, start, size, crc, flags))
    if position != len(data) or not records:
        raise NotWhole('its directory is damaged' if records else 'the archive is empty')
    records.sort(key=lambda r: r.start)
    for record, after in zip(records, [*(r.start for r in records[1:]), end], strict=True):
        if record.start + _LOCAL.size + len(record.name) + record.size > after:
            raise NotWhole(f'the record {_shown(record.name)} reaches into the next one')
    if not any(r.name.endswith(b'/data.pkl') for r in records):
        raise NotWhole('it has no record data.pkl, so torch did not write it')
    return records


def _widen(extra: bytes, size: int, packed: int, start: int) -> tuple[int, int, int]:
    """Sizes and places over 4 GiB stand in an extra field, in this order, those that do not fit."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from('<2H', extra)
        if kind == _ZIP64_EXTRA:
            wide = iter(struct.unpack_from(f'<{min(length, len(extra) - 4) // 8}Q', extra, 4))
            size, packed, start = (next(wide, value) if value == 0xFFFFFFFF else value for value in (size, packed, start))
        extra = extra[4 + length :]
    return size, packed, start


def damaged_record(file: BinaryIO, offset: int, records: Sequence[ZipRecord]) -> str | None:
    """The first of ``records`` whose bytes are not those that were written, with the cause; None if all are."""
    piece = memoryview(bytearray(min(_PIECE_BYTES, max((r.size for r in records), default=0))))
    for record in records:
        header = _read(file, offset + record.start, _LOCAL.size)
        fields = _LOCAL.unpack(header) if len(header) == _LOCAL.size else None
        if fields is None or fields[0] != b'PK\x03\x04' or fields[2:4] != (record.flags, _STORED) or fields[9] != len(record.name):
            return f'the header of the record {_shown(record.name)} is damaged'
        if file.read(len(record.name)) != record.name:
            return f'the name of the record {_shown(record.name)} is damaged'
        file.seek(fields[10], 1)
        crc, left = 0, record.size
        while left:
            got = file.readinto(piece[: min(left, len(piece))])  # type: ignore[attr-defined]
            if not got:
                return f'the record {_shown(record.name)} is cut short by {left:,} bytes'
            crc = zlib.crc32(piece[:got], crc)
            left -= got
        if crc != record.crc:
            return f'the record {_shown(record.name)} ({record.size:,} bytes) has the CRC32 {crc:08x}, not {record.crc:08x} as when it was written'
    return None


def _read(file: BinaryIO, position: int, size: int) -> bytes:
    if position < 0:
        raise NotWhole('the end of its directory is damaged')
    file.seek(position)
    data = file.read(size)
    if len(data) != size:
        raise NotWhole(f'it is cut short by {size - len(data):,} bytes')
    return data


def _shown(name: bytes) -> str:
    return name.decode(errors='replace').partition('/')[2] or repr(name)
