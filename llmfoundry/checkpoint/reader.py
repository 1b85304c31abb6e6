"""One view of both kinds of Composer checkpoint: the model's weights by their Hugging Face names, the model config, the tokenizer's files.

``open_checkpoint`` takes what users have at hand: a local file, a folder of shards, a ``.symlink`` note, or a URI of an object store. Weights are handed out one by
one, so that a converter never holds the model twice.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import posixpath
import shutil
import tempfile
from dataclasses import dataclass, field
from typing import Any, Callable, Iterable, Iterator, Mapping

import torch

from llmfoundry.checkpoint.safe_load import load_checkpoint_file
from llmfoundry.checkpoint.sharded import METADATA_FILE, ShardedCheckpoint
from llmfoundry.errors import CheckpointError
from llmfoundry.optim.parameter_names import plain_name

__all__ = ['Checkpoint', 'LazyTensor', 'lazy_tensors', 'open_checkpoint', 'parse_files']


@dataclass(frozen=True)
class LazyTensor:
    """A weight that is read when called for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor] = field(repr=False)
    # Equal for two names that share one tensor; None where the file does not tell.
    storage: tuple[Any, ...] | None = None

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Checkpoint:
    """What an export needs of a checkpoint.

    Attributes:
        source: where it came from, for messages.
        weights: name of the parameter in the Hugging Face model -> weight.
        huggingface: the ``state.integrations.huggingface`` dictionary: ``model`` (config and class, configs of adapter and generation) and ``tokenizer`` (files).
        model_class: the class itself where it is at hand, as in a running training; None to find it by name.
    """

    source: str
    weights: Mapping[str, LazyTensor]
    huggingface: Mapping[str, Any]
    model_class: type | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Contents of config.json."""
        return self.huggingface['model']['config']['content']

    @property
    def class_name(self) -> str:
        """Class of the model, without the prefix that FSDP2 puts before it: ``MPTForCausalLM``."""
        return self.class_path.rpartition('.')[2]

    @property
    def class_path(self) -> str:
        """Full path of the class as saved; FSDP2 gives its own module for every class."""
        module, _, name = str(self.huggingface['model']['config'].get('class', '')).rpartition('.')
        return f'{module}.{name.removeprefix("FSDP")}'

    @property
    def peft_config(self) -> dict[str, Any] | None:
        """Contents of adapter_config.json of a run with an adapter, else None."""
        entry = self.huggingface['model'].get('peft_config')
        return None if entry is None else entry['content']

    @property
    def generation_config(self) -> dict[str, Any] | None:
        """Contents of generation_config.json, where the checkpoint has it (Composer's own have not)."""
        entry = self.huggingface['model'].get('generation_config')
        return None if entry is None else entry['content']

    @property
    def has_resized_embeddings(self) -> bool:
        """Whether the embeddings of an adapted model were grown for the tokenizer, so that its base model's folder lacks rows."""
        return bool(self.huggingface['model']['config'].get('resized_embeddings'))


def lazy_tensors(state_dict: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Weights that are already in memory, or mapped into it."""
    lazy = {}
    for name, tensor in state_dict.items():
        if isinstance(tensor, torch.Tensor):
            storage = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()) if tensor.numel() and not tensor.is_meta else None
            lazy[name] = LazyTensor(tuple(tensor.shape), tensor.dtype, lambda t=tensor: t, storage)
    return lazy


def _hf_name(name: str) -> str:
    """Name in the Composer model -> name in the Hugging Face model inside it (``model.transformer.wte.weight`` -> ``transformer.wte.weight``)."""
    return plain_name(name).removeprefix('model.')


def _read_monolithic(path: str, source: str, extra_classes: Iterable[str]) -> Checkpoint:
    loaded = load_checkpoint_file(path, extra_classes)
    if 'state' not in loaded:
        raise RuntimeError(
            f'"state" is not an available key in the provided composer checkpoint {source!r}. Is {source!r} a valid checkpoint from Composer? Keys found: {sorted(map(str, loaded))[:10]}',
        )
    state = loaded['state']
    huggingface = state.get('integrations', {}).get('huggingface')
    _check_huggingface(huggingface, source)
    if not state.get('model'):
        raise CheckpointError(f'{source!r} holds no model weights under state.model')
    return Checkpoint(source, {_hf_name(k): v for k, v in lazy_tensors(state['model']).items()}, huggingface)


def _read_sharded(folder: str, source: str, extra_classes: Iterable[str]) -> Checkpoint:
    sharded = ShardedCheckpoint(folder, tuple(extra_classes))
    paths = {name: sharded.path_of(name) for name in sharded.tensor_names()}
    model = {name: path for name, path in paths.items() if path[:2] == ('state', 'model')}
    if not model:
        raise RuntimeError(f'"state" is not an available key in the provided composer checkpoint {source!r}, or it holds no model. Is {source!r} a valid checkpoint from Composer?')
    huggingface = parse_files(sharded.values(('state', 'integrations', 'huggingface')), source)
    _check_huggingface(huggingface, source)
    weights = {}
    for name, path in model.items():
        shape, dtype = sharded.shape_and_dtype(name)
        weights[_hf_name('.'.join(map(str, path[2:])))] = LazyTensor(shape, dtype, lambda n=name: sharded.tensor(n))
    return Checkpoint(source, weights, huggingface)


def parse_files(huggingface: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Parses the JSON files that our sharded checkpoints hold as one string each (see ``BaseHuggingFaceModel.get_metadata``); other checkpoints hold them parsed."""
    try:
        return {
            group: {name: {**entry, 'content': json.loads(entry['content'])} if _is_json_text(entry) else entry for name, entry in entries.items()}
            for group, entries in huggingface.items()
        }
    except ValueError as e:
        raise CheckpointError(f'{source!r}: a file in the metadata of the model or the tokenizer is damaged. Cause: {e}') from e


def _is_json_text(entry: Mapping[str, Any]) -> bool:
    return entry.get('file_extension') == '.json' and isinstance(entry.get('content'), str)


def _check_huggingface(huggingface: Any, source: str) -> None:
    if not huggingface or 'config' not in huggingface.get('model', {}):
        raise RuntimeError(
            f'"integrations.huggingface" is not an available key in the provided composer checkpoint {source!r}, so there is neither a model config nor a tokenizer to '
            'export. Only checkpoints of a Hugging Face model in Composer (mpt_causal_lm, hf_causal_lm, ...) can be converted.',
        )


@contextlib.contextmanager
def open_checkpoint(path: str, local_copy: str | None = None, extra_classes: Iterable[str] = ()) -> Iterator[Checkpoint]:
    """Opens a checkpoint, downloading it first if it is remote.

    Args:
        path: a Composer ``.pt`` file, a folder of a sharded checkpoint, or a URI (``s3://...``) of either. A name that ends in ``.symlink`` is followed.
        local_copy: where to keep the download. Default: a temporary folder that is removed afterwards.
        extra_classes: see ``load_checkpoint_file``.

    Raises:
        FileNotFoundError: nothing there.
        RuntimeError: no ``state`` or no Hugging Face metadata in it; CheckpointError or UnsafeCheckpointError for damaged or unsafe files.
    """
    with contextlib.ExitStack() as stack:
        local = path
        if '://' in path:
            if local_copy is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix='composer-checkpoint-'))
                local_copy = os.path.join(folder, posixpath.basename(path.rstrip('/')) or 'checkpoint')
            local = _download(path, local_copy)
        elif local_copy is not None and os.path.isfile(path):
            os.makedirs(os.path.dirname(os.path.abspath(local_copy)), exist_ok=True)
            shutil.copyfile(path, local_copy)
            local = local_copy
        local = _follow_symlink_note(local)
        if not os.path.exists(local):
            raise FileNotFoundError(f'No checkpoint at {path!r}')
        read = _read_sharded if os.path.isdir(local) else _read_monolithic
        yield read(local, path, extra_classes)


