"""Config: YAML and overrides in, one typed and frozen object out, every problem in one report. Nothing here imports torch."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

_NAMES = {
    'TRAIN_CONFIG_KEYS': 'llmfoundry.config.train',
    'TrainConfig': 'llmfoundry.config.train',
    'calculate_batch_size_info': 'llmfoundry.config.batch_size',
    'config_to_yaml': 'llmfoundry.config.containers',
    'load_train_config': 'llmfoundry.config.load',
    'make_dataclass_and_log_config': 'llmfoundry.config.containers',
    'pop_config': 'llmfoundry.config.containers',
    'to_dict_container': 'llmfoundry.config.containers',
    'to_list_container': 'llmfoundry.config.containers',
    'update_batch_size_info': 'llmfoundry.config.batch_size',
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _NAMES)
