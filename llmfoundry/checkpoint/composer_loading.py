"""Composer's way of loading a checkpoint into a run, without unpickling freely.

Composer reads ``.pt`` files with ``weights_only=False`` and sharded folders through torch's reader, which unpickles ``.metadata`` and every value: whoever can write to a checkpoint folder can
run code on all nodes. ``safe_loading`` puts readers in their place that accept the classes of Composer's state and of ``LLMFOUNDRY_SAFE_CLASSES`` and refuse others by name, for as long as a
Trainer is built or a callback loads; Composer offers no hook for it. On the way, what would leave some ranks waiting for others that failed is raised on all of them, and a sharded checkpoint
may lack what a newer torch or a callback that is new in the run has added.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import posixpath
import tarfile
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

import torch
from composer.utils import checkpoint as composer_checkpoint
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException

from llmfoundry import dist
from llmfoundry.checkpoint.metadata_file import read_metadata
from llmfoundry.checkpoint.safe_load import allowed_classes, load_checkpoint_file, load_item
from llmfoundry.checkpoint.sharded import ShardedCheckpoint
from llmfoundry.checkpoint.torch_zip import NotWhole, damaged_record, read_directory
from llmfoundry.errors import CheckpointError

__all__ = ['safe_loading']

log = logging.getLogger(__name__)

_DOWNLOADS_OF_A_FILE = 2
KeyPath = tuple[Any, ...]


@contextlib.contextmanager
def safe_loading() -> Iterator[None]:
    """Within it, Composer loads checkpoints through the readers of this module.

    Raises:
        UnsafeCheckpointError: (from what runs within) the checkpoint holds an object of a class that is not listed.
        CheckpointError: it is damaged.
    """
    replacements = {
        'load_checkpoint': functools.partial(_load_either_form, composer_checkpoint.load_checkpoint),
        'safe_torch_load': _load_file,
        'FileSystemReaderWithValidation': _SafeFileSystemReader,
        'DistCPObjectStoreReader': _SafeObjectStoreReader,
        'dist_cp_load': functools.partial(_load_shards, composer_checkpoint.dist_cp_load),
    }
    originals = {name: getattr(composer_checkpoint, name) for name in replacements}
    unpacking = tarfile.TarFile.__dict__.get('extraction_filter')
    for name, replacement in replacements.items():
        setattr(composer_checkpoint, name, replacement)
    if hasattr(tarfile, 'data_filter'):  # refuses members outside the folder, links and devices; Python before 3.10.12 lacks it
        tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(composer_checkpoint, name, original)
        if hasattr(tarfile, 'data_filter'):
            tarfile.TarFile.extraction_filter = unpacking  # type: ignore[assignment]


def _load_either_form(composers: Callable[..., Any], path: str, state: Any, *args: Any, **kwargs: Any) -> Any:
    """Composer's ``load_checkpoint``, for a run with sharded checkpoints that starts from a file too. (A run with files may start from a sharded folder: see ``_load_file``.)"""
    is_file = '.pt' in posixpath.basename(path) if kwargs.get('object_store') is not None else os.path.isfile(path)
    if not (state.fsdp_sharded_state_dict_enabled and is_file):
        return composers(path, state, *args, **kwargs)
    config = state.fsdp_config
    before = config.state_dict_type, config.load_monolith_rank0_only
    # For as long as it loads, the run is one with whole checkpoints: every rank reads the file and keeps its part.
    config.state_dict_type, config.load_monolith_rank0_only = 'full', False
    try:
        return composers(path, state, *args, **kwargs)
    finally:
        config.state_dict_type, config.load_monolith_rank0_only = before


def _read(path: str | Path) -> dict[str, Any]:
    """The contents of a file or, put together, of a sharded folder."""
    path = os.path.realpath(path)  # Composer hands over a link in a temporary folder; messages should name the file itself
    return ShardedCheckpoint(path).state_dict() if os.path.isdir(path) else load_checkpoint_file(path, mmap=False)


def _load_file(composer_states_filepath: str | Path, map_location: str = 'cpu', load_monolith_rank0_only: bool = False) -> dict[str, Any]:
    """Composer's ``safe_torch_load``: a file's contents; with ``load_monolith_rank0_only`` the other ranks get all but weights and optimizer from rank 0, or its error."""
    del map_location  # always 'cpu'
    if not load_monolith_rank0_only:
        return _on_all_ranks(lambda: _read(composer_states_filepath))
    kept: dict[str, Any] = {}

    def load() -> dict[str, Any]:
        loaded = _read(composer_states_filepath)
        for key in ('model', 'optimizers'):
            if key in loaded['state']:
                kept[key] = loaded['state'][key]
                loaded['state'][key] = None
        return loaded

    loaded = dist.on_rank_zero(load)
    loaded['state'].update(kept)
    return loaded


def _on_all_ranks(function: Any) -> Any:
    """The result of this rank's call, or, if it failed on any rank, that error on every rank: the ranks that could go on would wait for the others in the next collective."""
    result, error = None, None
    try:
        result = function()
    except (CheckpointError, OSError, ValueError) as e:
        error = e
    found = next((e for e in dist.all_gather_objects(error) if e is not None), None)
    if found is not None:
        raise error or found
    return result


