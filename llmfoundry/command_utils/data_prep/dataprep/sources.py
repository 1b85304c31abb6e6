"""Where rows come from: ``load_dataset`` and ``load_from_disk`` of Hugging Face datasets, also where fsspec has no plug-in for the URI.

Datasets reads URIs through fsspec alone, so ``s3://`` needs s3fs. Where that is missing, files are copied to a temporary folder first, through
Composer's object stores, which come with this package.
"""

from __future__ import annotations

import os
import posixpath
import tempfile
from typing import Any, Callable, Mapping

import datasets
import fsspec

from llmfoundry.command_utils.data_prep import remote
from llmfoundry.errors import DataError

__all__ = ['COLUMNS', 'SOURCES', 'check_rows', 'load_dataset', 'load_from_disk']

COLUMNS = ('input', 'response')


def load_dataset(path: str, **kwargs: Any) -> Any:
    """``datasets.load_dataset``; URIs in ``data_files`` that fsspec cannot open are fetched first.

    Args:
        path: name on the Hub, a folder, or a builder such as json.
        kwargs: its other arguments.

    Raises:
        DataError: the source has several splits and none is named.
    """
    if 'data_files' in kwargs:
        kwargs['data_files'] = _fetch_files(kwargs['data_files'])
    return _one_split(datasets.load_dataset(path, **kwargs), path, 'source_config.kwargs.split')


def load_from_disk(dataset_path: str, **kwargs: Any) -> Any:
    """``datasets.load_from_disk``; a URI that fsspec cannot open is fetched first.

    Args:
        dataset_path: folder or URI that ``save_to_disk`` wrote.
        kwargs: its other arguments.

    Raises:
        DataError: there is no saved dataset, or one with several splits.
    """
    local = dataset_path
    if remote.is_remote(dataset_path) and not _has_filesystem(dataset_path):
        local = os.path.join(_temporary_folder(), 'dataset')
        for uri, _ in remote.list_files(dataset_path, ('*',)):
            copy = os.path.join(local, *uri[len(dataset_path.rstrip('/')) + 1 :].split('/'))
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            remote.fetch(uri, copy)
    try:
        dataset = datasets.load_from_disk(local, **kwargs)
    except FileNotFoundError:
        raise DataError('no dataset that datasets.save_to_disk wrote (it leaves a state.json); for json, csv or parquet files use load_dataset', file=dataset_path) from None
    return _one_split(dataset, dataset_path, 'source_config.kwargs.dataset_path (the folder of the split below it)')


SOURCES: dict[str, Callable[..., Any]] = {'load_dataset': load_dataset, 'load_from_disk': load_from_disk}


def check_rows(dataset: Any, name: str) -> None:
    """Checks that a source gives rows with the columns that dataprep reads.

    Raises:
        DataError: it is no dataset, or a column is missing.
    """
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(f'source_config.method returned a {type(dataset).__name__}; a datasets.Dataset is needed (not a streaming one)', file=name)
    missing = [c for c in COLUMNS if c not in dataset.column_names]
    if missing:
        raise DataError(
            f'no column {" and no column ".join(map(repr, missing))}; rows need input and response (text) and may have contexts (a list of texts). '
            f'The columns are {", ".join(dataset.column_names)}: rename them first (rename_column)',
            file=name,
        )


def _one_split(dataset: Any, name: str, key: str) -> Any:
    if isinstance(dataset, datasets.DatasetDict):
        if len(dataset) == 1:
            return next(iter(dataset.values()))
        raise DataError(f'holds the splits {", ".join(dataset)}; name one in {key}', file=name)
    return dataset


def _has_filesystem(uri: str) -> bool:
    try:
        fsspec.core.url_to_fs(uri)
    except (ImportError, ValueError):
        return False
    return True


def _temporary_folder() -> str:
    """A folder for copies. It stays until the machine clears its temporary files, since the dataset is memory-mapped from it."""
    return tempfile.mkdtemp(prefix='llmfoundry-dataprep-')


def _fetch_files(files: Any) -> Any:
    if isinstance(files, Mapping):
        return {split: _fetch_files(value) for split, value in files.items()}
    if isinstance(files, (list, tuple)):
        return [_fetch_files(value) for value in files]
    if not isinstance(files, str) or not remote.is_remote(files) or _has_filesystem(files):
        return files
    copy = os.path.join(_temporary_folder(), posixpath.basename(files))
    remote.fetch(files, copy)
    return copy
