"""Opens input files, compressed or not, told apart by their first bytes; a truncated file is an error, not a short file."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from typing import Any, BinaryIO

from llmfoundry.errors import DataError

__all__ = ['COMPRESSED_SUFFIXES', 'DECOMPRESSION_ERRORS', 'broken_file', 'open_input']

COMPRESSED_SUFFIXES = ('.gz', '.zst', '.zstd', '.xz', '.bz2')
_MAGIC = {b'\x1f\x8b': 'gz', b'\x28\xb5\x2f\xfd': 'zst', b'\xfd7zXZ\x00': 'xz', b'BZh': 'bz2'}
DECOMPRESSION_ERRORS = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)
_CHUNK_BYTES = 1 << 18


class _ZstdFile(io.RawIOBase):
    """Reads any number of zstd frames. ``zstandard``'s own stream reader takes a file cut in mid-frame for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._new = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._restart()

    def _restart(self) -> None:
        self._raw.seek(0)
        self._frame: Any = None
        self._input = self._output = b''
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        target = offset + (self._position if whence == io.SEEK_CUR else 0)
        if target < self._position:
            self._restart()
        while self._position < target and self.read(min(target - self._position, _CHUNK_BYTES)):
            continue
        return self._position

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._raw.read(_CHUNK_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError('Compressed file ended before the end-of-frame marker was reached')
                return 0
            self._frame = self._frame or self._new()
            try:
                self._output = self._frame.decompress(self._input)
            except self._error as e:
                raise EOFError(str(e)) from None
            self._input = b''
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        self._position += count
        return count


def open_input(path: str) -> tuple[BinaryIO, BinaryIO]:
    """Opens a local file.

    Returns:
        The decompressed stream, and the raw one, whose ``tell`` says how much of the file has been read.
    """
    raw = open(path, 'rb')  # noqa: SIM115
    head = raw.read(6)
    raw.seek(0)
    kind = next((k for magic, k in _MAGIC.items() if head.startswith(magic)), None)
    if kind == 'bz2' and not path.endswith('.bz2'):
        kind = None
    if kind == 'gz':
        return gzip.GzipFile(fileobj=raw, mode='rb'), raw
    if kind == 'zst':
        return io.BufferedReader(_ZstdFile(raw), _CHUNK_BYTES), raw
    if kind == 'xz':
        return lzma.LZMAFile(raw, 'rb'), raw
    if kind == 'bz2':
        return bz2.BZ2File(raw, 'rb'), raw
    return raw, raw


def broken_file(path: str, error: Exception) -> DataError:
    """The error for a compressed file that ends early or is damaged.

    It stops the run whatever ``--on_bad_row`` says: the rest of the file is lost.
    """
    return DataError(f'the compressed file is damaged or cut short ({error}). Copy or download it again.', file=path)
