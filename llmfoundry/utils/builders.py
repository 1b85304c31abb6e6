"""Import path of plug-ins for ``llmfoundry.builders``."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

_NAMES = {
    'add_metrics_to_eval_loaders': 'llmfoundry.builders',
    'build_algorithm': 'llmfoundry.builders',
    'build_callback': 'llmfoundry.builders',
    'build_composer_model': 'llmfoundry.builders',
    'build_dataloader': 'llmfoundry.builders',
    'build_eval_loaders': 'llmfoundry.builders',
    'build_evaluators': 'llmfoundry.builders',
    'build_load_planner': 'llmfoundry.builders',
    'build_logger': 'llmfoundry.builders',
    'build_metric': 'llmfoundry.builders',
    'build_optimizer': 'llmfoundry.builders',
    'build_save_planner': 'llmfoundry.builders',
    'build_scheduler': 'llmfoundry.builders',
    'build_tokenizer': 'llmfoundry.builders',
    'build_tp_strategies': 'llmfoundry.builders',
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _NAMES)
