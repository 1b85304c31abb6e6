"""The ``mosaicml`` logger of the closed MosaicML platform, which can be named but not built here.

The name stays in the registry so that a YAML written for the platform gets a sentence instead of an unknown-name error. Composer adds its
own platform logger by itself when ``MOSAICML_PLATFORM`` is set, which needs no entry.
"""

from __future__ import annotations

from typing import Any

from llmfoundry.errors import ConfigError, ConfigProblem

__all__ = ['MosaicMLPlatformLogger']


class MosaicMLPlatformLogger:
    """Raises when constructed.

    Args:
        log_interval: seconds between messages to the platform.
        ignore_keys: glob patterns of metrics to leave out.
        ignore_exceptions: whether a failed message is ignored.

    Raises:
        ConfigError: always.
    """

    def __init__(self, log_interval: int = 60, ignore_keys: list[str] | None = None, ignore_exceptions: bool = True, **kwargs: Any) -> None:
        del log_interval, ignore_keys, ignore_exceptions, kwargs
        raise ConfigError([
            ConfigProblem('loggers.mosaicml', 'reports to the MosaicML platform, which outside of it does not exist. Remove the block; use tensorboard, wandb or mlflow to record metrics.'),
        ])
