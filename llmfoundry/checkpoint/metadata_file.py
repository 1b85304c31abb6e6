"""Reads ``.metadata`` of a sharded checkpoint, a pickle, without running code from it: the classes that torch writes there are listed, anything else is refused by name."""

from __future__ import annotations

import os
import pickle
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import filesystem, metadata

from llmfoundry.checkpoint.safe_load import enum_member
from llmfoundry.errors import CheckpointError, UnsafeCheckpointError

__all__ = ['METADATA_FILE', 'load_metadata', 'read_metadata']

METADATA_FILE = '.metadata'

_ALLOWED_MODULES = {'torch.distributed.checkpoint.metadata': metadata, 'torch.distributed.checkpoint.filesystem': filesystem}
_ALLOWED_NAMES = {
    'Metadata', 'MetadataIndex', 'StorageMeta', 'TensorStorageMetadata', 'BytesStorageMetadata', 'ChunkStorageMetadata', 'TensorProperties', '_MEM_FORMAT_ENCODING',
    '_StorageInfo', '_StoragePrefix',
}
_ALLOWED_OTHERS = {
    ('torch', 'Size'), ('torch', 'device'), ('torch.serialization', '_get_layout'), ('collections', 'OrderedDict'), ('builtins', 'set'),
    ('pathlib', 'PosixPath'), ('pathlib', 'PurePosixPath'), ('pathlib._local', 'PosixPath'),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles the classes of a metadata file and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ('builtins', 'getattr'):
            return enum_member
        ours = module in _ALLOWED_MODULES and name in _ALLOWED_NAMES
        dtype = module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype)
        if ours or dtype or (module, name) in _ALLOWED_OTHERS:
            return super().find_class(module, name)
        raise UnsafeCheckpointError(
            f'the metadata holds an object of {module}.{name}, which no sharded checkpoint needs; the folder is refused, since reading it would run that code. '
            'If the folder was written by a newer torch, load it with that version.',
        )


def read_metadata(folder: str | os.PathLike) -> metadata.Metadata:
    """The metadata of the sharded checkpoint in ``folder``.

    Raises:
        CheckpointError: no such file, or damaged.
        UnsafeCheckpointError: it holds an object that no metadata needs.
    """
    path = Path(folder) / METADATA_FILE
    if not path.is_file():
        raise CheckpointError(
            f'{os.fspath(folder)!r} is not a sharded checkpoint: it has no {METADATA_FILE} file. The run that wrote it was probably killed while saving; use an earlier checkpoint.',
        )
    with path.open('rb') as f:
        return load_metadata(f, os.fspath(path))


def load_metadata(file: BinaryIO, path: str) -> metadata.Metadata:
    """As ``read_metadata``, from an open file; ``path`` is for messages."""
    try:
        loaded = _MetadataUnpickler(file).load()
    except UnsafeCheckpointError as e:
        raise UnsafeCheckpointError(f'{path!r}: {e}') from e
    # A flipped byte can make any opcode of the pickle, so what it raises is not limited to a few kinds. Classes that are not listed have been refused above.
    except Exception as e:
        raise CheckpointError(f'{path!r} ({os.path.getsize(path):,} bytes) is truncated or damaged. Cause: {type(e).__name__}: {e}') from e
    reason = _malformed(loaded)
    if reason is not None:
        raise CheckpointError(f'{path!r} {reason}')
    return loaded


def _malformed(loaded: Any) -> str | None:
    """Whether the object is not what torch writes; a file outside the folder is not, whoever named it."""
    if not isinstance(loaded, metadata.Metadata):
        return f'holds a {type(loaded).__name__}, not the metadata of a sharded checkpoint'
    contents, places = getattr(loaded, 'state_dict_metadata', None), getattr(loaded, 'storage_data', None)
    if not isinstance(contents, dict) or not isinstance(places, dict):
        return 'is damaged: it lists no contents'
    for info in places.values():
        place, offset, length = (getattr(info, name, None) for name in ('relative_path', 'offset', 'length'))
        if not isinstance(place, str) or not isinstance(offset, int) or not isinstance(length, int) or offset < 0 or length < 0:
            return 'is damaged: an item has no place'
        if PurePosixPath(place).is_absolute() or '..' in PurePosixPath(place).parts:
            return f'names the file {place!r}, which lies outside the folder; it is refused'
    return None