class _SafePlanner:
    """Stands before a load planner: values reach it as bytes that were read safely and written anew, so that its own free unpickling meets nothing else."""

    def __init__(self, planner: Any, folder: str) -> None:
        self._planner, self._folder = planner, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Hands a value on."""
        clean = io.BytesIO()
        torch.save(load_item(value, self._folder, read_item.dest_index.fqn), clean)
        clean.seek(0)
        self._planner.load_bytes(read_item, clean)


class _SafeReading:
    """What both kinds of reader do instead of torch's."""

    _metadata: Any = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        """As torch's, with listed classes only."""
        del args, kwargs
        if self._metadata is None:  # Composer and torch ask for it several times
            self._metadata = read_metadata(self.path)  # type: ignore[attr-defined]
        metadata = self._metadata
        if getattr(metadata, 'storage_meta', None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id  # type: ignore[attr-defined]
        return metadata

    def read_data(self, plan: Any, planner: Any) -> Any:
        """As torch's, with listed classes only."""
        with allowed_classes():
            return super().read_data(plan, _SafePlanner(planner, repr(str(self.path))))  # type: ignore[misc, attr-defined]


class _SafeFileSystemReader(_SafeReading, composer_checkpoint.FileSystemReaderWithValidation):
    """Reads a local folder."""


class _SafeObjectStoreReader(_SafeReading, composer_checkpoint.DistCPObjectStoreReader):
    """Downloads what the node needs, compares it with its checksums, and reads it."""

    def read_data(self, plan: Any, planner: Any) -> Any:
        """Downloads come first, with a second attempt for what did not arrive whole."""
        reason = _on_all_ranks(lambda: self._fetch(plan))
        reasons = [r for r in dist.all_gather_objects(reason) if r]
        if reasons:
            raise CheckpointError(
                f'{self.source_path!r}: {reasons[0]}, also when downloaded again: the remote copy is damaged. Name an older checkpoint with load_path, or start with autoresume from another save_folder.',
            )
        return super().read_data(plan, planner)

    def _fetch(self, plan: Any) -> str | None:
        """Puts the files of ``plan`` that no lower rank of this node fetches into the folder, where Composer's reader finds them; says what is wrong with them."""
        items = [self.storage_data[item.storage_index] for item in plan.items]
        wanted = dist.all_gather_objects({info.relative_path for info in items})
        first = dist.get_global_rank() - dist.get_local_rank()
        mine = wanted[dist.get_global_rank()].difference(*wanted[first : dist.get_global_rank()])
        for name in sorted(mine):
            places = sorted({(info.offset, info.length) for info in self.storage_data.values() if info.relative_path == name and not getattr(info, 'transform_descriptors', None)})
            local = Path(self.destination_path) / name
            for attempt in range(_DOWNLOADS_OF_A_FILE):
                local.unlink(missing_ok=True)
                composer_checkpoint.download_object_or_file(str(Path(self.source_path) / name), local, self.object_store)
                reason = _damaged_item(local, places)
                if reason is None:
                    break
                log.warning(f'{name} did not arrive whole ({reason}); attempt {attempt + 1} of {_DOWNLOADS_OF_A_FILE}')
            if reason is not None:
                return f'{name}: {reason}'
        return None


def _damaged_item(path: Path, places: Iterable[tuple[int, int]]) -> str | None:
    with path.open('rb') as f:
        for offset, length in places:
            try:
                reason = damaged_record(f, offset, read_directory(f, offset, length))
            except NotWhole as e:
                reason = str(e)
            if reason is not None:
                return f'at byte {offset:,}: {reason}'
    return None


def _load_shards(composers: Callable[..., None], state_dict: dict[str, Any], storage_reader: Any, load_planner: Any = None) -> None:
    """Composer's ``dist_cp_load``, for a checkpoint that may lack what is new since it was written.

    Left as they are in this run, each with a note: options that a newer torch added to schedulers and optimizers, and callbacks that the run did not have. Anything else that is missing stays an
    error; Composer's own remedy for one such option lets every missing weight pass.
    """
    metadata = storage_reader.read_metadata()
    added = _new_values(state_dict, metadata)
    for path in added:
        _remove(state_dict, path)
    if added and dist.get_global_rank() == 0:
        print(f'load: the checkpoint lacks {", ".join("/".join(map(str, path)) for path in added)}; kept as they are in this run', flush=True)
    try:
        composers(state_dict=state_dict, storage_reader=storage_reader, load_planner=load_planner)
    except CheckpointException as e:
        causes = [cause for cause, _ in e.failures.values()]
        explained = next((cause for cause in causes if isinstance(cause, CheckpointError)), None)
        if explained is not None:
            raise explained from e
        if all(isinstance(cause, RuntimeError | ValueError | OSError) for cause in causes):
            raise CheckpointError(f'{str(storage_reader.checkpoint_id)!r} does not fit this run: {str(causes[0]).strip()}. load_ignore_keys leaves out what is not to be loaded.') from e
        raise
    for path, value in added.items():
        if path[1] != 'callbacks':  # these keep their state if they are not asked to load one
            _put(state_dict, path, value)


def _new_values(state_dict: dict[str, Any], metadata: Any) -> dict[KeyPath, Any]:
    """Path -> present value of what the checkpoint lacks and may lack."""
    flat, paths = flatten_state_dict(state_dict)
    stored = metadata.state_dict_metadata
    callbacks_stored = {path[2] for path in (metadata.planner_data or {}).values() if path[:2] == ('state', 'callbacks') and len(path) > 2}
    added: dict[KeyPath, Any] = {}
    for name, value in flat.items():
        path = tuple(paths[name])
        if name in stored or len(path) < 3 or path[0] != 'state':
            continue
        if path[1] == 'callbacks' and path[2] not in callbacks_stored:
            added[path[:3]] = None
        elif not isinstance(value, torch.Tensor) and (path[1] == 'schedulers' or (path[1] == 'optimizers' and 'param_groups' in path)):
            added[path] = value
    return added


def _remove(state_dict: dict[str, Any], path: KeyPath) -> None:
    for key in path[:-1]:
        state_dict = state_dict[key]
    del state_dict[path[-1]]


def _put(state_dict: dict[str, Any], path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        state_dict = state_dict[key]
    state_dict[path[-1]] = value
