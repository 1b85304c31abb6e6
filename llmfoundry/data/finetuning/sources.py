"""Where finetuning rows come from: names on the Hub, the builders of ``datasets`` (json, csv, parquet, arrow), local files and folders, folders
written by ``save_to_disk``, Arrow files of pre-tokenised rows, and any of these behind a URI.

All of them become one ``datasets.Dataset`` over memory-mapped Arrow tables, so rows are read at random and never held. JSON, CSV and Parquet are
copied to Arrow once by ``datasets`` itself; Arrow files are mapped where they lie.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any, Iterator, Mapping

import datasets
import pyarrow as pa

from llmfoundry.data.finetuning.downloads import download_file, download_folder, download_split
from llmfoundry.data.finetuning.file_faults import first_fault, local_files
from llmfoundry.data.finetuning.packed_rows import one_row_per_document
from llmfoundry.data.finetuning.safe_load import HUGGINGFACE_FOLDER_EXTENSIONS, SUPPORTED_EXTENSIONS, check_files, download_safely
from llmfoundry.data.remote_files import is_remote
from llmfoundry.errors import FinetuningFileNotFoundError, InvalidDatasetError, MisconfiguredHfDatasetError, MissingHuggingFaceURLSplitError

__all__ = ['BUILDERS', 'HUGGINGFACE_FOLDER_EXTENSIONS', 'SUPPORTED_EXTENSIONS', 'describe_source', 'fingerprint', 'load_rows', 'place_of_row']

BUILDERS = {'.csv': 'csv', '.json': 'json', '.jsonl': 'json', '.parquet': 'parquet'}
_BUILDER_NAMES = {*BUILDERS.values(), 'arrow', 'text'}
# What `datasets` itself opens, with its own cache.
_LEFT_TO_DATASETS = ('hf://', 'http://', 'https://')
_OWN_KEYS = {'path': 'hf_name', 'split': 'split', 'streaming': None}


def load_rows(hf_name: str, split: str | None, hf_kwargs: Mapping[str, Any] | None = None, safe_load: bool = False) -> datasets.Dataset:
    """Opens a data set. Rows that were packed before they were saved come one per document.

    Args:
        hf_name: name on the Hub, name of a builder, path of a file or folder, or URI of a file or of a folder that holds ``{split}.csv``,
            ``.json``, ``.jsonl`` or ``.parquet``.
        split: name of the split, with the slices that ``datasets`` knows (``train[:1000]``). Dashes in the name become underscores.
        hf_kwargs: further arguments of ``datasets.load_dataset``; ``data_files`` and ``data_dir`` may be URIs.
        safe_load: refuse files of other kinds than csv, json, jsonl and parquet, and download no other.

    Raises:
        MissingHuggingFaceURLSplitError: no split.
        FinetuningFileNotFoundError: no file of the split at a URI, or no such path.
        InvalidFileExtensionError: ``safe_load`` and a file of another kind.
        MisconfiguredHfDatasetError: the files cannot be read as they say they can; the reason names the file.
        ValueError: ``hf_kwargs`` holds a key of ours, or the data set has no such split.
    """
    rows = _open_rows(hf_name, split, hf_kwargs, safe_load)
    return one_row_per_document(rows, describe_source(hf_name, split, hf_kwargs), fingerprint(rows))


def _open_rows(hf_name: str, split: str | None, hf_kwargs: Mapping[str, Any] | None, safe_load: bool) -> datasets.Dataset:
    if not split:
        raise MissingHuggingFaceURLSplitError()
    kwargs = dict(hf_kwargs or {})
    for key, ours in _OWN_KEYS.items():
        if kwargs.get(key):
            raise ValueError(f'hf_kwargs.{key}: {kwargs[key]!r} cannot be given here' + (f'; use `{ours}`' if ours else '; for streaming use `remote` and `local`'))
        kwargs.pop(key, None)
    name, kwargs = _local(hf_name, split, kwargs)
    hf_split = _underscores(split)
    if safe_load:
        if name in _BUILDER_NAMES or os.path.exists(name):
            check_files(name, kwargs)
        else:
            name = str(download_safely(name, kwargs.pop('token', None), kwargs.pop('revision', None)))
    if name.endswith('.arrow') and os.path.isfile(name):
        return _slice(_map_arrow(name), hf_split, name)
    if os.path.isfile(name):
        reason = f'the name of the file does not tell what it holds: it must end with one of {", ".join((*BUILDERS, ".arrow"))}. Rename it, or give hf_name: json (or csv, parquet) and the file as hf_kwargs.data_files'
        raise MisconfiguredHfDatasetError(name, split, reason)
    if any(os.path.isfile(os.path.join(name, marker)) for marker in ('state.json', 'dataset_dict.json')):
        return _slice(datasets.load_from_disk(name), hf_split, name)
    return _load(hf_name, name, hf_split, kwargs)


def _local(name: str, split: str, kwargs: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The same source without URIs, downloads done; a file becomes its builder and ``data_files``."""
    name = os.path.expanduser(name)
    if kwargs.get('data_files') is not None:
        kwargs['data_files'] = _local_files(kwargs['data_files'])
    if is_remote(str(kwargs.get('data_dir') or '')):
        kwargs['data_dir'] = str(download_folder(kwargs['data_dir'], _patterns(name)))
    if is_remote(name) and not name.startswith(_LEFT_TO_DATASETS):
        name = str(download_split(name, _base_name(split), tuple(BUILDERS)))
    elif os.path.isdir(name) and not kwargs.get('data_files') and ('-' in _base_name(split) or _base_name(split) == 'data'):
        # Names that `datasets` does not look for in file names.
        name = next((p for p in (os.path.join(name, _base_name(split) + extension) for extension in BUILDERS) if os.path.isfile(p)), name)
    elif name not in _BUILDER_NAMES and _is_path(name) and not os.path.exists(name):
        raise FinetuningFileNotFoundError([name])
    builder = BUILDERS.get(os.path.splitext(name)[1])
    if builder and os.path.isfile(name):
        return builder, {**kwargs, 'data_files': {_underscores(_base_name(split)): name}}
    return name, kwargs


