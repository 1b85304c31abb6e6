"""Reads a YAML file and remembers on which line each key stands.

The text is parsed twice: PyYAML's node tree gives lines, duplicate keys and keys that are not text; OmegaConf gives the values, with its reading of
numbers (``6e-4`` is a number) and its interpolations.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import yaml

from llmfoundry.config.report import KeyPath
from llmfoundry.errors import ConfigError, ConfigProblem

__all__ = ['YamlSource', 'read_yaml', 'syntax_error']

_STR_TAG = 'tag:yaml.org,2002:str'
_MERGE_TAG = 'tag:yaml.org,2002:merge'


@dataclass
class YamlSource:
    """Text of a YAML file, and the line of every key."""

    name: str
    text: str
    lines: dict[KeyPath, int] = field(default_factory=dict)


def read_yaml(path: str | os.PathLike) -> YamlSource:
    """Reads a config file.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML (with the line), not a mapping, a key twice in one block, or a key that is not text.
    """
    name = os.fspath(path)
    text = _read_text(name)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as e:
        raise syntax_error(e, name) from None
    if root is None:
        raise _fail(name, 'the file is empty; a config is a mapping of keys to values', None)
    if not isinstance(root, yaml.MappingNode):
        raise _fail(name, f'a config is a mapping of keys to values, got a {root.id} at the top level', root.start_mark.line + 1)
    source = YamlSource(name, text)
    problems: list[ConfigProblem] = []
    _walk(root, (), source, problems, set())
    if problems:
        raise ConfigError(problems, source=name)
    return source


def _read_text(name: str) -> str:
    try:
        with open(name, encoding='utf-8') as f:
            return f.read()
    except FileNotFoundError:
        raise _fail(name, 'no such file', None) from None
    except IsADirectoryError:
        raise _fail(name, 'is a folder; give the YAML file inside it', None) from None
    except PermissionError:
        raise _fail(name, 'permission denied', None) from None
    except UnicodeDecodeError as e:
        raise _fail(name, f'not UTF-8 text (byte {e.start}); save the file as UTF-8', None) from None


def syntax_error(error: yaml.YAMLError, name: str) -> ConfigError:
    """What PyYAML found wrong, with the line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return _fail(name, f'not valid YAML: {str(error).splitlines()[0]}', None)
    # A forgotten colon is noticed one line too late; the context mark is where the key began.
    mark = error.context_mark if 'could not find expected' in (error.problem or '') else error.problem_mark
    return _fail(name, _syntax_message(error), mark.line + 1 if mark else None)


def _fail(name: str, message: str, line: int | None) -> ConfigError:
    return ConfigError([ConfigProblem('yaml', message, line, name if line is not None else None)], source=name)


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    problem = (error.problem or 'syntax error').strip()
    if "'\\t'" in problem:
        problem += '; indent with spaces, not tabs'
    elif 'mapping values are not allowed' in problem:
        problem += '; check the indentation, or put quotes around a value that contains a colon'
    elif 'could not find expected' in problem:
        problem += "; is a ':' missing after a key?"
    return f'not valid YAML: {problem}'


def _walk(node: yaml.Node, path: KeyPath, source: YamlSource, problems: list[ConfigProblem], active: set[int]) -> None:
    """Fills ``source.lines`` and collects duplicate keys and keys that are not text. ``active`` stops recursive aliases."""
    if id(node) in active:
        return
    active = active | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            source.lines.setdefault((*path, str(index)), item.start_mark.line + 1)
            _walk(item, (*path, str(index)), source, problems, active)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag == _MERGE_TAG:
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                _walk(merged, path, source, [], active)
            continue
        name = _key_name(key)
        if key.tag != _STR_TAG:
            problems.append(ConfigProblem('.'.join((*path, name)), f'keys must be text, got {name} ({_tag_word(key.tag)}); put it in quotes', line, source.name))
        elif name in seen:
            problems.append(ConfigProblem('.'.join((*path, name)), f'the key is given twice in the same block, first on line {seen[name]}; delete one', line, source.name))
        seen.setdefault(name, line)
        source.lines[(*path, name)] = line
        _walk(value, (*path, name), source, problems, active)


def _key_name(node: yaml.Node) -> str:
    return node.value if isinstance(node, yaml.ScalarNode) else '?'


def _tag_word(tag: str) -> str:
    word: Any = tag.rpartition(':')[2]
    return {'bool': 'boolean', 'int': 'integer', 'float': 'number', 'seq': 'list', 'map': 'mapping'}.get(word, word)
