"""An optimizer that changes nothing, for runs that only evaluate or only feed data."""

from __future__ import annotations

from typing import Any, Callable, Iterable

import torch
from torch.optim import Optimizer

__all__ = ['NoOp']


class NoOp(Optimizer):
    """Leaves the parameters as they are.

    Args:
        params: parameters, or dicts of parameter groups. The groups have ``lr`` 0, since schedulers and monitors ask for one.
    """

    def __init__(self, params: Iterable[torch.Tensor] | Iterable[dict[str, Any]]) -> None:
        super().__init__(params, {'lr': 0.0, 'weight_decay': 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Returns what ``closure``, if given, returned."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()
