"""Is a checkpoint whole? ``damage`` says why not, before anything is loaded from it.

Every byte that loading depends on is compared with a checksum: torch's archives carry a CRC32 per record, in ``.pt`` files as in each item of a sharded checkpoint's files; compressed
files carry that of their format. Only ``.metadata`` of a sharded checkpoint, a bare pickle, has none, so ``seal`` writes its SHA-256 beside it. Without a seal its statements are compared
with each other and with the files. The price of it all is one read of the checkpoint; ranks share it (``damage_over_ranks``).
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import importlib
import lzma
import math
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from llmfoundry import dist
from llmfoundry.checkpoint.metadata_file import METADATA_FILE, read_metadata
from llmfoundry.checkpoint.torch_zip import NotWhole, damaged_record, is_legacy, read_directory
from llmfoundry.errors import CheckpointError, UnsafeCheckpointError
from llmfoundry.whole_files import write_whole

__all__ = ['SEAL_FILE', 'Share', 'damage', 'damage_over_ranks', 'seal', 'unseal']

SEAL_FILE = '.metadata.sha256'
# (index, count): of the records, those whose number leaves the remainder ``index``.
Share = tuple[int, int]
EVERYTHING: Share = (0, 1)
_COMPRESSIONS: dict[str, Any] = {'gz': gzip.open, 'tgz': gzip.open, 'bz2': bz2.open, 'lzma': lzma.open}
_TAR_SUFFIXES = ('.tar', '.tar.gz', '.tgz', '.tar.bz2', '.tar.lzma')
_PIECE_BYTES = 4 << 20


def damage(path: Path, share: Share = EVERYTHING) -> str | None:
    """Why the local checkpoint ``path`` is not whole, or None if it is.

    Args:
        path: a file as Composer writes it (``.pt``, also compressed, or tar), or the folder of a sharded checkpoint.
        share: check the directories in full but only this share of the contents.

    Raises:
        UnsafeCheckpointError: the folder's metadata would have to run code to be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _sharded_damage(path, share)
        if not path.exists():
            return 'the file is missing'
        size = path.stat().st_size
        if size == 0:
            return 'the file is empty'
        reason = _file_damage(path, size, share)
        return None if reason is None else f'{size:,} bytes; {reason}'
    except OSError as e:
        return f'it cannot be read: {type(e).__name__}: {e.strerror or e}'


def damage_over_ranks(path: Path, same_files: bool) -> str | None:
    """``damage`` with the reading shared by the ranks; every rank of the run calls it and gets the same answer.

    Args:
        path: as for ``damage``.
        same_files: whether all nodes see the same files; if not, the ranks of each node check its own copy.
    """
    share = (dist.get_global_rank(), dist.get_world_size()) if same_files else (dist.get_local_rank(), dist.get_local_world_size())
    try:
        reason: str | CheckpointError | None = damage(path, share)
    except UnsafeCheckpointError as e:
        reason = e
    found = next((r for r in dist.all_gather_objects(reason) if r is not None), None)
    if isinstance(found, CheckpointError):
        raise found
    return found


def seal(folder: Path) -> None:
    """Writes the checksum of a finished sharded checkpoint's ``.metadata`` beside it, in the form of ``sha256sum``. Called by one rank, after torch has written ``.metadata``."""
    write_whole(Path(folder) / SEAL_FILE, f'{_sha256(Path(folder) / METADATA_FILE)}  {METADATA_FILE}\n')


