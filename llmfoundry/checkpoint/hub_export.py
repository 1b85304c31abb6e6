"""Writes the code of MPT into an exported folder, so that ``transformers`` alone can load it.

The files are copied from this package with their imports flattened (``flatten_imports``) and the registry's target strings shortened to match, because a folder
on the Hub has no sub-folders of code. Which files go along is computed from the model's imports and from the registry, never listed by hand.
The alternative, writing the config for transformers' own ``MptForCausalLM``, covers alibi models without bias only.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any, Mapping

from llmfoundry import layers_registry
from llmfoundry.checkpoint.flatten_imports import edit_files_for_hf_compatibility, flatten_source, import_list_block, imported_modules
from llmfoundry.typed_registry import TypedRegistry

__all__ = ['AUTO_MAP', 'MPT_CLASSES', 'edit_files_for_hf_compatibility', 'portable_config', 'portable_modules', 'write_model_code']

AUTO_MAP = {'AutoConfig': 'configuration_mpt.MPTConfig', 'AutoModelForCausalLM': 'modeling_mpt.MPTForCausalLM'}
MPT_CLASSES = {'MPTForCausalLM'}

_ROOTS = ('llmfoundry.models.mpt.modeling_mpt', 'llmfoundry.models.mpt.configuration_mpt', 'llmfoundry.layers_registry')
# The files that transformers imports by name; each must name all others.
_ENTRY_FILES = ('modeling_mpt.py', 'configuration_mpt.py')
# Where built-in layers live: this package, or libraries that the layer's own file imports.
_INSTALLED_ANYWAY = ('.', 'llmfoundry.', 'torch.', 'transformer_engine.', 'megablocks.')
_NESTED_TARGET = re.compile(r"""(?<=['"])\.models\.(?:\w+\.)*(\w+)(?=:)""")


def _source_path(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f'{module} has no source file')
    return Path(spec.origin)


def _registry_modules() -> set[str]:
    """Modules that the layer registries of this package point to."""
    source = _source_path('llmfoundry.layers_registry').read_text(encoding='utf-8')
    return {f'llmfoundry{m.group(0)}' for m in _NESTED_TARGET.finditer(source)}


@cache
def portable_modules() -> dict[str, Path]:
    """File stem -> source file of every module that an MPT model can need.

    Raises:
        ImportError: two of them have the same file name, or one is missing.
    """
    found: dict[str, Path] = {}
    seen: set[str] = set()
    pending = {*_ROOTS, *_registry_modules()}
    while pending:
        module = pending.pop()
        if module in seen:
            continue
        seen.add(module)
        path = _source_path(module)
        stem = module.rpartition('.')[2]
        if found.setdefault(stem, path) != path:
            raise ImportError(f'{found[stem]} and {path} would overwrite each other in an exported folder; rename one')
        pending |= imported_modules(path.read_text(encoding='utf-8'), module)
    return found


def _module_name(path: Path) -> str:
    root = _source_path('llmfoundry').parent
    return '.'.join(['llmfoundry', *path.relative_to(root).with_suffix('').parts])


def write_model_code(folder: Path) -> list[Path]:
    """Writes every file of the MPT code into ``folder``; returns their paths."""
    modules = portable_modules()
    written = []
    for stem, path in modules.items():
        source = flatten_source(path.read_text(encoding='utf-8'), _module_name(path))
        if stem == 'layers_registry':
            source = _NESTED_TARGET.sub(r'.\1', source)
        if f'{stem}.py' in _ENTRY_FILES:
            source += import_list_block(set(modules) - {stem})
        target = folder / f'{stem}.py'
        target.write_text(source, encoding='utf-8')
        written.append(target)
    return written


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of an export: any device, any number of processes, code beside it.

    ``attn_impl`` becomes torch, ``init_device`` cpu, ``moe_world_size`` 1; process groups and device meshes are dropped. An ``attn_pdrop`` of 0.0
    becomes 0: the strict ``MptConfig`` of transformers 5, through which ``AutoTokenizer`` goes where remote code is not trusted, takes only an int.
    """
    exported = copy.deepcopy(dict(config))
    exported.update(init_device='cpu', auto_map=dict(AUTO_MAP), architectures=['MPTForCausalLM'], model_type='mpt')
    attn_config = exported.setdefault('attn_config', {})
    attn_config['attn_impl'] = 'torch'
    if attn_config.get('attn_pdrop') == 0:
        attn_config['attn_pdrop'] = 0
    ffn_config = exported.get('ffn_config') or {}
    if 'moe_world_size' in ffn_config:
        ffn_config['moe_world_size'] = 1
    for key in ('device_mesh', 'lbl_process_group'):
        ffn_config.pop(key, None)
    return exported


def unportable_layers(config: Mapping[str, Any]) -> list[str]:
    """Layers that the config names and that are registered by a plug-in, so that the folder will not load without it."""
    named = {
        'norms': config.get('norm_type'),
        'ffns': (config.get('ffn_config') or {}).get('ffn_type'),
        'attention_classes': (config.get('attn_config') or {}).get('attn_type'),
        'fcs': fc.get('name') if isinstance(fc := config.get('fc_type'), dict) else fc,
    }
    found = []
    for registry_name, name in named.items():
        registry: TypedRegistry = getattr(layers_registry, registry_name)
        key = str(name).lower()
        if name is not None and key in registry:
            target = registry.target(key)
            module = target.partition(':')[0] if isinstance(target, str) else target.__module__
            if not module.startswith(_INSTALLED_ANYWAY):
                found.append(f'{registry_name}: {name} ({module})')
    return found
