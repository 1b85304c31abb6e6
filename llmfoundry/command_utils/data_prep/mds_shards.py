"""Writes MDS shards that are byte for byte what ``streaming.MDSWriter`` writes, from whole blocks of samples at once.

Streaming's own writer takes samples one by one (a cap on tokens/s once tokenising is fast), keeps an unfinished shard in memory only (nothing to
resume from), and importing it imports torch. The format is simple: uint32 sample count, uint32 offsets (n + 1), JSON config, samples; a sample is
the uint32 sizes of its variable-size columns, then their bytes. A test compares both writers' files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Mapping

import numpy as np
import xxhash

from llmfoundry.whole_files import write_whole

__all__ = ['SIZE_LIMIT_BYTES', 'ShardBuilder', 'compressor', 'index_text', 'shard_name']

SIZE_LIMIT_BYTES = 1 << 26
"""Raw bytes of a shard, Streaming's default."""

_OFFSET_BYTES = 4
# Streaming's name of the fastest hash that it knows, faster than a disk: readers compare it, so that a flipped bit is not trained on.
_HASH = 'xxh3_64'
_LEVELS = {'br': (11, 0, 11), 'bz2': (9, 1, 9), 'gz': (9, 0, 9), 'zstd': (3, 1, 22)}


def compressor(compression: str | None) -> tuple[str, Callable[[bytes], bytes]] | None:
    """The file extension and the function of ``compression``: ``zstd``, ``gz``, ``bz2``, ``br`` (each with ``:level``) or ``snappy``; None for none.

    Raises:
        ValueError: an unknown algorithm or level.
    """
    if not compression:
        return None
    name, _, level_text = compression.partition(':')
    if name == 'snappy' and not level_text:
        import snappy

        return name, snappy.compress
    if name not in _LEVELS:
        raise ValueError(
            f'compression {compression!r} is not known: use one of br, bz2, gz, snappy, zstd, with a level as in zstd:7, or leave it out'
        )
    default, low, high = _LEVELS[name]
    if level_text and not (level_text.isdigit() and low <= int(level_text) <= high):
        raise ValueError(f'compression {compression!r}: the level of {name} must be an integer from {low} to {high}')
    return name, _compress_function(name, int(level_text) if level_text else default)


def _compress_function(name: str, level: int) -> Callable[[bytes], bytes]:
    if name == 'zstd':
        import zstandard

        # Same level and same bytes for any number of threads; content size in the frame header lets readers allocate once.
        return zstandard.ZstdCompressor(level=level).compress
    if name == 'gz':
        import gzip

        # A fixed time stamp: equal input must give equal shards.
        return lambda data: gzip.compress(data, level, mtime=0)
    if name == 'bz2':
        import bz2

        return lambda data: bz2.compress(data, level)
    import brotli

    return lambda data: brotli.compress(data, quality=level)


def shard_name(number: int) -> str:
    """Streaming's name of a shard."""
    return f'shard.{number:05}.mds'


def _hashes(data: bytes) -> dict[str, str]:
    return {_HASH: xxhash.xxh3_64(data).hexdigest()}


def index_text(shards: list[dict[str, Any]]) -> str:
    """The content of ``index.json``."""
    return json.dumps({'version': 2, 'shards': shards}, sort_keys=True)


class ShardBuilder:
    """Collects samples and hands out full shards.

    Args:
        columns: name -> (MDS encoding, bytes of a value if all have the same size, else None), such as ``{'tokens': ('ndarray:int32:2048', 8192)}``
            or ``{'text': ('str', None)}``. Samples hold the columns in the order of their names, as Streaming's writer lays them out.
        compression: see ``compressor``.
        size_limit: largest raw shard in bytes.
    """

    def __init__(self, columns: Mapping[str, tuple[str, int | None]], compression: str | None, size_limit: int) -> None:
        self.config = {
            'version': 2,
            'format': 'mds',
            'compression': compression or None,
            'hashes': [_HASH],
            'size_limit': size_limit,
            'column_names': sorted(columns),
            'column_encodings': [columns[name][0] for name in sorted(columns)],
            'column_sizes': [columns[name][1] for name in sorted(columns)],
        }
        self._header = json.dumps(self.config, sort_keys=True).encode()
        self._compress = compressor(compression)
        self._limit = size_limit
        self.reset()

    def reset(self) -> None:
        """Forgets the samples of the unfinished shard."""
        self._sizes: list[np.ndarray] = []
        self._payloads: list[bytes] = []
        self.num_samples = 0
        self._raw_bytes = 2 * _OFFSET_BYTES + len(self._header)

    def room(self, sizes: np.ndarray) -> int:
        """How many of the next samples still fit, given their encoded sizes in bytes. A sample larger than the limit gets a shard of its own."""
        if not len(sizes):
            return 0
        ends = self._raw_bytes + np.cumsum(sizes.astype(np.int64) + _OFFSET_BYTES)
        fit = int(np.searchsorted(ends, self._limit, side='right'))
        return max(fit, 1) if self.num_samples == 0 else fit

    def add(self, sizes: np.ndarray, payload: bytes) -> None:
        """Adds encoded samples, laid end to end in ``payload``; the caller has asked ``room``."""
        self._sizes.append(sizes.astype(np.int64))
        self._payloads.append(payload)
        self.num_samples += len(sizes)
        self._raw_bytes += int(sizes.sum(dtype=np.int64)) + _OFFSET_BYTES * len(sizes)

    def write(self, folder: Path, number: int) -> dict[str, Any]:
        """Writes the shard into ``folder``, empties the builder, and returns the shard's entry of the index."""
        raw_name = shard_name(number)
        offsets = np.zeros(self.num_samples + 1, dtype=np.int64)
        np.cumsum(np.concatenate(self._sizes), out=offsets[1:])
        offsets += _OFFSET_BYTES * (1 + len(offsets)) + len(self._header)
        data = b''.join((np.uint32(self.num_samples).tobytes(), offsets.astype('<u4').tobytes(), self._header, *self._payloads))
        entry = {'samples': self.num_samples, 'raw_data': {'basename': raw_name, 'bytes': len(data), 'hashes': _hashes(data)}, 'zip_data': None, **self.config}
        name = raw_name
        if self._compress is not None:
            extension, function = self._compress
            data = function(data)
            name = f'{raw_name}.{extension}'
            entry['zip_data'] = {'basename': name, 'bytes': len(data), 'hashes': _hashes(data)}
        write_whole(folder / name, data)
        self.reset()
        return entry
