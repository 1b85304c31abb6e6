"""Freezes parameters by name when training starts."""

from __future__ import annotations

from typing import Sequence

from composer.core import Callback, State
from composer.loggers import Logger

from llmfoundry.errors import ConfigError, ConfigProblem
from llmfoundry.experimental import experimental_class

__all__ = ['LayerFreezing']


@experimental_class('LayerFreezing')
class LayerFreezing(Callback):
    """Sets ``requires_grad`` of the named parameters to False.

    Args:
        layer_names: full names as ``model.named_parameters()`` gives them, for example ``model.transformer.wte.weight``.

    Raises:
        ConfigError: (a ValueError, when training starts) a name that no parameter has, or no name at all.
    """

    def __init__(self, layer_names: Sequence[str]) -> None:
        self.layer_names = list(layer_names)

    def fit_start(self, state: State, logger: Logger) -> None:
        del logger
        parameters = dict(state.model.named_parameters())
        unknown = sorted(set(self.layer_names) - set(parameters))
        if unknown or not self.layer_names:
            listed = ', '.join(sorted(parameters)[:20]) + (', ...' if len(parameters) > 20 else '')
            problem = f'no parameter is called {", ".join(unknown)}' if unknown else 'names nothing to freeze'
            raise ConfigError([ConfigProblem('callbacks.layer_freezing.layer_names', f'{problem}. The model has: {listed}')])
        for name in self.layer_names:
            parameters[name].requires_grad_(False)
