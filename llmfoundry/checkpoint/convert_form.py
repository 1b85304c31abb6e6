"""From sharded to single-file checkpoints and back, in one process, without running code from them.

Names and layouts of weights and optimizer state are the same in both forms and for DDP and FSDP2, so a converted checkpoint continues the same run. What differs is the packaging: in the
sharded form the files of config and tokenizer are kept as text (see ``BaseHuggingFaceModel.get_metadata``). The price is memory for the whole checkpoint when it is put together from shards;
the other way the file is mapped.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping

import torch
from torch.distributed import checkpoint as dcp

from llmfoundry.checkpoint.integrity import damage, seal
from llmfoundry.checkpoint.reader import parse_files
from llmfoundry.checkpoint.safe_load import load_checkpoint_file
from llmfoundry.checkpoint.sharded import ShardedCheckpoint
from llmfoundry.errors import CheckpointError
from llmfoundry.whole_files import flush_to_disk

__all__ = ['convert_form', 'read_state']

# What Composer keeps with save_weights_only.
_WEIGHTS = ('model', 'integrations', 'metadata')
_HIDDEN_PREFIX = '.incomplete-'


def convert_form(source: Path, target: Path, *, sharded: bool, weights_only: bool = False, extra_classes: Iterable[str] = ()) -> None:
    """Writes the checkpoint ``source`` (of either form) as ``target``, whole or not at all.

    Args:
        source: a ``.pt`` file or the folder of a sharded checkpoint.
        target: does not exist.
        sharded: write a folder that any number of ranks can load; else one ``.pt`` file.
        weights_only: leave out what only the continuation of the run needs.
        extra_classes: names of further classes that the checkpoint may hold.

    Raises:
        FileExistsError: ``target`` exists.
        CheckpointError: ``source`` is damaged, or (UnsafeCheckpointError) would have to run code to be read.
    """
    if target.exists():
        raise FileExistsError(f'{str(target)!r} exists already. Choose another name or remove it first.')
    reason = damage(source)
    if reason is not None:
        raise CheckpointError(f'{str(source)!r} is damaged: {reason}')
    state = read_state(source, weights_only=weights_only, extra_classes=extra_classes)
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = target.with_name(_HIDDEN_PREFIX + target.name)
    _remove(hidden)
    try:
        (_write_shards if sharded else _write_file)(state, hidden)
        os.replace(hidden, target)
    finally:
        _remove(hidden)


def read_state(source: Path, *, weights_only: bool = False, extra_classes: Iterable[str] = ()) -> dict[str, Any]:
    """The contents of a checkpoint of either form, files of config and tokenizer parsed."""
    if source.is_dir():
        state = ShardedCheckpoint(str(source), tuple(extra_classes)).state_dict(weights_only)
    else:
        state = load_checkpoint_file(source, extra_classes)
    if 'model' not in state.get('state', {}):
        raise CheckpointError(f'{str(source)!r} holds no model: it is no checkpoint of Composer')
    if weights_only:
        state = {'state': {key: state['state'][key] for key in _WEIGHTS if key in state['state']}}
    return _with_files(state, lambda files: _parsed(files, str(source)))


def _with_files(state: dict[str, Any], change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """``state`` with the files of the Hugging Face model and tokenizer changed; what was read stays as it is."""
    integrations = state['state'].get('integrations') or {}
    if 'huggingface' not in integrations:
        return state
    return {**state, 'state': {**state['state'], 'integrations': {**integrations, 'huggingface': change(integrations['huggingface'])}}}


def _as_text(files: Mapping[str, Any]) -> dict[str, Any]:
    """Each file as one string, as it stood in its folder."""
    return {group: {name: {**entry, 'content': _text_of(entry)} for name, entry in entries.items()} for group, entries in files.items()}


def _text_of(entry: Mapping[str, Any]) -> Any:
    content = entry['content']
    if isinstance(content, str | bytes):
        return content
    return json.dumps(content, ensure_ascii=False) if entry['file_extension'] == '.json' else '\n'.join(content)


def _parsed(files: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The inverse: JSON parsed and other text as a list of lines, which is how Composer keeps them in one file."""
    return {
        group: {
            name: {**entry, 'content': entry['content'].split('\n')} if entry['file_extension'] == '.txt' and isinstance(entry['content'], str) else entry
            for name, entry in entries.items()
        }
        for group, entries in parse_files(files, source).items()
    }


def _write_file(state: dict[str, Any], path: Path) -> None:
    with path.open('wb') as f:  # by name torch refuses some, such as one that begins with a point and has no other
        torch.save(state, f)
    flush_to_disk(path)


def _write_shards(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='torch.distributed is')
        warnings.filterwarnings('ignore', message='TypedStorage is deprecated')
        dcp.save(_with_files(state, _as_text), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    seal(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
