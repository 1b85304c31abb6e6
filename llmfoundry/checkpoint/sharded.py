"""Reads a sharded checkpoint (a torch.distributed.checkpoint folder) tensor by tensor, in one process, without running code from it.

torch's own reader needs a state dict of the right shapes before it starts, and unpickles ``.metadata`` and every small value freely. This one reads the
metadata through a list of allowed classes, finds where each piece of a tensor lies, and puts the pieces together when the tensor is asked for: memory stays at
one tensor. It reads the file-system layout only, which is what Composer writes.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from typing import Any, Iterable

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint._traverse import set_element

from llmfoundry.checkpoint.metadata_file import METADATA_FILE, read_metadata
from llmfoundry.checkpoint.safe_load import allowed_classes, load_item
from llmfoundry.errors import CheckpointError

__all__ = ['METADATA_FILE', 'ShardedCheckpoint']

# What Composer keeps with save_weights_only.
_WEIGHTS = {('state', 'model'), ('state', 'integrations'), ('state', 'metadata')}


@dataclass
class ShardedCheckpoint:
    """A checkpoint folder, opened.

    Args:
        folder: the folder that holds ``.metadata`` and the ``*.distcp`` files.
        extra_classes: names of further classes that small values may hold.
    """

    folder: str
    extra_classes: Iterable[str] = ()
    _where: dict[tuple[str, tuple[int, ...] | None], Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.metadata = read_metadata(self.folder)
        self._where = {(index.fqn, None if index.offset is None else tuple(index.offset)): info for index, info in self.metadata.storage_data.items()}
        self._check_files()

    def _check_files(self) -> None:
        """Every file is there and as long as the metadata says."""
        needed: dict[str, int] = {}
        for info in self._where.values():
            needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
        for name, length in sorted(needed.items()):
            path = os.path.join(self.folder, name)
            if not os.path.isfile(path):
                raise CheckpointError(f'{self.folder!r} lacks the file {name!r}, which its metadata names ({len(needed)} files in all); copy the whole folder')
            if os.path.getsize(path) < length:
                raise CheckpointError(f'{path!r} has {os.path.getsize(path):,} bytes, its metadata names {length:,}: it is truncated; copy it again')

    def path_of(self, name: str) -> tuple[Any, ...]:
        """The keys that lead to ``name`` in the nested dictionary that was saved."""
        planner_data = self.metadata.planner_data or {}
        return tuple(planner_data.get(name) or name.split('.'))

    def tensor_names(self) -> list[str]:
        """Names of all tensors, as flattened by torch (``state.model.model.transformer...``)."""
        return [k for k, v in self.metadata.state_dict_metadata.items() if isinstance(v, metadata.TensorStorageMetadata)]

    def value_names(self) -> list[str]:
        """Names of everything that is not a tensor."""
        return [k for k, v in self.metadata.state_dict_metadata.items() if not isinstance(v, metadata.TensorStorageMetadata)]

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Of the whole tensor ``name``, from the metadata alone."""
        entry = self.metadata.state_dict_metadata[name]
        return tuple(entry.size), entry.properties.dtype

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor ``name``, put together from its pieces, on the CPU."""
        entry = self.metadata.state_dict_metadata[name]
        whole = torch.empty(tuple(entry.size), dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            info = self._where.get((name, tuple(chunk.offsets))) or self._where.get((name, None))
            if info is None:
                raise CheckpointError(f'{self.folder!r}: the piece of {name!r} at {tuple(chunk.offsets)} is stored nowhere')
            piece = self._load_blob(info, name)
            if tuple(piece.shape) != tuple(chunk.sizes):
                raise CheckpointError(f'{self.folder!r}: a piece of {name!r} has shape {tuple(piece.shape)}, the metadata names {tuple(chunk.sizes)}')
            whole[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))].copy_(piece)
            filled += piece.numel()
        if filled != whole.numel():
            raise CheckpointError(f'{self.folder!r}: {filled:,} of {whole.numel():,} elements of {name!r} are stored')
        return whole

    def values(self, prefix: tuple[str, ...]) -> dict[str, Any]:
        """The nested dictionary below ``prefix`` with everything that is not a tensor; empty if there is nothing.

        torch stores a list of dictionaries entry by entry, which is undone here, and does not store empty dictionaries, which stay lost.
        """
        nested: dict[str, Any] = {}
        with allowed_classes(self.extra_classes):
            for name in self.value_names():
                path = self.path_of(name)
                if path[: len(prefix)] != prefix or len(path) == len(prefix):
                    continue
                here = nested
                for key in path[len(prefix) : -1]:
                    here = here.setdefault(key, {})
                here[path[-1]] = self._load_blob(self._where[(name, None)], name)
        return _restore_lists(nested)

    def state_dict(self, weights_only: bool = False) -> dict[str, Any]:
        """Everything, as one nested dictionary in memory: what Composer writes into a single file.

        Args:
            weights_only: leave out the state of optimizer, callbacks, data and random numbers, as ``save_weights_only`` does.
        """
        nested: dict[str, Any] = {}
        tensors = set(self.tensor_names())
        with allowed_classes(self.extra_classes):
            for name in self.metadata.state_dict_metadata:
                path = self.path_of(name)
                if not weights_only or path[:2] in _WEIGHTS:
                    set_element(nested, path, self.tensor(name) if name in tensors else self._load_blob(self._where[(name, None)], name))
        return nested

    def _load_blob(self, info: Any, name: str) -> Any:
        path = os.path.join(self.folder, info.relative_path)
        with open(path, 'rb') as f:
            f.seek(info.offset)
            blob = f.read(info.length)
        return load_item(io.BytesIO(blob), f'{path!r} at byte {info.offset:,}', name)


def _restore_lists(value: Any) -> Any:
    """Dictionaries with the keys 0..n-1 become lists again; string keys never match, and Composer's metadata has no integer keys of its own."""
    if not isinstance(value, dict):
        return value
    restored = {k: _restore_lists(v) for k, v in value.items()}
    if restored and all(isinstance(k, int) for k in restored):
        return [restored[k] for k in sorted(restored)]
    return restored
