"""Reduced precision on the CPU, which Composer's Trainer refuses: ``precision: amp_bf16`` works through torch's own autocast.

The Trainer is told ``fp32`` and the model runs its forward passes under autocast, as the Trainer would do on a GPU. Parameters, gradients and
optimiser state stay in float32; matrix products, and with them the activations kept for the backward pass, are in the given dtype; norms,
softmax and the loss are computed in float32. The backward pass uses the dtypes that the forward pass recorded.
"""

from __future__ import annotations

import functools
from typing import Any, Callable, TypeVar

import torch

__all__ = ['wrap_forward']

M = TypeVar('M', bound=torch.nn.Module)

_METHODS = ('forward', 'eval_forward', 'loss', 'generate')


def wrap_forward(composer_model: M, dtype: torch.dtype = torch.bfloat16) -> M:
    """Makes the model's ``forward``, ``eval_forward``, ``loss`` and ``generate`` run under ``torch.autocast('cpu', dtype)``, in place.

    The class is replaced by a subclass, rather than the methods by closures over the model, so that copies of the model wrap themselves.

    Args:
        composer_model: a ``ComposerModel`` on the CPU.
        dtype: ``torch.bfloat16``. Autocast on the CPU knows float16 too, but without the gradient scaling that float16 training needs.

    Returns:
        The same object. Wrapping twice wraps once.

    Raises:
        ValueError: another dtype.
    """
    if dtype != torch.bfloat16:
        raise ValueError(f'CPU autocast with {dtype} is not offered: gradients would underflow without a gradient scaler. Use precision: amp_bf16, or fp32.')
    cls = type(composer_model)
    if getattr(cls, 'cpu_autocast_dtype', None) == dtype:
        return composer_model
    methods = {name: _under_autocast(getattr(cls, name), dtype) for name in _METHODS if hasattr(cls, name)}
    body = {**methods, 'cpu_autocast_dtype': dtype, '__module__': cls.__module__, '__doc__': cls.__doc__, '__qualname__': cls.__qualname__}
    composer_model.__class__ = type(cls.__name__, (cls,), body)
    return composer_model


def _under_autocast(method: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast('cpu', dtype=dtype):
            return method(*args, **kwargs)

    return run
