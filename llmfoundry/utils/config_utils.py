"""Import path of plug-ins for the typed configuration."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

_NAMES = {
    'EVAL_CONFIG_KEYS': 'llmfoundry.config.eval',
    'EvalConfig': 'llmfoundry.config.eval',
    'TRAIN_CONFIG_KEYS': 'llmfoundry.config.train',
    'TrainConfig': 'llmfoundry.config.train',
    'calculate_batch_size_info': 'llmfoundry.config.batch_size',
    'log_config': 'llmfoundry.command_utils.train',
    'log_dataset_uri': 'llmfoundry.loggers.dataset_inputs',
    'make_dataclass_and_log_config': 'llmfoundry.config.containers',
    'pop_config': 'llmfoundry.config.containers',
    'process_init_device': 'llmfoundry.command_utils.parallelism',
    'to_dict_container': 'llmfoundry.config.containers',
    'to_list_container': 'llmfoundry.config.containers',
    'update_batch_size_info': 'llmfoundry.config.batch_size',
    'update_config_with_batch_size_info': 'llmfoundry.config.batch_size',
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _NAMES)
