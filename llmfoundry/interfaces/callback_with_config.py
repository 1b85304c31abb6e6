"""Base class of callbacks that need the whole training config."""

from __future__ import annotations

import abc
from typing import Any

from composer.core import Callback

__all__ = ['CallbackWithConfig']


class CallbackWithConfig(Callback, abc.ABC):
    """A callback registered in ``callbacks_with_config``; the builder passes it a copy of the training config.

    Args:
        train_config: the config as plain containers; changing it changes nothing.
    """

    def __init__(self, train_config: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        del train_config
        super().__init__(*args, **kwargs)
