"""YAML file (or dict) plus ``key=value`` overrides -> ``TrainConfig``.

The steps, in order: read with lines, override, resolve interpolations, run plug-ins (``code_paths``, config transforms), check everything, raise one
``ConfigError`` or derive the rest and freeze. Resolution walks leaf by leaf rather than calling OmegaConf once, so that one
broken interpolation does not hide the next problem.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc as oc_resolvers

from llmfoundry import registry
from llmfoundry.config.batch_size import batch_size_summary
from llmfoundry.config.blocks import check_block, check_type
from llmfoundry.config.components import check_components
from llmfoundry.config.derive import BATCH_TRANSFORM, derive, split_spellings
from llmfoundry.config.renames import KNOWN_VARIABLES, split_top_level_variables, variables_notes
from llmfoundry.config.report import KeyPath, Report, nearest
from llmfoundry.config.rules import check_rules
from llmfoundry.config.train import TrainConfig
from llmfoundry.config.value_types import UNRESOLVED
from llmfoundry.config.yaml_source import YamlSource, read_yaml, syntax_error
from llmfoundry.errors import ConfigError, ConfigProblem

__all__ = ['load_dict', 'load_train_config']

_REFERENCE = re.compile(r'\$\{\s*([\w.]+)\s*\}')


def load_train_config(source: str | os.PathLike | Mapping[str, Any], overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads, checks and completes a training config.

    Args:
        source: path of a YAML file, or a mapping.
        overrides: ``key=value`` with dotted keys (list items by index: ``eval_loader.0.label=c4``); values are read as YAML.

    Raises:
        ConfigError: every problem of the config, each with its key, line, the value seen and the remedy.
        FileNotFoundError, RuntimeError: a file of ``code_paths`` that is missing or fails.
    """
    config, report, text = load_dict(source, overrides)
    config, variables = split_top_level_variables(config, set(TrainConfig.model_fields), text)
    notes = variables_notes(variables, text)
    _run_code_paths(config, report)
    config = _run_transforms(config, report)
    check_block(report, (), config, TrainConfig)
    check_components(config, report)
    check_rules(report.pruned(config), report)
    report.raise_if_any()
    config, derived = derive(split_spellings(config))
    return _freeze(config, [*notes, *derived])


def load_dict(source: str | os.PathLike | Mapping[str, Any], overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Report, str]:
    """The plain, resolved config with a report that knows lines and overrides, and the text that interpolations stand in."""
    if isinstance(source, Mapping):
        plain = OmegaConf.to_container(source, resolve=False) if isinstance(source, DictConfig) else copy.deepcopy(dict(source))
        yaml_source = YamlSource('', '')
    else:
        yaml_source = read_yaml(source)
        plain = yaml_source.text
    report = Report(yaml_source.lines, yaml_source.name or None)
    tree = _create_tree(plain, yaml_source.name)
    for override in overrides:
        _apply_override(tree, override, report)
    failures: dict[KeyPath, tuple[str, str]] = {}
    with _without_env_resolver():
        config = _resolve(tree, (), failures)
    _report_failures(tree, failures, report)
    _find_aliases(tree, (), report.aliases)
    text = yaml_source.text or OmegaConf.to_yaml(tree)
    return config, report, '\n'.join([text, *overrides])


def _create_tree(plain: str | Mapping[str, Any], name: str) -> DictConfig:
    try:
        return OmegaConf.create(plain)
    except yaml.YAMLError as e:
        raise syntax_error(e, name) from None
    except (OmegaConfBaseException, ValueError) as e:
        raise ConfigError([ConfigProblem('config', f'cannot be read: {str(e).splitlines()[0]}')], source=name or None) from None


def _apply_override(tree: DictConfig, override: str, report: Report) -> None:
    key, equals, text = override.partition('=')
    key = key.strip().lstrip('-')
    path = tuple(key.replace('[', '.').replace(']', '').split('.'))
    if len(path) == 1 and key in KNOWN_VARIABLES and key not in tree and key in (tree.get('variables') or {}):
        # Documents say data_local=X; files that keep the name under `variables` mean the same one.
        path = ('variables', key)
    report.overridden.add(path)
    if not equals or not all(path):
        report.overridden.add((override,))
        report.add((override,), 'expected an override of the form key=value')
        return
    try:
        value = OmegaConf.from_dotlist([f'value={text}'])
        OmegaConf.update(tree, '.'.join(path), OmegaConf.to_container(value, resolve=False)['value'], merge=True, force_add=True)
    except yaml.YAMLError as e:
        report.add(path, f'{text!r} is not a YAML value: {getattr(e, "problem", None) or str(e).splitlines()[0]}')
    except (OmegaConfBaseException, LookupError, TypeError, ValueError, AttributeError) as e:
        report.add(path, f'cannot be set: {(str(e).splitlines() or [type(e).__name__])[0]}')