def _is_path(name: str) -> bool:
    """Whether a name can only be meant as a path: names on the Hub hold one slash at most and begin with a letter or digit."""
    return name.startswith(('/', '.', '~')) or name.count('/') > 1 or os.path.splitext(name)[1] in (*BUILDERS, '.arrow')


def _patterns(builder: str) -> tuple[str, ...]:
    """File names that a builder reads; all supported ones for a folder."""
    extensions = [e for e, b in BUILDERS.items() if b == builder] or ([f'.{builder}'] if builder in _BUILDER_NAMES else list(BUILDERS))
    return tuple(f'*{e}' for e in extensions)


def _local_files(files: Any) -> Any:
    if isinstance(files, Mapping):
        return {_underscores(str(key)): _local_files(value) for key, value in files.items()}
    if isinstance(files, (list, tuple)):
        found = [_local_files(f) for f in files]
        return [p for f in found for p in (f if isinstance(f, list) else [f])]
    if is_remote(str(files)) and not str(files).startswith(_LEFT_TO_DATASETS):
        return download_file(str(files))
    return str(files)


def _base_name(split: str) -> str:
    return split.partition('[')[0]


def _underscores(split: str) -> str:
    """``a-b[-10:]+c`` -> ``a_b[-10:]+c``: ``datasets`` allows no dash in the name of a split."""
    return re.sub(r'(^|\+)[^\[+]*', lambda match: match.group().replace('-', '_'), split)


def _map_arrow(path: str) -> datasets.Dataset:
    """Maps an Arrow file of record batches, in the file format or the stream format."""
    try:
        source = pa.memory_map(path)
        try:
            table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
    except (pa.ArrowInvalid, OSError) as e:
        raise MisconfiguredHfDatasetError(path, reason=f'{path} is no Arrow file of record batches, or was cut off ({e})') from e
    stat = os.stat(path)
    digest = hashlib.sha256(f'{os.path.abspath(path)}:{stat.st_size}:{stat.st_mtime_ns}'.encode()).hexdigest()[:16]
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=digest)


