"""A role: the text that stands before and after what one party of a conversation says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping

__all__ = ['Role']


@dataclass(frozen=True)
class Role:
    """Markers around the text of one party.

    Args:
        prefix: stands before the text, for example ``'User: '``.
        suffix: stands after it, for example ``'<|im_end|>'``.
        strip_text: removes white space around the text first.
    """

    prefix: str = ''
    suffix: str = ''
    strip_text: bool = True

    def render(self, text: str) -> str:
        """``text`` between the markers."""
        return f'{self.prefix}{text.strip() if self.strip_text else text}{self.suffix}'

    @classmethod
    def of(cls, value: Role | Mapping[str, Any] | str) -> Role:
        """A role from what a YAML can hold: ``{prefix: ..., suffix: ...}``, or the prefix alone.

        Raises:
            TypeError: neither a mapping nor a text, or a mapping with other keys.
        """
        if isinstance(value, Role):
            return value
        if isinstance(value, str):
            return cls(prefix=value)
        if isinstance(value, Mapping):
            return cls(**value)
        raise TypeError(f'a role is a mapping with prefix, suffix and strip_text, or the prefix alone; got {type(value).__name__} {value!r}')
