"""``async_eval``: evaluation in runs of their own on the closed MosaicML platform, which can be named but not done here.

The name stays in the registry so that a YAML written for the platform gets a sentence instead of an unknown-name error.
"""

from __future__ import annotations

from typing import Any

from llmfoundry.errors import ConfigError, ConfigProblem
from llmfoundry.interfaces.callback_with_config import CallbackWithConfig

__all__ = ['AsyncEval']


class AsyncEval(CallbackWithConfig):
    """Raises when constructed.

    Args:
        train_config: the config of the run.
        interval: how often a checkpoint would be evaluated.
        eval_run_config: image, command, compute and scheduling of the evaluation runs.

    Raises:
        ConfigError: (a ValueError) always.
    """

    def __init__(self, train_config: dict[str, Any], interval: str | int, eval_run_config: dict[str, Any] | None = None) -> None:
        del eval_run_config
        wanted = 'eval_interval' if train_config.get('eval_interval') in (None, 0, 1) else 'the present eval_interval'
        raise ConfigError([
            ConfigProblem(
                'callbacks.async_eval',
                f'starts evaluation runs on the MosaicML platform, which outside of it does not exist. Remove the block. To evaluate while training, give eval_loader (or icl_tasks) and set {wanted} to '
                f'{interval!r}; to evaluate beside it, run scripts/eval/eval.py on the checkpoints of save_folder on another machine.',
            ),
        ])
