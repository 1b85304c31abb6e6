"""Composer's gradient clipping, which refuses at the start what it cannot do under FSDP2.

Adaptive clipping compares the norm of each unit's gradient with that of its weights; of a sharded parameter each rank holds a part. Composer refuses it for FSDP1 only, and after the first batch.
"""

from __future__ import annotations

from composer import algorithms as composer_algorithms
from composer.core import Event, State

from llmfoundry.errors import ConfigError, ConfigProblem

__all__ = ['GradientClipping']

CLIPPING_TYPES = ('norm', 'value', 'adaptive')


class GradientClipping(composer_algorithms.GradientClipping):
    """Clips gradients after the backward pass.

    Args:
        clipping_type: ``norm`` (of all gradients together), ``value`` (of each number) or ``adaptive`` (of each unit, https://arxiv.org/abs/2102.06171).
        clipping_threshold: the bound; for ``adaptive`` as a share of the weights' norm.

    Raises:
        ConfigError: (a ValueError) another type, or a threshold that is not positive; when training starts, ``adaptive`` with FSDP.
    """

    def __init__(self, clipping_type: str, clipping_threshold: float) -> None:
        problems = []
        if clipping_type not in CLIPPING_TYPES:
            problems.append(ConfigProblem('algorithms.gradient_clipping.clipping_type', f'must be one of {", ".join(CLIPPING_TYPES)}, got {clipping_type!r}'))
        if clipping_threshold <= 0:
            problems.append(ConfigProblem('algorithms.gradient_clipping.clipping_threshold', f'must be positive, got {clipping_threshold}'))
        if problems:
            raise ConfigError(problems)
        super().__init__(clipping_type=clipping_type, clipping_threshold=clipping_threshold)

    def match(self, event: Event, state: State) -> bool:
        if event == Event.FIT_START and self.clipping_type == 'adaptive' and state.fsdp_enabled:
            raise ConfigError([ConfigProblem('algorithms.gradient_clipping.clipping_type', "'adaptive' needs whole weights, and fsdp_config shards them. Use norm or value, or remove fsdp_config.")])
        return super().match(event, state)