def _slice(found: datasets.Dataset | datasets.DatasetDict, split: str, name: str) -> datasets.Dataset:
    """The rows that ``split`` names. A data set that was saved without splits has but one, under any name."""
    asked = datasets.ReadInstruction.from_spec(split)
    names = {_base_name(part) for part in split.split('+')}
    splits = dict(found) if isinstance(found, datasets.DatasetDict) else dict.fromkeys(names, found)
    if missing := sorted(names - set(splits)):
        raise ValueError(f'{name}: no split {missing[0]!r}; it has {", ".join(sorted(splits))}')
    pieces = [
        splits[piece.splitname] if piece.from_ is None and piece.to is None else splits[piece.splitname].select(range(piece.from_ or 0, len(splits[piece.splitname]) if piece.to is None else piece.to))
        for piece in asked.to_absolute({key: len(value) for key, value in splits.items()})
    ]
    return pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)


@contextlib.contextmanager
def _logged_errors() -> Iterator[list[str]]:
    """What ``datasets`` logs as errors: there alone it names the file that it could not read."""
    messages: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger('datasets')
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def _load(hf_name: str, name: str, split: str, kwargs: dict[str, Any]) -> datasets.Dataset:
    source = describe_source(hf_name, split, kwargs)
    with _logged_errors() as messages:
        try:
            found = datasets.load_dataset(name, split=split, **kwargs)
        except datasets.exceptions.DataFilesNotFoundError as e:
            raise FinetuningFileNotFoundError([f'{kwargs.get("data_dir") or name} ({e})']) from e
        except FileNotFoundError as e:
            missing = [f for f in local_files(kwargs.get('data_files')) if not os.path.exists(f)]
            raise FinetuningFileNotFoundError(missing or [str(e)]) from e
        except ConnectionError as e:
            raise ConnectionError(f'hf_name {hf_name}: no file or folder of that name here, and the Hub cannot be asked: {e}') from e
        except (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid, StopIteration, UnicodeDecodeError) as e:
            reason = first_fault(kwargs.get('data_files')) or (messages[-1] if messages else f'{source}: {e.__cause__ or e}')
            raise MisconfiguredHfDatasetError(hf_name, split, reason) from e
        except ValueError as e:
            if 'corresponds to no data' in str(e):
                raise InvalidDatasetError(source, 'it has no rows') from e
            raise ValueError(f'{source}: {e}') from e
    return found


def describe_source(hf_name: str, split: str | None, hf_kwargs: Mapping[str, Any] | None = None) -> str:
    """Name of a source for messages: its files where they are given, else its name; then the split."""
    kwargs = hf_kwargs or {}
    files = kwargs.get('data_files')
    if isinstance(files, Mapping):
        files = files.get(split, files.get(_base_name(split or ''), list(files.values())))
    if isinstance(files, (list, tuple)):
        files = str(files[0]) if len(files) == 1 else f'{files[0]} and {len(files) - 1} more files' if files else None
    return f'{files or kwargs.get("data_dir") or hf_name} [{split}]'


def place_of_row(hf_name: str, split: str, hf_kwargs: Mapping[str, Any] | None, row: int) -> tuple[str, int] | None:
    """The file that holds a row of a source with several files, and the number of the row in it; None if there is one file, or it is not known.

    Counts the rows of the files one after the other, which is for errors only.
    """
    if '[' in split or '+' in split:
        return None
    name, kwargs = _local(hf_name, split, dict(hf_kwargs or {}))
    try:
        files = list((datasets.load_dataset_builder(name, **kwargs).config.data_files or {}).get(_underscores(split), []))
    except (ValueError, OSError):
        return None
    if len(files) < 2:
        return None
    for file in files:
        builder = BUILDERS.get(os.path.splitext(file)[1])
        if builder is None or not os.path.isfile(file):
            return None
        count = len(datasets.load_dataset(builder, data_files=file, split='train'))
        if row < count:
            return file, row
        row -= count
    return None


def fingerprint(rows: datasets.Dataset) -> str:
    """Changes with the rows, and not with the place of the cache of ``datasets``, which may be empty again at the next start.

    The fingerprint that ``datasets`` keeps covers names, times and sizes of files that it read, or the commit on the Hub. Folders written by
    ``save_to_disk`` carry theirs with them, so there the size and time of the files count too.
    """
    files = []
    for entry in rows.cache_files:
        path = Path(entry['filename'])
        if path.with_name('state.json').exists():
            stat = path.stat()
            files.append([path.name, stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(repr([rows._fingerprint, len(rows), files]).encode()).hexdigest()
