"""Fully connected layers: torch's, and TransformerEngine's where that is installed.

``TELinear`` is looked up on first access (PEP 562), since importing TransformerEngine takes seconds and needs CUDA.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

__all__ = ['TorchLinear', 'import_te']

TorchLinear = nn.Linear


def import_te(wanted_by: str) -> Any:
    """Returns ``transformer_engine.pytorch``.

    Args:
        wanted_by: the config value that asks for it, for the error text.

    Raises:
        ImportError: it is not installed or does not load.
    """
    try:
        return importlib.import_module('transformer_engine.pytorch')
    except (ImportError, OSError) as e:
        raise ImportError(f'{wanted_by} needs TransformerEngine (pip install "transformer-engine[pytorch]", CUDA only): {e}') from e


def __getattr__(name: str) -> Any:
    if name == 'TELinear':
        return import_te('fc_type te').Linear
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
