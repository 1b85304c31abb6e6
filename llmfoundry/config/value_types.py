"""Compares a plain value (what YAML can hold) with a type annotation, in words that a user understands.

One small engine serves the typed config classes and the signatures of registered components, so that ``optimizer.lr: fast`` and ``seed: fast``
read alike. Pydantic's own messages were dropped for this: one per union member, in Python terms. Types that YAML
cannot express (a ``Time``, a module) count as anything.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Union

__all__ = ['UNRESOLVED', 'describe_type', 'mismatch', 'show', 'type_schema']


class _Unresolved:
    """Stands for a value whose interpolation failed; that problem is already reported, so every check lets it pass."""

    def __repr__(self) -> str:
        return '<unresolved>'


UNRESOLVED = _Unresolved()

_WORDS = {int: 'an integer', float: 'a number', str: 'a string', bool: 'true or false', type(None): 'null'}
_PLURALS = {int: 'integers', float: 'numbers', str: 'strings', bool: 'booleans', dict: 'mappings', list: 'lists'}
_LIST_ORIGINS = (list, tuple, set, Sequence, Iterable)
_DICT_ORIGINS = (dict, Mapping)
_SHOWN_CHARS = 80


def show(value: Any) -> str:
    """The value as an error message shows it: YAML's words for null and booleans, quotes around text, at most 80 characters."""
    if value is None:
        return 'null'
    if isinstance(value, bool):
        return 'true' if value else 'false'
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + '...'


def _kind(tp: Any) -> str:
    """Which of the few kinds we know: a scalar's name, 'list', 'dict', 'literal', 'union' or 'any'."""
    origin = typing.get_origin(tp)
    if origin in (Union, types.UnionType):
        return 'union'
    if origin is Literal:
        return 'literal'
    base = origin or tp
    if base in _WORDS:
        return 'scalar'
    if base in _LIST_ORIGINS:
        return 'list'
    if base in _DICT_ORIGINS:
        return 'dict'
    return 'any'


def mismatch(value: Any, tp: Any) -> str | None:
    """None if ``value`` fits the annotation ``tp``, else what was expected and what was seen.

    An integral float counts as an integer (YAML reads ``1e6`` as a float) and an integer as a number; a boolean counts as neither.
    """
    if _fits(value, tp):
        return None
    hint = ''
    if isinstance(value, str) and _accepts_number(tp) and _is_number(value):
        hint = ' (remove the quotes)'
    return f'expected {describe_type(tp)}, got {show(value)}{hint}'


def _fits(value: Any, tp: Any) -> bool:
    kind = _kind(tp)
    if kind == 'any' or value is UNRESOLVED:
        return True
    if kind == 'union':
        return any(_fits(value, member) for member in typing.get_args(tp))
    if kind == 'literal':
        return any(value == member and type(value) is type(member) for member in typing.get_args(tp))
    args = typing.get_args(tp)
    if kind == 'list':
        element = args[0] if args else Any
        return isinstance(value, (list, tuple)) and all(_fits(v, element) for v in value)
    if kind == 'dict':
        element = args[1] if len(args) == 2 else Any
        return isinstance(value, Mapping) and all(_fits(v, element) for v in value.values())
    return _scalar_fits(value, tp)


def _scalar_fits(value: Any, tp: Any) -> bool:
    if tp is type(None):
        return value is None
    if isinstance(value, bool):
        return tp is bool
    if tp is int:
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if tp is float:
        return isinstance(value, (int, float))
    return isinstance(value, tp)


def _accepts_number(tp: Any) -> bool:
    members = typing.get_args(tp) if _kind(tp) == 'union' else (tp,)
    return int in members or float in members


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def describe_type(tp: Any) -> str:
    """The annotation in words: ``int | str | None`` is 'an integer, a string or null'."""
    kind = _kind(tp)
    if kind == 'scalar':
        return _WORDS[tp]
    if kind == 'literal':
        values = [show(v) for v in typing.get_args(tp)]
        return values[0] if len(values) == 1 else 'one of ' + ', '.join(values)
    if kind == 'union':
        words = list(dict.fromkeys(describe_type(m) for m in typing.get_args(tp)))
        if 'anything' in words:
            return 'anything'
        return words[0] if len(words) == 1 else ', '.join(words[:-1]) + ' or ' + words[-1]
    args = typing.get_args(tp)
    if kind == 'list':
        plural = _PLURALS.get(typing.get_origin(args[0]) or args[0]) if args else None
        return f'a list of {plural}' if plural else 'a list'
    return 'a mapping' if kind == 'dict' else 'anything'


# An editor validates the file before interpolation, where any value may still be ``${...}``.
_INTERPOLATION = {'type': 'string', 'pattern': r'\$\{'}
_JSON_NAMES = {int: 'integer', float: 'number', str: 'string', bool: 'boolean', type(None): 'null'}


def type_schema(tp: Any) -> dict[str, Any]:
    """JSON Schema of the annotation; every place also accepts an interpolation string."""
    options = _schema_options(tp)
    if not options:
        return {}
    if any(o == {'type': 'string'} for o in options):
        options = [o for o in options if o != _INTERPOLATION]
    else:
        options.append(_INTERPOLATION)
    return options[0] if len(options) == 1 else {'anyOf': options}


def _schema_options(tp: Any) -> list[dict[str, Any]]:
    kind = _kind(tp)
    if kind == 'any':
        return []
    if kind == 'scalar':
        return [{'type': _JSON_NAMES[tp]}]
    args = typing.get_args(tp)
    if kind == 'literal':
        return [{'enum': list(args)}]
    if kind == 'union':
        nested = [_schema_options(member) for member in args]
        return [] if any(not n for n in nested) else [o for n in nested for o in n]
    if kind == 'list':
        return [{'type': 'array', **({'items': type_schema(args[0])} if args else {})}]
    return [{'type': 'object', **({'additionalProperties': type_schema(args[1])} if len(args) == 2 else {})}]