@contextlib.contextmanager
def _without_env_resolver() -> Iterator[None]:
    """Takes ``${oc.env:X}`` away while configs resolve: a shared YAML must not be able to read secrets of whoever runs it."""
    OmegaConf.clear_resolver('oc.env')
    try:
        yield
    finally:
        # Renamed in OmegaConf 2.4; the old name warns.
        register = getattr(OmegaConf, 'register_resolver', OmegaConf.register_new_resolver)
        register('oc.env', oc_resolvers.env, use_cache=False, replace=True)


def _resolve(node: Any, path: KeyPath, failures: dict[KeyPath, tuple[str, str]]) -> Any:
    """Plain containers with interpolations resolved; a value that cannot be becomes UNRESOLVED, with raw text and reason in ``failures``."""
    if isinstance(node, DictConfig):
        return {str(key): _resolve_item(node, key, (*path, str(key)), failures) for key in node}
    if isinstance(node, ListConfig):
        return [_resolve_item(node, i, (*path, str(i)), failures) for i in range(len(node))]
    return node


def _resolve_item(node: Any, key: Any, path: KeyPath, failures: dict[KeyPath, tuple[str, str]]) -> Any:
    if OmegaConf.is_missing(node, key):
        failures[path] = ('???', '')
        return UNRESOLVED
    try:
        return _resolve(node[key], path, failures)
    except (OmegaConfBaseException, RecursionError) as e:
        failures[path] = (str(node._get_node(key)._value()), (str(e).splitlines() or ['too many levels'])[0])
        return UNRESOLVED


def _report_failures(tree: DictConfig, failures: Mapping[KeyPath, tuple[str, str]], report: Report) -> None:
    """Notes each failed value, but not those that only refer to another failed one."""
    failed_names = {'.'.join(path) for path in failures}
    for path, (raw, reason) in failures.items():
        if not any(name in failed_names and name != '.'.join(path) for name in _REFERENCE.findall(raw)) or 'ecursive' in reason:
            report.add(path, _interpolation_message(tree, raw, reason))
        else:
            report.mark(path)


def _find_aliases(node: Any, path: KeyPath, aliases: dict[KeyPath, KeyPath]) -> None:
    """Notes every value that is nothing but ``${absolute.name}``."""
    for key in (node if isinstance(node, DictConfig) else range(len(node))):
        child, here = node._get_node(key), (*path, str(key))
        if isinstance(child, (DictConfig, ListConfig)) and not child._is_interpolation() and not child._is_none() and not child._is_missing():
            _find_aliases(child, here, aliases)
        elif child is not None and child._is_interpolation():
            match = _REFERENCE.fullmatch(str(child._value()))
            if match:
                aliases[here] = tuple(match.group(1).split('.'))


def _interpolation_message(tree: DictConfig, raw: str, reason: str) -> str:
    if raw == '???':
        return "missing: '???' marks a value that has to be given"
    if 'oc.env' in raw or 'oc.env' in reason:
        return f'{raw}: environment variables cannot be read from a config, for safety; pass the value on the command line (key=value)'
    if reason.startswith('Interpolation key'):
        name = reason.split("'")[1]
        parent = OmegaConf.select(tree, name.rpartition('.')[0], throw_on_missing=False, throw_on_resolution_failure=False) if '.' in name else tree
        near = nearest(name.rpartition('.')[2], map(str, parent)) if isinstance(parent, DictConfig) else None
        hint = f' (did you mean {(name.rpartition(".")[0] + "." + near).lstrip(".")!r}?)' if near else ''
        return f'{raw}: there is no key {name!r} to interpolate{hint}'
    if 'Unsupported interpolation type' in reason:
        return f'{raw}: there is no resolver {reason.rpartition(" ")[2]!r}'
    return f'{raw}: {reason[0].lower()}{reason[1:]}'


def _run_code_paths(config: Mapping[str, Any], report: Report) -> None:
    """Plug-ins first, so that what they register counts."""
    paths = config.get('code_paths')
    check_type(report, ('code_paths',), paths, list[str] | None)
    if not report.has('code_paths'):
        for path in paths or ():
            if isinstance(path, str):
                registry.import_file(path)


def _run_transforms(config: dict[str, Any], report: Report) -> dict[str, Any]:
    """User-registered config transforms, in registry order; ours for batch sizes belongs to ``derive``."""
    for name in registry.config_transforms.names():
        if name == BATCH_TRANSFORM:
            continue
        transform: Callable[[dict[str, Any]], dict[str, Any]] = registry.config_transforms.get(name)
        try:
            config = transform(config)
        except ConfigError:
            raise
        except Exception as e:  # noqa: BLE001 - a plug-in's transform may raise anything; the report must still name it
            report.add(('config_transforms', name), f'failed: {type(e).__name__}: {e}')
    return config


def _freeze(config: Mapping[str, Any], notes: Sequence[str]) -> TrainConfig:
    frozen = TrainConfig(**config)
    frozen._notes = tuple(notes)
    frozen._batch_summary = batch_size_summary(dict(config))
    return frozen


