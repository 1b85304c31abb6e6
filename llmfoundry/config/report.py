"""Collects what is wrong with a config, so that all of it is told at once.

A ``Report`` knows on which line of the YAML file each key stands and which keys came from the command line; checks only say path and message.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from llmfoundry.config.value_types import UNRESOLVED
from llmfoundry.errors import ConfigError, ConfigProblem

__all__ = ['COMMAND_LINE', 'KeyPath', 'Report', 'lookup', 'nearest']

KeyPath = tuple[str, ...]
COMMAND_LINE = 'command line'


def nearest(name: str, valid: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The valid name most like ``name``, if one is like it at all; upper and lower case, ``-`` and ``_`` do not count."""
    by_form = {v.lower().replace('-', '_'): v for v in sorted(valid)}
    form = name.lower().replace('-', '_')
    found = difflib.get_close_matches(form, by_form, n=1, cutoff=cutoff)
    if not found and len(form) >= 4:
        found = [v for v in by_form if form in v]
    return by_form[found[0]] if found else None


def lookup(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at a dotted path; ``default`` when a part of the path is absent, null or unresolved."""
    value: Any = config
    for part in path.split('.'):
        value = value.get(part) if isinstance(value, Mapping) else None
        if value is None or value is UNRESOLVED:
            return default
    return value


class Report:
    """Problems of one config.

    Args:
        lines: key path -> line (1-based) in the YAML file.
        source: name of the file, or None when the config is a dict.
        overridden: key paths that were set on the command line.
    """

    def __init__(self, lines: Mapping[KeyPath, int] | None = None, source: str | None = None, overridden: Iterable[KeyPath] = ()) -> None:
        self.lines = dict(lines or {})
        self.source = source
        self.overridden = set(overridden)
        self.problems: list[ConfigProblem] = []
        self._paths: set[KeyPath] = set()

    def add(self, path: KeyPath | str, message: str) -> None:
        """Notes a problem at ``path``."""
        path = tuple(path.split('.')) if isinstance(path, str) else tuple(path)
        self._paths.add(path)
        where, line = self._place(path)
        self.problems.append(ConfigProblem('.'.join(path) or 'config', message, line, where))

    def add_unknown(self, path: KeyPath, valid: Iterable[str], hint: str | None = None) -> None:
        """Notes a key that is not among ``valid``, with the nearest one."""
        valid = sorted(valid)
        near = nearest(path[-1], valid)
        if hint is None and near is not None:
            hint = f'did you mean {near!r}?'
        elif hint is None and len(valid) <= 12:
            hint = f'valid keys: {", ".join(valid)}' if valid else 'it takes no arguments'
        self.add(path, f'unknown key ({hint})' if hint else 'unknown key')

    def has(self, path: KeyPath | str) -> bool:
        """Whether a problem was noted at exactly this path."""
        return (tuple(path.split('.')) if isinstance(path, str) else path) in self._paths

    def _place(self, path: KeyPath) -> tuple[str | None, int | None]:
        if path not in self.lines and any(key[: len(path)] == path for key in self.overridden):
            return COMMAND_LINE, None
        for length in range(len(path), 0, -1):
            part = path[:length]
            if part in self.overridden:
                return COMMAND_LINE, None
            if part in self.lines:
                return self.source, self.lines[part]
        return None, None

    def pruned(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of ``config`` without unresolved values and without those that a problem points to, for rules that compare values."""

        def keep(value: Any, path: KeyPath) -> Any:
            if isinstance(value, Mapping):
                return {k: keep(v, (*path, k)) for k, v in value.items() if v is not UNRESOLVED and (*path, k) not in self._paths}
            if isinstance(value, list):
                return [keep(v, (*path, str(i))) for i, v in enumerate(value) if v is not UNRESOLVED and (*path, str(i)) not in self._paths]
            return value

        return keep(config, ())

    def raise_if_any(self) -> None:
        """Raises one ``ConfigError`` with all problems, in the order of the file."""
        if self.problems:
            ordered = sorted(self.problems, key=lambda p: (p.line is None, p.line or 0))
            raise ConfigError(ordered, source=self.source)
