"""Freezes parameters by name before training starts.

That is done before DDP wraps the model, which would otherwise wait for gradients that never come; at the start of training it is done again, for trainers made otherwise.
"""

from __future__ import annotations

from typing import Sequence

from composer.core import Callback, State
from composer.loggers import Logger

from llmfoundry.errors import ConfigError, ConfigProblem
from llmfoundry.experimental import experimental_class
from llmfoundry.optim.parameter_names import plain_name

__all__ = ['LayerFreezing']


@experimental_class('LayerFreezing')
class LayerFreezing(Callback):
    """Sets ``requires_grad`` of the named parameters to False.

    Args:
        layer_names: full names as ``model.named_parameters()`` gives them, for example ``model.transformer.wte.weight``; what DDP and activation checkpointing put into them may be left out.

    Raises:
        ConfigError: (a ValueError, before training starts) a name that no parameter has, or no name at all.
    """

    def __init__(self, layer_names: Sequence[str]) -> None:
        self.layer_names = list(layer_names)

    def init(self, state: State, logger: Logger) -> None:
        self.fit_start(state, logger)

    def fit_start(self, state: State, logger: Logger) -> None:
        del logger
        parameters = {plain_name(name): parameter for name, parameter in state.model.named_parameters()}
        names = [plain_name(name) for name in self.layer_names]
        unknown = sorted(set(names) - set(parameters))
        if unknown or not self.layer_names:
            listed = ', '.join(sorted(parameters)[:20]) + (', ...' if len(parameters) > 20 else '')
            problem = f'no parameter is called {", ".join(unknown)}' if unknown else 'names nothing to freeze'
            raise ConfigError([ConfigProblem('callbacks.layer_freezing.layer_names', f'{problem}. The model has: {listed}')])
        for name in names:
            parameters[name].requires_grad_(False)
