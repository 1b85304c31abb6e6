"""Tiny MDS datasets for tests, and the tokenizers that fit them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Iterable, Sequence

import numpy as np

__all__ = ['numbered_samples', 'shard_files', 'write_text_mds', 'write_token_mds']

EOS = 50256


def numbered_samples(num_samples: int, seq_len: int = 16) -> list[np.ndarray]:
    """Sample i holds the ids 100 * i, 100 * i + 1, ...: it can be told from its first token. Ids stay below GPT-2's 50,257."""
    assert num_samples <= 500 and seq_len <= 100
    return [np.arange(seq_len, dtype=np.int32) + 100 * index for index in range(num_samples)]


def write_token_mds(
    folder: str | Path,
    samples: Iterable[Sequence[int] | np.ndarray],
    encoding: str | None = None,
    samples_per_shard: int = 16,
    compression: str | None = None,
    hashes: Sequence[str] = (),
    column: str = 'tokens',
    bytes_dtype: str = 'int64',
) -> Path:
    """Writes samples of token ids. ``encoding`` is an MDS encoding, by default ``ndarray:int32:N``; with ``bytes``, ids are stored as ``bytes_dtype``."""
    from streaming import MDSWriter

    arrays = [np.asarray(sample, dtype=np.int32) for sample in samples]
    encoding = encoding or f'ndarray:int32:{len(arrays[0])}'
    kwargs: dict[str, Any] = {'columns': {column: encoding}, 'out': os.fspath(folder), 'compression': compression, 'hashes': list(hashes)}
    kwargs['size_limit'] = _size_limit(samples_per_shard, 4 * len(arrays[0]) if arrays else 64)
    with MDSWriter(**kwargs) as out:
        for array in arrays:
            out.write({column: array.astype(bytes_dtype).tobytes() if encoding == 'bytes' else array})
    return Path(folder)


def write_text_mds(folder: str | Path, texts: Iterable[str], encoding: str = 'str') -> Path:
    """Writes raw text, as ``str`` or as UTF-8 ``bytes``."""
    from streaming import MDSWriter

    with MDSWriter(columns={'text': encoding}, out=os.fspath(folder)) as out:
        for text in texts:
            out.write({'text': text.encode() if encoding == 'bytes' else text})
    return Path(folder)


def _size_limit(samples_per_shard: int, sample_bytes: int) -> int:
    # Per shard: sample count, offsets and a JSON header of about 250 bytes.
    return 350 + samples_per_shard * (sample_bytes + 4)


def shard_files(folder: str | Path) -> list[Path]:
    """The shards of a dataset, sorted."""
    return sorted(Path(folder).glob('shard.*'))
