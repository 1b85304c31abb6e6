"""Import path of plug-ins for the typed configuration."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

_NAMES = {
    'TRAIN_CONFIG_KEYS': 'llmfoundry.config.train',
    'TrainConfig': 'llmfoundry.config.train',
    'calculate_batch_size_info': 'llmfoundry.config.batch_size',
    'update_batch_size_info': 'llmfoundry.config.batch_size',
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _NAMES)
