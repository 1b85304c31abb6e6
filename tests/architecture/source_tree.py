"""The package as an import graph: modules, layers and what each imports, read from the syntax trees."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Iterator

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / 'llmfoundry'

# Layer numbers of the design; L2 components also have an order among themselves.
L0 = {'errors', 'registry', 'layers_registry', 'typed_registry', 'dist', 'lazy', 'experimental', 'phases', 'gloo_average', 'whole_files', '_version'}
L2_ORDER = [
    {'interfaces', 'tokenizers', 'optim', 'metrics', 'loggers', 'algorithms', 'tp'},
    {'models'},
    {'data'},
    {'eval'},
    {'checkpoint'},
    {'callbacks'},
]
RE_EXPORTS = 'utils'


@dataclass(frozen=True)
class Import:
    """One import of an ``llmfoundry`` module: where, what, and whether it stands inside a function."""

    importer: str
    target: str
    line: int
    in_function: bool
    type_checking: bool


def source_files() -> list[Path]:
    """Every Python file of the package and of the scripts."""
    return sorted(PACKAGE.rglob('*.py')) + sorted(p for p in (ROOT / 'scripts').rglob('*.py') if 'yamls' not in p.parts)


def package_files() -> list[Path]:
    return [p for p in source_files() if PACKAGE in p.parents]


def module_name(path: Path) -> str:
    """``llmfoundry/data/concat.py`` -> ``llmfoundry.data.concat``; packages drop ``__init__``."""
    parts = list(path.relative_to(ROOT).with_suffix('').parts)
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding='utf-8'), filename=str(path))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def known_modules() -> set[str]:
    return {module_name(p) for p in package_files()}


def imports_of(path: Path) -> list[Import]:
    """Imports of our own modules in one file, resolved to modules that exist (a name imported from a package counts as its submodule if there is one)."""
    name = module_name(path)
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    modules = known_modules()
    found: list[Import] = []

    def visit(node: ast.AST, in_function: bool, type_checking: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            checking = type_checking or (isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.dump(node.test))
            for target in _targets(child, package, modules):
                found.append(Import(name, target, child.lineno, inside, checking))
            visit(child, inside, checking)

    visit(parse(path), False, False)
    return found


def _targets(node: ast.AST, package: str, modules: set[str]) -> list[str]:
    if isinstance(node, ast.Import):
        return [a.name for a in node.names if a.name.split('.')[0] == 'llmfoundry']
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ''
    if node.level:
        anchor = package.split('.')[: len(package.split('.')) - node.level + 1]
        base = '.'.join([*anchor, *([base] if base else [])])
    if base.split('.')[0] != 'llmfoundry':
        return []
    return sorted({f'{base}.{a.name}' if f'{base}.{a.name}' in modules else base for a in node.names})


def layer(module: str) -> tuple[int, int]:
    """(layer, order within the layer) of a module; imports must not go to a larger pair, and L3-L5 not sideways upwards."""
    parts = module.split('.')
    if len(parts) == 1 or parts[1] in L0:
        return (0, 0)
    room = parts[1]
    if room == 'config':
        return (1, 0)
    for order, rooms in enumerate(L2_ORDER):
        if room in rooms:
            return (2, order)
    return {'builders': (3, 0), 'command_utils': (4, 1), 'dialects': (4, 0), 'cli': (5, 0), RE_EXPORTS: (9, 0)}[room]
