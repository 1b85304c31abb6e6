"""One function per command, importable without what it needs until it is called."""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

from llmfoundry.lazy import lazy_exports

_NAMES = {
    'TRAIN_CONFIG_KEYS': 'llmfoundry.config.train',
    'TrainConfig': 'llmfoundry.config.train',
    'convert_dataset_hf': 'llmfoundry.command_utils.data_prep.convert_dataset_hf',
    'convert_dataset_hf_from_args': 'llmfoundry.command_utils.data_prep.convert_dataset_hf',
    'convert_dataset_json': 'llmfoundry.command_utils.data_prep.convert_dataset_json',
    'convert_dataset_json_from_args': 'llmfoundry.command_utils.data_prep.convert_dataset_json',
    'convert_finetuning_dataset': 'llmfoundry.command_utils.data_prep.convert_finetuning_dataset',
    'convert_finetuning_dataset_from_args': 'llmfoundry.command_utils.data_prep.convert_finetuning_dataset',
    'convert_text_to_mds': 'llmfoundry.command_utils.data_prep.convert_text_to_mds',
    'convert_text_to_mds_from_args': 'llmfoundry.command_utils.data_prep.convert_text_to_mds',
    'train_from_yaml': 'llmfoundry.command_utils.train',
    'validate_config': 'llmfoundry.command_utils.train',
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _NAMES)
__all__ += ['train']


class _Package(types.ModuleType):
    """Keeps ``train`` the function: importing the submodule of that name would rebind it to the module."""

    @property
    def train(self) -> Any:
        return importlib.import_module('llmfoundry.command_utils.train').train

    @train.setter
    def train(self, module: types.ModuleType) -> None:
        """The import system binds the submodule here; ``sys.modules`` holds it anyway."""


sys.modules[__name__].__class__ = _Package
