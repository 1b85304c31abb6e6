"""Checks one mapping against the keys and types it may have: a typed block, or the signature of a component.

These are the two primitives from which ``components`` builds the check of a whole config.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from llmfoundry.config.base import Block, field_types, mandatory_keys
from llmfoundry.config.renames import stale_key_hint
from llmfoundry.config.report import KeyPath, Report, nearest
from llmfoundry.config.signatures import Parameter, Signature, read_signature
from llmfoundry.config.value_types import UNRESOLVED, describe_type, mismatch
from llmfoundry.typed_registry import TypedRegistry

__all__ = ['check_block', 'check_kwargs', 'check_name', 'expect_mapping', 'target_signature']


def expect_mapping(report: Report, path: KeyPath, value: Any) -> bool:
    """True if ``value`` is a mapping; else notes it (unless its interpolation already failed)."""
    if isinstance(value, Mapping):
        return True
    if value is not UNRESOLVED:
        problem = mismatch(value, dict)
        if problem:
            report.add(path, problem)
    return False


def check_block(
    report: Report,
    path: KeyPath,
    value: Mapping[str, Any],
    block: type[Block],
    nested: Mapping[str, type[Block]] | None = None,
    open_keys: bool = False,
    skip: Collection[str] = (),
    extra: Collection[str] = (),
) -> None:
    """Checks names, types and presence of the keys of a typed block, and of the blocks nested in it.

    Args:
        nested: key -> typed block of its value.
        open_keys: whether keys outside the block pass.
        skip: keys that another check handles.
        extra: keys outside the block that pass.
    """
    types = field_types(block)
    for key, item in value.items():
        here = (*path, key)
        if key in skip or key in extra:
            continue
        if key not in types:
            if not open_keys:
                report.add_unknown(here, types, stale_key_hint(here))
        elif nested and key in nested and item is not None:
            if expect_mapping(report, here, item):
                check_block(report, here, item, nested[key])
        else:
            check_type(report, here, item, types[key])
    unknown = [k for k in value if k not in types]
    for key in mandatory_keys(block):
        if key not in value and not _is_meant_by(key, unknown, types):
            report.add((*path, key), f'missing: this key is mandatory ({describe_type(types[key])})')


def check_type(report: Report, path: KeyPath, value: Any, tp: Any) -> None:
    """Notes a value that does not fit the annotation."""
    problem = mismatch(value, tp)
    if problem:
        report.add(path, problem)


def _is_meant_by(missing: str, unknown: list[str], valid: Collection[str]) -> bool:
    """Whether a misspelt key already points to the missing one, so that one mistake makes one line."""
    return any(nearest(key, valid) == missing for key in unknown)


def target_signature(registry: TypedRegistry, name: str) -> Signature | None:
    """Signature behind a registry entry, read without importing it."""
    return read_signature(registry.target(name)) if name in registry else None


def check_name(report: Report, path: KeyPath, name: Any, registry: TypedRegistry, fold_case: bool = False, extra: Collection[str] = ()) -> bool:
    """Notes a name that the registry does not know. Built-in entries whose package is absent here are known: the run may happen elsewhere."""
    if name is UNRESOLVED:
        return False
    if not isinstance(name, str):
        report.add(path, mismatch(name, str) or 'expected a string')
        return False
    known = {*registry.all_names(), *extra}
    if (name.lower() if fold_case else name) in known:
        return True
    near = nearest(name, known)
    hint = stale_key_hint(path, name) or (f'did you mean {near!r}?' if near else f'names: {", ".join(sorted(known)) or "none"}')
    report.add(path, f'{name!r} is not in the registry {registry.path} ({hint})')
    return False


def check_kwargs(
    report: Report,
    path: KeyPath,
    kwargs: Mapping[str, Any],
    signature: Signature | None,
    provided: Collection[str] = (),
    extra: Collection[str] = (),
) -> None:
    """Checks the keys of a component's block against its signature.

    Args:
        signature: what the component takes; None when it could not be read, then nothing is checked.
        provided: arguments that the trainer passes, which a YAML may not set.
        extra: keys that a builder reads.
    """
    if signature is None:
        return
    parameters = {n: p for n, p in signature.parameters.items() if n not in provided}
    for key, value in kwargs.items():
        here = (*path, key)
        if key in extra:
            continue
        if key in provided:
            report.add(here, 'is set by the trainer; delete the key')
        elif key in parameters:
            check_type(report, here, value, parameters[key].type)
        elif signature.closed:
            report.add_unknown(here, {*parameters, *extra}, stale_key_hint(here))
    _check_required(report, path, kwargs, parameters, extra)


def _check_required(report: Report, path: KeyPath, kwargs: Mapping[str, Any], parameters: Mapping[str, Parameter], extra: Collection[str]) -> None:
    unknown = [k for k in kwargs if k not in parameters and k not in extra]
    for name, parameter in parameters.items():
        if parameter.required and name not in kwargs and not _is_meant_by(name, unknown, parameters):
            words = describe_type(parameter.type)
            report.add((*path, name), 'missing: this key is mandatory' + (f' ({words})' if words != 'anything' else ''))