def _follow_symlink_note(path: str) -> str:
    """Composer writes ``latest-rank0.pt.symlink`` text files where the store has no links; they hold the name of the real one."""
    if not path.endswith('.symlink') or not os.path.isfile(path):
        return path
    with open(path, encoding='utf-8') as f:
        target = f.read().strip()
    beside = os.path.join(os.path.dirname(path), os.path.basename(target.rstrip('/')))
    return target if os.path.isabs(target) or os.path.exists(target) else beside


def _download(uri: str, destination: str) -> str:
    """Fetches the object, or all objects below the prefix, that ``uri`` names."""
    helpers = importlib.import_module('composer.utils.file_helpers')
    _, _, prefix = helpers.parse_uri(uri)
    is_web_page = uri.lower().startswith(('http://', 'https://'))
    names = [] if is_web_page else [n for n in helpers.list_remote_objects(uri) if n.startswith(prefix.rstrip('/') + '/')]
    if not names:  # one file; get_file also follows Composer's .symlink notes
        os.makedirs(os.path.dirname(os.path.abspath(destination)), exist_ok=True)
        helpers.get_file(uri, destination, overwrite=True, progress_bar=True)
        return destination
    os.makedirs(destination, exist_ok=True)
    # The metadata file comes last: without it a half-finished download does not look like a checkpoint.
    for name in sorted(names, key=lambda n: n.endswith(METADATA_FILE)):
        relative = posixpath.relpath(name, prefix.rstrip('/'))
        local = os.path.join(destination, relative)
        os.makedirs(os.path.dirname(local), exist_ok=True)
        helpers.get_file(f'{uri.rstrip("/")}/{relative}', local, overwrite=True, progress_bar=True)
    return destination

