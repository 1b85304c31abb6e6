"""A base model as files: where its folder is, its architecture without weights, and its weights one by one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

import huggingface_hub
import torch
from safetensors import safe_open

from llmfoundry.checkpoint.reader import LazyTensor, lazy_tensors
from llmfoundry.checkpoint.trained_model import meta_parameters
from llmfoundry.errors import CheckpointError
from llmfoundry.models.hf.load import DTYPE_KEY, auto_class, load_config

__all__ = ['BaseModel', 'open_base_model']

_WANTED_FILES = ('*.json', '*.safetensors', '*.py', '*.txt', '*.model', '*.jinja', '*.tiktoken', 'LICENSE*', 'LICENCE*', 'NOTICE*')


@dataclass
class BaseModel:
    """A pretrained model in a local folder.

    Attributes:
        name: as the user gave it.
        folder: where its files are.
        config: its config; change ``vocab_size`` before ``shell`` to have other embeddings.
    """

    name: str
    folder: Path
    config: Any
    trust_remote_code: bool = False

    @property
    def content(self) -> dict[str, Any]:
        """Contents of config.json, as they are."""
        return json.loads((self.folder / 'config.json').read_text(encoding='utf-8'))

    def shell(self) -> Any:
        """The architecture with its parameters on the meta device, tied as the config says."""
        with meta_parameters():
            model = auto_class(self.config).from_config(self.config, trust_remote_code=self.trust_remote_code)
        model.tie_weights()
        return model.eval()

    def load(self) -> Any:
        """The whole model in fp32."""
        return auto_class(self.config).from_pretrained(self.folder, config=self.config, trust_remote_code=self.trust_remote_code, **{DTYPE_KEY: torch.float32}).eval()

    def weights(self, wanted: Mapping[str, Any]) -> dict[str, LazyTensor]:
        """Weights by name, read when called for; from a loaded model where the files have other names than the model or are pickled.

        Args:
            wanted: the state dict of ``shell``.
        """
        files = sorted(self.folder.glob('*.safetensors'))
        index = self.folder / 'model.safetensors.index.json'
        if index.exists():
            files = [self.folder / name for name in sorted(set(json.loads(index.read_text(encoding='utf-8'))['weight_map'].values()))]
        elif (self.folder / 'model.safetensors').exists():
            files = [self.folder / 'model.safetensors']
        lazy = {name: tensor for file in files for name, tensor in _lazy_file(file).items()}
        ids_present = {id(wanted[name]) for name in lazy if name in wanted}
        if lazy and all(id(tensor) in ids_present for tensor in wanted.values()):
            return lazy
        return lazy_tensors(self.load().state_dict())


def open_base_model(name: str, trust_remote_code: bool = False, token: bool | str | None = None) -> BaseModel:
    """The base model called ``name``, a local folder or a Hub repository, which is downloaded.

    Raises:
        CheckpointError: it cannot be found.
        ValueError: its config needs code from its repository, see ``load_config``.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_WANTED_FILES), token=token or None))
        except (OSError, ValueError, huggingface_hub.errors.HFValidationError) as e:
            raise CheckpointError(f'The base model {name!r} is neither a local folder nor a repository that can be reached on the Hugging Face Hub. Cause: {" ".join(str(e).split())[:300]}') from e
    if not (folder / 'config.json').is_file():
        raise CheckpointError(f'The base model {name!r} has no config.json, so it is no model folder (it holds {", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "nothing"})')
    return BaseModel(name, folder, load_config(str(folder), trust_remote_code, token, None, None), trust_remote_code)


def _lazy_file(path: Path) -> dict[str, LazyTensor]:
    def load(name: str) -> torch.Tensor:
        with safe_open(path, framework='pt') as file:
            return file.get_tensor(name)

    with safe_open(path, framework='pt') as file:
        found = {}
        for name in file.keys():
            part = file.get_slice(name)
            dtype = _DTYPES.get(part.get_dtype())
            if dtype is None:
                raise CheckpointError(f'{str(path)!r}: {name!r} is stored as {part.get_dtype()}, a quantised form; adapters are merged into float weights')
            found[name] = LazyTensor(tuple(part.get_shape()), dtype, lambda n=name: load(n))
        return found


_DTYPES = {
    'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16, 'I64': torch.int64, 'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8,
    'U8': torch.uint8, 'BOOL': torch.bool,
}
