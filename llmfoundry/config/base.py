"""What every typed config block shares: frozen, no unknown keys, and the docstring under a field is its description."""

from __future__ import annotations

import typing
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

__all__ = ['Block', 'field_types', 'mandatory_keys']


class Block(BaseModel):
    """A block of the YAML with known keys."""

    model_config = ConfigDict(frozen=True, extra='forbid', use_attribute_docstrings=True, protected_namespaces=())

    DERIVED: ClassVar[frozenset[str]] = frozenset()
    """Mandatory fields that the loader computes when the user leaves them out."""


def field_types(block: type[Block]) -> dict[str, Any]:
    """Field name -> annotation."""
    hints = typing.get_type_hints(block)
    return {name: hints[name] for name in block.model_fields}


def mandatory_keys(block: type[Block]) -> list[str]:
    """Fields that the user has to give, in the order of the class."""
    return [name for name, info in block.model_fields.items() if info.is_required() and name not in block.DERIVED]
