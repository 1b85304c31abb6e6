"""Reads the parameters of a component without importing it.

``read_signature('composer.optim:ConstantWithWarmupScheduler')`` finds the file of the module by the folder of its top-level package, parses it, follows re-exports, base
classes and ``super().__init__(**kwargs)``, and returns names, types and defaults. So a misspelt key of any component is found
without loading torch. What cannot be read statically (C code, dynamic bases) comes back as None and is not checked.
Objects that a plug-in registered are inspected directly.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

__all__ = ['Parameter', 'Signature', 'read_fields', 'read_signature', 'signature_of_object']

_MAX_DEPTH = 12
_SCALARS: dict[str, Any] = {'int': int, 'float': float, 'str': str, 'bool': bool, 'None': type(None), 'dict': dict, 'Dict': dict, 'Mapping': dict, 'list': list,
                            'List': list, 'tuple': list, 'Tuple': list, 'Sequence': list, 'Iterable': list, 'Any': Any}


@dataclass(frozen=True)
class Parameter:
    """One argument of a component."""

    name: str
    type: Any
    required: bool
    default: Any = None


@dataclass(frozen=True)
class Signature:
    """Arguments that a component takes; ``closed`` is False when it also takes names that cannot be known statically."""

    parameters: dict[str, Parameter]
    closed: bool
    doc: str | None = None

    def merged_with(self, base: Signature) -> Signature:
        """Adds the arguments of ``base`` that are not there yet."""
        return Signature({**base.parameters, **self.parameters}, self.closed and base.closed, self.doc or base.doc)


def read_signature(target: Any) -> Signature | None:
    """The signature behind ``'package.module:attribute'``, or of the object itself; None when it cannot be read."""
    if not isinstance(target, str):
        # Source tells more than the object does (kwargs passed on or dropped), also after an entry was resolved.
        home, name = getattr(target, '__module__', None), getattr(target, '__qualname__', '.')
        static = _signature(home, name, 0) if isinstance(home, str) and '.' not in name else None
        return static or signature_of_object(target)
    module, _, attribute = target.partition(':')
    if module.startswith('.'):
        module = 'llmfoundry' + module
    return _signature(module, attribute, 0) if attribute else None


def signature_of_object(obj: Any) -> Signature | None:
    """The signature of a class or function that is already imported."""
    try:
        parameters = list(inspect.signature(obj).parameters.values())
    except (TypeError, ValueError):
        return None
    function = obj.__init__ if isinstance(obj, type) else obj
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # noqa: BLE001 - a plug-in's annotations may name anything; then only its parameter names are used
        hints = {}
    named = {}
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        has_default = p.default is not p.empty
        tp = hints.get(p.name, Any)
        named[p.name] = Parameter(p.name, Union[tp, None] if has_default and p.default is None else tp, not has_default, p.default if has_default else None)
    return Signature(named, not any(p.kind is p.VAR_KEYWORD for p in parameters), inspect.getdoc(obj))


@functools.cache
def _package_root(package: str) -> Path | None:
    """Folder of a top-level package. ``find_spec`` of a top-level name does not execute it."""
    loaded = sys.modules.get(package)
    if loaded is not None and getattr(loaded, '__file__', None):
        return Path(loaded.__file__).parent
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin and spec.submodule_search_locations else None


@functools.cache
def _module_file(module: str) -> Path | None:
    first, *rest = module.split('.')
    root = _package_root(first)
    if root is None:
        return None
    for candidate in (root.joinpath(*rest, '__init__.py'), root.joinpath(*rest).with_suffix('.py') if rest else root / '__init__.py'):
        if candidate.is_file():
            return candidate
    return None


@functools.cache
def _parse(module: str) -> ast.Module | None:
    file = _module_file(module)
    if file is None:
        return None
    try:
        return ast.parse(file.read_text(encoding='utf-8'))
    except (SyntaxError, OSError, UnicodeDecodeError):
        return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, also those inside ``try`` and ``if``, where optional imports live."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from _statements(node.body)
            yield from _statements(node.orelse)


def _resolve(module: str, name: str, depth: int) -> tuple[str, ast.AST] | None:
    """The class or function definition that ``name`` means in ``module``, and the module that holds it."""
    tree = _parse(module)
    if tree is None or depth > _MAX_DEPTH:
        return None
    is_package = _module_file(module).name == '__init__.py'
    found = None
    for node in _statements(tree.body):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            found = (module, node)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    source = _absolute(module, is_package, node)
                    found = _resolve(source, alias.name, depth + 1) or found
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            found = _resolve(module, node.value.id, depth + 1) or found
    return found


def _absolute(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ''
    parts = module.split('.')
    parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return '.'.join([*parts, node.module] if node.module else parts)


def _resolve_base(module: str, base: ast.expr, depth: int) -> tuple[str, ast.AST] | None:
    """Definition of a base class written as a name, ``pkg.mod.Name`` or ``Generic[...]``."""
    if isinstance(base, ast.Subscript):
        base = base.value
    if isinstance(base, ast.Name):
        return _resolve(module, base.id, depth + 1)
    if isinstance(base, ast.Attribute):
        return _resolve(ast.unparse(base.value), base.attr, depth + 1)
    return None


@functools.cache
def _signature(module: str, name: str, depth: int) -> Signature | None:
    found = _resolve(module, name, depth)
    if found is None or depth > _MAX_DEPTH:
        return None
    home, node = found
    if isinstance(node, ast.ClassDef):
        return _class_signature(home, node, depth)
    return _function_signature(node, skip_first=False)


def _class_signature(module: str, node: ast.ClassDef, depth: int) -> Signature | None:
    doc = ast.get_docstring(node)
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'), None)
    bases = [b for b in (_resolve_base(module, base, depth) for base in node.bases) if b is not None and isinstance(b[1], ast.ClassDef)]
    if init is not None:
        own = _function_signature(init, skip_first=True)
        own = Signature(own.parameters, own.closed, doc)
        if own.closed or not bases or not _passes_kwargs_to_super(init):
            return own
        base = _class_signature(bases[0][0], bases[0][1], depth + 1)
        return own if base is None else Signature(own.parameters, True, doc).merged_with(base)
    if any('dataclass' in ast.unparse(d) for d in node.decorator_list):
        return _dataclass_signature(node)
    for home, base in bases:
        signature = _class_signature(home, base, depth + 1)
        if signature is not None:
            return Signature(signature.parameters, signature.closed, doc)
    # Without a constructor of its own, a class whose bases are all known to be elsewhere takes no argument we could name.
    return None


def _passes_kwargs_to_super(init: ast.FunctionDef) -> bool:
    """Whether ``super().__init__(..., **kwargs)`` receives all of the function's extra keyword arguments."""
    kwarg = init.args.kwarg.arg if init.args.kwarg else None
    for call in ast.walk(init):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == 'super().__init__':
            return any(k.arg is None and isinstance(k.value, ast.Name) and k.value.id == kwarg for k in call.keywords)
    return False


