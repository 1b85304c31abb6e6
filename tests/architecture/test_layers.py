"""Imports go downwards only, form no cycle, and are not hidden in functions."""

from __future__ import annotations

import ast

from tests.architecture import source_tree as tree

HUB_PORTABLE_PREFIXES = (
    'llmfoundry.typed_registry', 'llmfoundry.layers_registry', 'llmfoundry.models.layers', 'llmfoundry.models.act_ckpt', 'llmfoundry.models.meta_device',
    'llmfoundry.models.param_init', 'llmfoundry.models.mpt',
)
BANNED_FILE_NAMES = {'datasets.py', 'tokenizers.py', 'streaming.py', 'random.py', 'torch.py', 'transformers.py', 'composer.py', 'types.py', 'logging.py'}


def _edges() -> list[tree.Import]:
    return [i for p in tree.package_files() for i in tree.imports_of(p) if not i.type_checking]


def test_imports_go_downwards() -> None:
    wrong = []
    for edge in _edges():
        source, target = tree.layer(edge.importer), tree.layer(edge.target)
        same_room = edge.importer.split('.')[1:2] == edge.target.split('.')[1:2]
        sees_config = source[0] == 2 and target[0] == 1
        if sees_config or (target > source and not same_room):
            wrong.append(f'{edge.importer}:{edge.line} imports {edge.target}')
    assert not wrong, '\n'.join(wrong)


def test_builders_reach_components_through_registries_only() -> None:
    wrong = [f'{e.importer}:{e.line} imports {e.target}' for e in _edges() if tree.layer(e.importer)[0] == 3 and tree.layer(e.target)[0] == 2]
    assert not wrong, '\n'.join(wrong)


def test_no_import_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for edge in _edges():
        if edge.importer != edge.target:
            graph.setdefault(edge.importer, set()).add(edge.target)
    state: dict[str, int] = {}
    cycles: list[str] = []

    def visit(module: str, path: list[str]) -> None:
        state[module] = 1
        for target in sorted(graph.get(module, ())):
            if state.get(target) == 1:
                cycles.append(' -> '.join([*path[path.index(target):], target] if target in path else [module, target]))
            elif target not in state:
                visit(target, [*path, target])
        state[module] = 2

    for module in sorted(graph):
        if module not in state:
            visit(module, [module])
    assert not cycles, '\n'.join(cycles)


def test_no_function_level_imports_of_our_own_modules() -> None:
    wrong = [f'{e.importer}:{e.line} imports {e.target}' for e in _edges() if e.in_function]
    assert not wrong, '\n'.join(wrong)


def test_hub_portable_set_imports_only_itself_torch_and_transformers() -> None:
    wrong = []
    allowed_roots = {'torch', 'transformers', 'flash_attn', 'transformer_engine', 'megablocks', 'packaging'}
    for path in tree.package_files():
        name = tree.module_name(path)
        if not name.startswith(HUB_PORTABLE_PREFIXES) or name.endswith('composer_mpt') or path.name == '__init__.py':
            continue
        for edge in tree.imports_of(path):
            if not edge.target.startswith(HUB_PORTABLE_PREFIXES) and edge.target != 'llmfoundry':
                wrong.append(f'{name}:{edge.line} imports {edge.target}')
        for node in ast.walk(tree.parse(path)):
            roots = [a.name.split('.')[0] for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                roots = [str(node.module).split('.')[0]]
            for root in roots:
                if root not in allowed_roots | {'llmfoundry', '__future__'} and root not in _stdlib():
                    wrong.append(f'{name}:{node.lineno} imports {root}')
    assert not wrong, '\n'.join(wrong)


def _stdlib() -> frozenset[str]:
    import sys

    return sys.stdlib_module_names


def test_no_module_shadows_a_package() -> None:
    wrong = [str(p) for p in tree.package_files() if p.name in BANNED_FILE_NAMES]
    assert not wrong, wrong


def test_re_exports_hold_no_logic() -> None:
    """``utils`` is for import paths only: imports, names and one docstring."""
    wrong = []
    for path in tree.package_files():
        if tree.module_name(path).split('.')[1:2] != ['utils']:
            continue
        for node in tree.parse(path).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.With)):
                wrong.append(f'{tree.module_name(path)}:{node.lineno} defines {getattr(node, "name", type(node).__name__)}')
    assert not wrong, '\n'.join(wrong)