def unseal(folder: Path) -> None:
    """Removes the seal; called by one rank before a checkpoint is written over an older one of the same name."""
    (Path(folder) / SEAL_FILE).unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open('rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest() if hasattr(hashlib, 'file_digest') else hashlib.sha256(f.read()).hexdigest()


def _file_damage(path: Path, size: int, share: Share) -> str | None:
    name = path.name
    if name.endswith(_TAR_SUFFIXES):
        return _tar_damage(path, share)
    if '.pt.' in name:  # as Composer tells compressed files
        return _stream_damage(path, share)
    with path.open('rb') as f:
        return None if is_legacy(f) else _archive_damage(f, 0, size, share)


def _archive_damage(file: BinaryIO, offset: int, length: int, share: Share = EVERYTHING) -> str | None:
    try:
        records = read_directory(file, offset, length)
    except NotWhole as e:
        return str(e)
    return damaged_record(file, offset, [r for i, r in enumerate(records) if i % share[1] == share[0]])


def _tar_damage(path: Path, share: Share) -> str | None:
    """tar has no checksum for contents. The archive inside has; a compressed tar is checked by its compression, which reads as one stream and so cannot be shared."""
    try:
        opener = _COMPRESSIONS.get(path.name.rpartition('.')[2])
        if opener is not None and share[0] == 0:
            with opener(path) as stream:
                while stream.read(_PIECE_BYTES):
                    pass
        with tarfile.open(path) as tar:
            for member in tar:
                if not (member.isreg() or member.isdir()) or os.path.isabs(member.name) or '..' in Path(member.name).parts:
                    return f'it holds {member.name!r}, which is not a file inside the folder that it is unpacked into'
                if member.isreg() and opener is None:
                    with path.open('rb') as f:
                        reason = _archive_damage(f, member.offset_data, member.size, share)
                    if reason is not None:
                        return f'{member.name}: {reason}'
            return None if tar.getmembers() else 'the archive is empty'
    except (tarfile.TarError, EOFError, ValueError, zlib.error, lzma.LZMAError) as e:
        return f'{type(e).__name__}: {e}'


def _stream_damage(path: Path, share: Share) -> str | None:
    """Decompresses to nowhere with Composer's own tool, whose exit code tells about the checksum. One rank does it, since a stream cannot be shared."""
    if share[0] != 0:
        return None
    compression = importlib.import_module('composer.utils.compression')
    try:
        with compression.get_compressor(path.name).decompress(str(path)) as stream:
            start = stream.read(4)
            while stream.read(_PIECE_BYTES):
                pass
    except OSError as e:
        return str(e)
    return None if start == b'PK\x03\x04' else 'what was compressed is not an archive of torch'


def _sharded_damage(folder: Path, share: Share) -> str | None:
    path = folder / METADATA_FILE
    if not path.is_file():
        return f'its {METADATA_FILE} is missing'
    reason = _seal_damage(folder)
    if reason is not None:
        return reason
    try:
        metadata = read_metadata(folder)
    except UnsafeCheckpointError:
        raise
    except CheckpointError as e:
        return str(e)
    try:
        reason = _contradiction(metadata)
    except (AttributeError, TypeError, ValueError) as e:  # without a seal, a flipped byte may have replaced a number by anything
        return f'its {METADATA_FILE} is damaged: {type(e).__name__}: {e}'
    return reason or _items_damage(folder, metadata, share)


def _seal_damage(folder: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError):
        sealed = (folder / SEAL_FILE).read_bytes()[:64]
        if sealed != _sha256(folder / METADATA_FILE).encode():
            return f'{METADATA_FILE} or {SEAL_FILE} has changed since it was written: the checksums differ'
    return None


def _contradiction(metadata: Any) -> str | None:
    """Whether what should be stored is what is stored, by the metadata's own account."""
    stored = {(index.fqn, None if index.offset is None else tuple(index.offset)) for index in metadata.storage_data}
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            if (name, None) not in stored:
                return f'the value {name!r} is stored nowhere'
            continue
        covered = 0
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if (name, offsets) not in stored and (name, None) not in stored:
                return f'the piece of {name!r} at {offsets} is stored nowhere'
            if any(o < 0 or s < 0 or o + s > whole for o, s, whole in zip(offsets, sizes, entry.size, strict=True)):
                return f'the piece of {name!r} at {offsets} lies outside the tensor'
            covered += math.prod(sizes)
        if covered != math.prod(entry.size):
            return f'{covered:,} of {math.prod(entry.size):,} elements of {name!r} are stored'
    return None


def _items_damage(folder: Path, metadata: Any, share: Share) -> str | None:
    by_file: dict[str, list[tuple[int, int, str, bool]]] = {}
    for index, info in metadata.storage_data.items():
        plain = not getattr(info, 'transform_descriptors', None)
        by_file.setdefault(info.relative_path, []).append((info.offset, info.length, index.fqn, plain))
    number = 0
    for name, items in sorted(by_file.items()):
        path = folder / name
        if not path.is_file():
            return f'{name} is missing'
        items.sort()
        size, end = path.stat().st_size, items[-1][0] + items[-1][1]
        if size < end:
            return f'{name} has {size:,} of {end:,} bytes'
        with path.open('rb') as f:
            for offset, length, item, plain in items:
                number += 1
                # Items that an extension transformed are no archives of torch; their extent is all that is known.
                reason = _archive_damage(f, offset, length) if plain and number % share[1] == share[0] else None
                if reason is not None:
                    return f'{name}: {item} at byte {offset:,}: {reason}'
    return None