def _function_signature(node: Any, skip_first: bool) -> Signature:
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    pairs = list(zip(positional, defaults, strict=True))[1 if skip_first else 0 :] + list(zip(args.kwonlyargs, args.kw_defaults, strict=True))
    parameters = {a.arg: _parameter(a.arg, a.annotation, default) for a, default in pairs}
    return Signature(parameters, args.kwarg is None or _discards(node, args.kwarg.arg), ast.get_docstring(node))


def _discards(node: Any, kwarg: str) -> bool:
    """Whether the body says ``del kwargs``: names beyond the listed ones would be ignored, so they are mistakes."""
    return any(isinstance(s, ast.Delete) and kwarg in {n.id for n in ast.walk(s) if isinstance(n, ast.Name)} for s in node.body)


def read_fields(target: str) -> dict[str, Parameter]:
    """Annotated public fields of a dataclass, whatever its constructor takes; empty when it cannot be read."""
    module, _, attribute = target.partition(':')
    found = _resolve(module, attribute, 0)
    return _dataclass_signature(found[1]).parameters if found is not None and isinstance(found[1], ast.ClassDef) else {}


def _dataclass_signature(node: ast.ClassDef) -> Signature:
    parameters = {}
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and not item.target.id.startswith('_'):
            parameters[item.target.id] = _parameter(item.target.id, item.annotation, item.value)
    return Signature(parameters, True, ast.get_docstring(node))


def _parameter(name: str, annotation: ast.expr | None, default: ast.expr | None) -> Parameter:
    value = None
    tp = type_from_ast(annotation)
    if default is not None:
        try:
            value = ast.literal_eval(default)
        except ValueError:
            tp = tp if not isinstance(default, ast.Constant) else Any
        if value is None:
            tp = Union[tp, None]
    return Parameter(name, tp, default is None, value)


def type_from_ast(node: ast.expr | None) -> Any:
    """The part of an annotation that YAML values can be compared with; anything else is Any."""
    if node is None:
        return Any
    if isinstance(node, ast.Constant):
        if node.value is None:
            return type(None)
        return type_from_ast(ast.parse(node.value, mode='eval').body) if isinstance(node.value, str) else Any
    if isinstance(node, (ast.Name, ast.Attribute)):
        return _SCALARS.get(node.id if isinstance(node, ast.Name) else node.attr, Any)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return Union[type_from_ast(node.left), type_from_ast(node.right)]
    if isinstance(node, ast.Subscript):
        return _subscript_type(node)
    return Any


def _subscript_type(node: ast.Subscript) -> Any:
    head = ast.unparse(node.value).rpartition('.')[2]
    items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if head == 'Literal':
        values = [i.value for i in items if isinstance(i, ast.Constant)]
        return Literal[tuple(values)] if len(values) == len(items) and values else Any
    members = [type_from_ast(i) for i in items]
    if head == 'Optional':
        return Union[members[0], None]
    if head == 'Union':
        return Union[tuple(members)]
    base = _SCALARS.get(head, Any)
    if base is list:
        return list if head in ('tuple', 'Tuple') else list[members[0]]
    return dict[str, members[1]] if base is dict and len(members) == 2 else base
