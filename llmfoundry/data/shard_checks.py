"""Looks at an MDS folder before training does: the folder, its index, the size of every local shard, its columns.

Costs one ``stat`` per shard, on one process per node. What it finds here would otherwise stop a run hours later, or (a truncated shard) be read as zeros. Contents are compared with hashes when a
shard is first used: with a fast one wherever the index holds it, with a slow one where ``validate_hash`` asks for it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any, Mapping

from llmfoundry.errors import DataError

__all__ = ['FAST_HASHES', 'UnusableColumnsError', 'check_columns', 'check_hash', 'check_local_folder', 'check_local_shards', 'count_samples', 'file_size_problem', 'read_index']

INDEX = 'index.json'
_MAX_LISTED = 8
# Streaming's names of hashes that cost less than reading the file.
FAST_HASHES = ('xxh3_64', 'xxh3_128', 'xxh64', 'xxh128', 'xxh32')


class UnusableColumnsError(DataError, RuntimeError):
    """Neither ``tokens`` nor ``text``, or of a type that holds no tokens. Also a RuntimeError, which public releases raised."""


def check_local_folder(local: str, split: str | None) -> str:
    """The folder of a dataset without a remote; it must exist.

    Returns:
        Path of the folder that holds ``index.json``.

    Raises:
        DataError: no such folder or split.
    """
    if not os.path.isdir(local):
        raise DataError(
            'no such folder, and no `remote` to stream from. Give the folder that the data preparation wrote as `local`, or set `remote`',
            file=local,
        )
    folder = os.path.join(local, split) if split else local
    if not os.path.isdir(folder):
        names = sorted(entry.name for entry in os.scandir(local) if entry.is_dir())
        # Below the usual 0.6, so that `val` finds `val_small`.
        near = difflib.get_close_matches(str(split), names, 1, cutoff=0.5)
        hint = f'; did you mean split: {near[0]}?' if near else ''
        raise DataError(f'local directory does not contain split {split!r}: its sub-folders are {_listing(names)}{hint}', file=local)
    return folder


def read_index(folder: str) -> dict[str, Any]:
    """The parsed ``index.json`` of ``folder``.

    Raises:
        DataError: missing, not JSON, of another version or format, or without samples.
    """
    path = os.path.join(folder, INDEX)
    if not os.path.isfile(path):
        splits = sorted(p.parent.name for p in Path(folder).glob(f'*/{INDEX}'))
        remedy = f'choose one of its splits with `split`: {_listing(splits)}' if splits else 'run the data preparation again: it writes the index last, so this one did not finish'
        raise DataError(f'there is no {INDEX}; the folder holds {_listing(sorted(os.listdir(folder)))}. Remedy: {remedy}', file=folder)
    try:
        with open(path, encoding='utf-8') as f:
            index = json.load(f)
    except ValueError as e:
        raise DataError(f'is empty or corrupted ({e}). Run the data preparation again, or copy the file again from where it was written', file=path) from e
    if not isinstance(index, dict) or index.get('version') != 2 or not isinstance(index.get('shards'), list):
        raise DataError(f'is not an MDS index: expected an object with "version": 2 and a list "shards", got {str(index)[:80]}', file=path)
    for number, shard in enumerate(index['shards']):
        if not isinstance(shard, dict) or not isinstance(shard.get('raw_data'), dict) or not {'basename', 'bytes'} <= set(shard['raw_data']) or not isinstance(shard.get('samples'), int):
            raise DataError(f'shard number {number} is not described (samples, raw_data.basename, raw_data.bytes). Run the data preparation again', file=path)
        if shard.get('format') != 'mds':
            raise DataError(f'shard number {number} has the format {shard.get("format")!r}, but only mds can be streamed as text', file=path)
    if count_samples(index) == 0:
        raise DataError('the dataset is empty: its index lists no samples. Check the input of the data preparation', file=path)
    return index


def count_samples(index: Mapping[str, Any]) -> int:
    """Samples over all shards."""
    return sum(shard['samples'] for shard in index['shards'])


def file_size_problem(path: str, expected_bytes: int) -> str | None:
    """Why the file at ``path`` cannot be whole, or None. A missing file is a problem too."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        return f'{path} is missing'
    if size < expected_bytes:
        return f'{path} is truncated: {size} bytes, but the index says {expected_bytes}'
    if size > expected_bytes:
        return f'{path} is not the file of the index: {size} bytes, but the index says {expected_bytes}'
    return None


