"""The scalar that is differentiated, from whatever a model's ``loss`` returned."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ['total_loss']


def total_loss(loss: Any) -> torch.Tensor:
    """The training loss as a scalar: ``total`` of a dict of losses, else the sum of the means of a dict's or list's members, else the mean."""
    if isinstance(loss, dict):
        return loss['total'].mean() if 'total' in loss else sum(v.mean() for v in loss.values())
    if isinstance(loss, (list, tuple)):
        return sum(v.mean() for v in loss)
    return loss.mean()
