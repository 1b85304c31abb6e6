"""``safe_load``: only data files that cannot hold code or pickles may be read, and nothing else is downloaded."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Iterator, Mapping

from huggingface_hub import snapshot_download

from llmfoundry.data.finetuning.cache_folder import cache_folder
from llmfoundry.data.finetuning.file_faults import local_files
from llmfoundry.errors import DataError, InvalidFileExtensionError

__all__ = ['HUGGINGFACE_FOLDER_EXTENSIONS', 'SUPPORTED_EXTENSIONS', 'check_files', 'download_safely']

SUPPORTED_EXTENSIONS = ['.csv', '.json', '.jsonl', '.parquet']
# What a download by huggingface_hub leaves beside the data.
HUGGINGFACE_FOLDER_EXTENSIONS = ['.lock', '.metadata', '.gitignore']
_UNSAFE_BUILDERS = ('arrow', 'text')


def check_files(name: str, kwargs: Mapping[str, Any]) -> None:
    """Checks a local folder, a local file, or the files of a builder.

    Raises:
        InvalidFileExtensionError: a file of another kind is there, or none of these kinds.
    """
    roots = [name] if os.path.exists(name) else []
    roots += list(local_files(kwargs.get('data_files'))) or ([str(kwargs['data_dir'])] if kwargs.get('data_dir') else [])
    files = [file for root in roots for file in _files_below(root)]
    wrong = [f for f in files if not f.endswith((*SUPPORTED_EXTENSIONS, *HUGGINGFACE_FOLDER_EXTENSIONS)) and not f.endswith('.gitignore')]
    if name in _UNSAFE_BUILDERS:
        wrong.append(f'builder {name}')
    if wrong or not any(f.endswith(tuple(SUPPORTED_EXTENSIONS)) for f in files):
        reason = f'safe_load does not allow {", ".join(wrong[:5])}' if wrong else 'there is no data file'
        raise InvalidFileExtensionError(', '.join(roots) or name, SUPPORTED_EXTENSIONS) from DataError(reason, file=', '.join(roots))


def _files_below(root: str) -> Iterator[str]:
    if not os.path.isdir(root):
        yield root
        return
    for folder, _, names in os.walk(root, followlinks=True):
        yield from (os.path.join(folder, name) for name in names)


def download_safely(name: str, token: str | bool | None, revision: str | None) -> Path:
    """Downloads the safe files of a data set on the Hub, and nothing else of it.

    Returns:
        A folder with links to these files: the Hub's own folder may hold others, from earlier downloads without ``safe_load``.

    Raises:
        InvalidFileExtensionError: it has none.
    """
    patterns = [f'*{extension}' for extension in SUPPORTED_EXTENSIONS]
    snapshot = Path(snapshot_download(name, repo_type='dataset', token=token, revision=revision, allow_patterns=patterns))
    files = sorted(f for f in snapshot.rglob('*') if f.suffix in SUPPORTED_EXTENSIONS and f.is_file())
    if not files:
        raise InvalidFileExtensionError(name, SUPPORTED_EXTENSIONS)
    # The snapshot is named after its commit.
    folder = cache_folder() / 'safe_load' / f'{name.replace("/", "--")}-{snapshot.name}'
    for file in files:
        link = folder / file.relative_to(snapshot)
        link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            link.symlink_to(file.resolve())
    return folder