def check_local_shards(folder: str, index: Mapping[str, Any], has_remote: bool) -> None:
    """Compares the size of every shard file with the index.

    Args:
        folder: where the shards are.
        index: what ``read_index`` returned.
        has_remote: whether a missing shard can be downloaded.

    Raises:
        DataError: one or more shards are missing or of the wrong size.
    """
    present = set(os.listdir(folder))
    problems: list[str] = []
    for shard in index['shards']:
        files = [info for key in ('raw_data', 'zip_data') if (info := shard.get(key))]
        # The uncompressed file is read if it is there, the compressed one otherwise.
        found = next((info for info in files if info['basename'] in present or os.path.exists(os.path.join(folder, info['basename']))), None)
        if found is None and has_remote:
            continue
        problem = file_size_problem(os.path.join(folder, (found or files[-1])['basename']), (found or files[-1])['bytes'])
        if problem:
            problems.append(problem)
    if problems:
        remedy = 'Delete the damaged files, and they are downloaded again' if has_remote else 'Copy these files again, or run the data preparation again'
        shown = '; '.join(problems[:_MAX_LISTED]) + (f'; and {len(problems) - _MAX_LISTED} more' if len(problems) > _MAX_LISTED else '')
        raise DataError(f'{len(problems)} of {len(index["shards"])} shards cannot be used: {shown}. {remedy}', file=folder)


def check_columns(folder: str, index: Mapping[str, Any], max_seq_len: int) -> str:
    """Which column the samples are read from.

    Returns:
        ``'tokens'`` or ``'text'``.

    Raises:
        UnusableColumnsError: (a DataError) no such column, or one that cannot hold what it should.
        DataError: the samples are shorter than ``max_seq_len``.
    """
    path = os.path.join(folder, INDEX)
    found = ''
    for shard in index['shards']:
        columns = dict(zip(shard.get('column_names', ()), shard.get('column_encodings', ()), strict=False))
        found = next((name for name in ('text', 'tokens') if name in columns), '')
        if not found:
            raise UnusableColumnsError(
                f'the columns are {_listing(sorted(columns))}, but a text dataset needs `tokens` (prepared with --concat_tokens) or `text`. '
                'Prepare the data again, or use the loader that fits them',
                file=path,
            )
        encoding = columns[found]
        if found == 'text' and encoding not in {'str', 'bytes'}:
            raise UnusableColumnsError(f'the column `text` is stored as {encoding}, but must be str or bytes', file=path)
        if found == 'tokens':
            _check_token_encoding(encoding, max_seq_len, path)
    return found


def _check_token_encoding(encoding: str, max_seq_len: int, path: str) -> None:
    """``encoding`` is ``bytes``, ``ndarray``, ``ndarray:int32`` or ``ndarray:int32:2048``."""
    if encoding == 'bytes':
        return
    kind, _, rest = encoding.partition(':')
    dtype, _, shape = rest.partition(':')
    if kind != 'ndarray' or (dtype and not re.fullmatch(r'u?int(8|16|32|64)', dtype)):
        raise UnusableColumnsError(f'the column `tokens` is stored as {encoding}, but must be bytes or an ndarray of integers', file=path)
    width = math.prod(int(n) for n in shape.split(',')) if shape else None
    if width is not None and width < max_seq_len:
        raise DataError(
            f'the samples have {width} tokens, fewer than max_seq_len {max_seq_len}. Set max_seq_len to at most {width}, or prepare the data with --concat_tokens {max_seq_len}',
            file=path,
        )


def check_hash(path: str, info: Mapping[str, Any], algorithm: str) -> None:
    """Compares the contents of a file with the hash that its index holds.

    Args:
        path: the file.
        info: ``raw_data`` or ``zip_data`` of its shard.
        algorithm: ``validate_hash`` of the dataset.

    Raises:
        DataError: the index has no such hash, or the contents differ.
    """
    hashes = info.get('hashes') or {}
    if algorithm not in hashes:
        raise DataError(f'validate_hash is {algorithm!r}, but the index holds {_listing(sorted(hashes))} for this file. Choose one of them, or leave validate_hash out', file=path)
    actual = _file_hash(path, algorithm)
    if actual != hashes[algorithm]:
        raise DataError(f'the contents are not what was written: {algorithm} is {actual}, but the index says {hashes[algorithm]}. Copy the file again', file=path)


def _file_hash(path: str, algorithm: str) -> str:
    if algorithm in hashlib.algorithms_available:
        digest: Any = hashlib.new(algorithm)
    else:
        import xxhash

        digest = getattr(xxhash, algorithm)()
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _listing(names: list[str]) -> str:
    if not names:
        return 'nothing'
    return ', '.join(names[:_MAX_LISTED]) + (f' and {len(names) - _MAX_LISTED} more' if len(names) > _MAX_LISTED else '')
