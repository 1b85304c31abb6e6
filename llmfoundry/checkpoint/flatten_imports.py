"""Rewrites imports so that modules of a package work as files of one flat folder, which is what the Hugging Face Hub loads.

Only the import statements change, found in the syntax tree and replaced in the text, so comments and layout of the exported code stay as they are. The
Hub's loader finds further files by a regular expression over ``from .name import``; ``import_list_block`` writes lines for it that never run.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
from pathlib import Path
from typing import Iterable, Sequence

__all__ = ['edit_files_for_hf_compatibility', 'flatten_source', 'import_list_block', 'imported_modules']

# Training-only code that model code of plug-ins tends to import for type hints and metrics; no exported folder can have it.
_STRIPPED_PREFIXES = ('composer', 'omegaconf', 'llmfoundry.metrics', 'llmfoundry.eval', 'llmfoundry.utils.builders')
_BLOCK_HEAD = '# For the Hub loader, which copies the files that it reads about here; never runs.'


def _matches(module: str, prefixes: Iterable[str]) -> bool:
    return any(module == p or module.startswith(p + '.') for p in prefixes)


def _absolute(node: ast.ImportFrom, module_name: str | None) -> str | None:
    """Absolute name of the module that a ``from`` statement names; None where it cannot be known."""
    if node.level == 0:
        return node.module or ''
    if module_name is None:
        return None
    package = module_name.split('.')[: -node.level]
    return '.'.join([*package, *([node.module] if node.module else [])])


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _is_package(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    return spec is not None and spec.submodule_search_locations is not None


def _resolve(node: ast.ImportFrom, base: str) -> list[tuple[ast.alias, str, bool]]:
    """(alias, module that holds it, whether the alias is that module itself) for each imported name; looks through re-exporting packages."""
    found = []
    for alias in node.names:
        child = f'{base}.{alias.name}' if base else alias.name
        if not _is_package(base):
            found.append((alias, base, False))
        elif _is_module(child):
            found.append((alias, child, True))
        else:
            home = getattr(getattr(importlib.import_module(base), alias.name, None), '__module__', None)
            if home is None:
                raise ImportError(f'`from {base} import {alias.name}` cannot be flattened: {alias.name!r} has no __module__; import it from the file that defines it')
            found.append((alias, home, False))
    return found


def _as(alias: ast.alias) -> str:
    return alias.name if alias.asname is None else f'{alias.name} as {alias.asname}'


def _flat_statements(node: ast.ImportFrom, base: str) -> list[str]:
    by_module: dict[str, list[str]] = {}
    lines = []
    for alias, module, is_module in _resolve(node, base):
        if is_module:
            stem = module.rpartition('.')[2]
            lines.append(f'from . import {stem}' + (f' as {alias.asname}' if alias.asname else ''))
        else:
            by_module.setdefault(module.rpartition('.')[2], []).append(_as(alias))
    for stem, names in by_module.items():
        one_line = f'from .{stem} import {", ".join(names)}'
        lines.append(one_line)
    return lines


def _replacement(node: ast.stmt, module_name: str | None, flatten: Sequence[str], strip: Sequence[str]) -> list[str] | None:
    """New statements for an import, an empty list to drop it, None to leave it."""
    if isinstance(node, ast.Import):
        kept = [a for a in node.names if not _matches(a.name, strip)]
        ours = [a.name for a in kept if _matches(a.name, flatten)]
        if ours:
            raise ImportError(f'`import {ours[0]}` cannot be flattened; write `from {ours[0].rpartition(".")[0] or ours[0]} import ...`')
        return None if len(kept) == len(node.names) else ([f'import {", ".join(map(_as, kept))}'] if kept else [])
    assert isinstance(node, ast.ImportFrom)
    base = _absolute(node, module_name)
    if base is None:  # already relative in a file of unknown origin: only the depth can be flattened
        stem = (node.module or '').rpartition('.')[2]
        return [f'from .{stem} import {", ".join(map(_as, node.names))}']
    if _matches(base, strip):
        return []
    return _flat_statements(node, base) if _matches(base, flatten) else None


def flatten_source(source: str, module_name: str | None = None, flatten: Sequence[str] = ('llmfoundry',), strip: Sequence[str] = _STRIPPED_PREFIXES) -> str:
    """The source with imports of ``flatten`` packages made relative to one folder and imports of ``strip`` packages removed.

    Args:
        module_name: dotted name of the module, which relative imports of more than one level need.
        flatten: package prefixes whose modules lie in the same folder in the end.
        strip: module prefixes to remove.

    Raises:
        ImportError: an import that has no flat form.
    """
    tree = ast.parse(source)
    lines = source.splitlines(keepends=True)
    edits = []
    for parent in ast.walk(tree):
        for body_name in ('body', 'orelse', 'finalbody', 'handlers'):
            body = getattr(parent, body_name, None)
            if not isinstance(body, list):
                continue
            imports = [n for n in body if isinstance(n, (ast.Import, ast.ImportFrom))]
            new = {n: _replacement(n, module_name, flatten, strip) for n in imports}
            emptied = bool(body) and all(new.get(n) == [] for n in body) and not isinstance(parent, ast.Module)
            for i, (node, statements) in enumerate(new.items()):
                if statements is not None:
                    edits.append((node, ['pass'] if emptied and i == 0 else statements))
    for node, statements in sorted(edits, key=lambda e: e[0].lineno, reverse=True):
        indent = ' ' * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [f'{indent}{s}\n' for s in statements]
    return ''.join(lines)


def imported_modules(source: str, module_name: str, prefixes: Sequence[str] = ('llmfoundry',)) -> set[str]:
    """Absolute names of the modules below ``prefixes`` that the source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if _matches(a.name, prefixes)}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module_name)
            if base is not None and _matches(base, prefixes):
                found |= {module for _, module, _ in _resolve(node, base)}
    return found


def import_list_block(stems: Iterable[str]) -> str:
    """Lines that name every file of the folder to the Hub's loader.

    The loader copies only what the model's own file names directly, while it hashes all files that those name in turn.
    """
    lines = '\n'.join(f'    from .{stem} import __doc__ as _' for stem in sorted(stems))
    return f'\nif False:  {_BLOCK_HEAD}\n{lines}\n' if lines else ''


def edit_files_for_hf_compatibility(folder: str | os.PathLike, flatten_imports_prefix: Sequence[str] = ('llmfoundry',)) -> None:
    """Flattens the imports of every Python file in ``folder`` in place, for plug-ins that write model code into an export.

    Args:
        folder: the exported folder.
        flatten_imports_prefix: packages whose modules are expected as files beside the importing one.
    """
    for path in sorted(Path(folder).glob('*.py')):
        source = path.read_text(encoding='utf-8')
        edited = flatten_source(source, None, tuple(flatten_imports_prefix))
        if edited != source:
            path.write_text(edited, encoding='utf-8')
