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
    if not found and len(form) >= 3:
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

    Attributes:
        overridden: key paths that were set on the command line.
        aliases: path of a value that is nothing but ``${name}`` -> path of what it names; what is wrong there is not repeated here.
        suggested: paths that were named as the right spelling of another key, so that they are not reported as missing too.
    """

    def __init__(self, lines: Mapping[KeyPath, int] | None = None, source: str | None = None) -> None:
        self.lines = dict(lines or {})
        self.source = source
        self.overridden: set[KeyPath] = set()
        self.aliases: dict[KeyPath, KeyPath] = {}
        self.suggested: set[KeyPath] = set()
        self._problems: dict[KeyPath, list[ConfigProblem]] = {}

    def add(self, path: KeyPath | str, message: str) -> None:
        """Notes a problem at ``path``."""
        path = tuple(path.split('.')) if isinstance(path, str) else tuple(path)
        where, line = self._place(path)
        problem = ConfigProblem('.'.join(path) or 'config', message, line, where)
        if problem not in self._problems.setdefault(path, []):
            self._problems[path].append(problem)

    def mark(self, path: KeyPath) -> None:
        """Makes ``has(path)`` true without a line of its own: the cause is reported elsewhere."""
        self._problems.setdefault(path, [])

    def add_unknown(self, path: KeyPath, valid: Iterable[str], hint: str | None = None) -> None:
        """Notes a key that is not among ``valid``, with the nearest one."""
        valid = sorted(valid)
        near = nearest(path[-1], valid)
        if near is not None:
            self.suggested.add((*path[:-1], near))
        if hint is None and near is not None:
            hint = f'did you mean {near!r}?'
        elif hint is None and len(valid) <= 12:
            hint = f'valid keys: {", ".join(valid)}' if valid else 'it takes no arguments'
        self.add(path, f'unknown key ({hint})' if hint else 'unknown key')

    def has(self, path: KeyPath | str) -> bool:
        """Whether a problem was noted at exactly this path."""
        return (tuple(path.split('.')) if isinstance(path, str) else path) in self._problems

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
                return {k: keep(v, (*path, k)) for k, v in value.items() if v is not UNRESOLVED and (*path, k) not in self._problems}
            if isinstance(value, list):
                return [keep(v, (*path, str(i))) for i, v in enumerate(value) if v is not UNRESOLVED and (*path, str(i)) not in self._problems]
            return value

        return keep(config, ())

    @property
    def problems(self) -> list[ConfigProblem]:
        """All problems in the order of the file, those of the command line last."""
        listed = [p for path, problems in self._problems.items() if not self._is_repeated(path) for p in problems]
        return sorted(listed, key=lambda p: (p.line is None, p.line or 0))

    def _is_repeated(self, path: KeyPath) -> bool:
        """Whether the value at ``path`` only repeats one for which there is a problem already."""
        seen, root = {path}, path
        while root in self.aliases:
            root = self.aliases[root]
            if root in seen:
                return False
            seen.add(root)
        return root != path and bool(self._problems.get(root))

    def raise_if_any(self) -> None:
        """Raises one ``ConfigError`` with all problems."""
        problems = self.problems
        if problems:
            raise ConfigError(problems, source=self.source)
