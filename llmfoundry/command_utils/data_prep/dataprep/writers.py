"""Where packed rows go: ``save_to_disk``, ``to_json``, ``to_parquet`` and ``to_csv`` of Hugging Face datasets, made whole or not at all.

Everything is written beside the target first and renamed when it is complete; for a URI, uploaded file by file, the one without which nothing
loads (``state.json``) last. A target that already holds something is refused, before any work.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import datasets
import fsspec

from llmfoundry.command_utils.data_prep import remote
from llmfoundry.errors import OutputFolderNotEmptyError

__all__ = ['TARGET_KEYS', 'WRITERS', 'check_target', 'save_to_disk', 'to_csv', 'to_json', 'to_parquet']

TARGET_KEYS = {'save_to_disk': 'dataset_path', 'to_json': 'path_or_buf', 'to_parquet': 'path_or_buf', 'to_csv': 'path_or_buf'}
"""The argument of each writer that says where."""


def save_to_disk(
    dataset: Any,
    dataset_path: str,
    max_shard_size: str | int | None = None,
    num_shards: int | None = None,
    num_proc: int | None = None,
    storage_options: dict | None = None,
) -> None:
    """A folder for ``datasets.load_from_disk`` and for ``hf_name`` of the finetuning loader."""
    with _staged(dataset_path, storage_options) as path:
        dataset.save_to_disk(str(path), max_shard_size=max_shard_size, num_shards=num_shards, num_proc=num_proc)


def to_json(dataset: Any, path_or_buf: str, storage_options: dict | None = None, **kwargs: Any) -> None:
    """One JSON object per line."""
    with _staged(path_or_buf, storage_options) as path:
        dataset.to_json(str(path), **kwargs)


def to_parquet(dataset: Any, path_or_buf: str, storage_options: dict | None = None, **kwargs: Any) -> None:
    """One Parquet file."""
    with _staged(path_or_buf, storage_options) as path:
        dataset.to_parquet(str(path), **kwargs)


def to_csv(dataset: Any, path_or_buf: str, storage_options: dict | None = None, **kwargs: Any) -> None:
    """One CSV file, lists as JSON text. Left to pandas, a list of more than 1000 ids would lose its middle to an ellipsis."""
    features = datasets.Features({name: datasets.Value('string') for name in dataset.column_names})
    text = dataset.map(_lists_as_json, batched=True, features=features, load_from_cache_file=False)
    with _staged(path_or_buf, storage_options) as path:
        text.to_csv(str(path), **kwargs)


def _lists_as_json(columns: Mapping[str, list]) -> dict[str, list[str]]:
    return {name: [value if isinstance(value, str) else json.dumps(value) for value in values] for name, values in columns.items()}


WRITERS: dict[str, Callable[..., None]] = {'save_to_disk': save_to_disk, 'to_json': to_json, 'to_parquet': to_parquet, 'to_csv': to_csv}


def check_target(target: str, storage_options: dict | None = None) -> None:
    """Checks that nothing is there yet.

    Raises:
        OutputFolderNotEmptyError: a file, or a folder that holds something.
    """
    if remote.is_remote(target):
        if storage_options:
            filesystem, path = fsspec.core.url_to_fs(target, **storage_options)
            taken = filesystem.exists(path)
        else:
            taken = bool(remote.list_files(target, ('*',)))
    else:
        taken = os.path.isfile(target) or (os.path.isdir(target) and bool(os.listdir(target)))
    if taken:
        raise OutputFolderNotEmptyError(target)


@contextmanager
def _staged(target: str, storage_options: dict | None) -> Iterator[Path]:
    """A path to write to, which becomes ``target`` when the block ends without an error."""
    if remote.is_remote(target):
        with tempfile.TemporaryDirectory(prefix='llmfoundry-dataprep-') as folder:
            path = Path(folder) / (os.path.basename(target.rstrip('/')) or 'dataset')
            yield path
            _upload(path, target, storage_options)
        return
    final = Path(target).absolute()
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{final.name}.', dir=final.parent) as folder:
        # The name is kept, since pandas takes the compression from it.
        path = Path(folder) / final.name
        yield path
        if final.is_dir():
            final.rmdir()
        shutil.move(path, final)


def _upload(path: Path, target: str, storage_options: dict | None) -> None:
    files = [path] if path.is_file() else sorted((p for p in path.rglob('*') if p.is_file()), key=lambda p: (p.name == 'state.json', p))
    for file in files:
        uri = target if file == path else remote.join(target.rstrip('/'), file.relative_to(path).as_posix())
        if storage_options:
            filesystem, where = fsspec.core.url_to_fs(uri, **storage_options)
            filesystem.makedirs(os.path.dirname(where), exist_ok=True)
            filesystem.put_file(str(file), where)
        else:
            remote.upload_file(file, uri)
