"""Builds modules without memory for their weights.

Parameters are moved as they are registered, so that the initialisation which constructors do right after touches no memory on the meta
device. ``torch.device('meta')`` as a context would do it in less code, but would also take buffers away, which must stay real: nothing recomputes them.
"""

from __future__ import annotations

import contextlib
from typing import Any, Iterator

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ['init_empty_weights', 'init_on_device']


@contextlib.contextmanager
def init_empty_weights(include_buffers: bool = False) -> Iterator[None]:
    """Modules built inside have their parameters on the meta device.

    Args:
        include_buffers: whether buffers go there too.
    """
    with init_on_device(torch.device('meta'), include_buffers=include_buffers):
        yield


@contextlib.contextmanager
def init_on_device(device: torch.device | str, include_buffers: bool = False) -> Iterator[None]:
    """Modules built inside have their parameters on ``device``. Ties, attributes and ``requires_grad`` of parameters are kept.

    Args:
        device: where parameters go.
        include_buffers: whether buffers go there too.
    """
    device = torch.device(device)
    register_parameter = nn.Module.register_parameter
    register_buffer = nn.Module.register_buffer
    # A parameter registered twice (tied weights) must become one moved parameter, not two. Weak keys, so that originals are freed at once.
    moved = WeakIdKeyDictionary()

    def register_moved_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register_parameter(module, name, param)
        if param is None or param.device == device:
            return
        if param not in moved:
            moved[param] = type(param)(param.detach().to(device), requires_grad=param.requires_grad)
            moved[param].__dict__.update(param.__dict__)
        module._parameters[name] = moved[param]

    def register_moved_buffer(module: nn.Module, name: str, buffer: torch.Tensor | None, *args: Any, **kwargs: Any) -> None:
        register_buffer(module, name, buffer, *args, **kwargs)
        if buffer is not None:
            module._buffers[name] = buffer.to(device)

    nn.Module.register_parameter = register_moved_parameter
    if include_buffers:
        nn.Module.register_buffer = register_moved_buffer
    try:
        yield
    finally:
        nn.Module.register_parameter = register_parameter
        nn.Module.register_buffer = register_buffer
