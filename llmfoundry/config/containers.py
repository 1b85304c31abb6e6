"""Helpers that plug-ins written for earlier releases call on configs.

Ours are built on ``load``; these keep the older functions' contracts: plain containers, ``pop_config``, and
``make_dataclass_and_log_config``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf

from llmfoundry import registry
from llmfoundry.config.derive import split_spellings
from llmfoundry.config.report import Report

__all__ = ['apply_transforms', 'config_to_yaml', 'forbid_unknown_keys', 'make_dataclass_and_log_config', 'pop_config', 'to_container', 'to_dict_container', 'to_list_container']

T = TypeVar('T')
_MISSING = object()


def to_container(config: Any) -> Any:
    """An OmegaConf node, or nested plain containers, as resolved plain containers; other values as they are."""
    if isinstance(config, (DictConfig, ListConfig)):
        return OmegaConf.to_container(config, resolve=True)
    if isinstance(config, Mapping):
        return {k: to_container(v) for k, v in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_container(v) for v in config]
    return config


def to_dict_container(config: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    """A mapping as a plain, resolved dict.

    Raises:
        TypeError: it is not a mapping, or a key is not text.
    """
    plain = to_container(config)
    if not isinstance(plain, dict):
        raise TypeError(f'expected a mapping, got {type(config).__name__}')
    wrong = [k for k in plain if not isinstance(k, str)]
    if wrong:
        raise TypeError(f'config keys must be text, got {wrong[0]!r}')
    return plain


def to_list_container(config: Iterable[Any] | ListConfig) -> list[dict[str, Any]]:
    """A list of mappings as plain, resolved containers.

    Raises:
        TypeError: it is not a list.
    """
    plain = to_container(config)
    if not isinstance(plain, list):
        raise TypeError(f'expected a list, got {type(config).__name__}')
    return plain


def pop_config(config: MutableMapping[str, Any], key: str, must_exist: bool = True, default_value: Any = None, convert: bool = False) -> Any:
    """Removes ``key`` and returns its value; ``convert`` turns OmegaConf nodes into plain containers.

    Raises:
        NameError: the key is absent and must exist.
    """
    value = config.pop(key, _MISSING)
    if value is _MISSING or (value is None and must_exist):
        if must_exist:
            raise NameError(f'the config has no key {key!r}, which is mandatory')
        return default_value
    if value is None:
        return default_value
    return to_container(value) if convert else value


def apply_transforms(config: Mapping[str, Any], transforms: Iterable[Callable[[dict[str, Any]], dict[str, Any]] | str] | str | None) -> dict[str, Any]:
    """Runs config transforms in order; names come from the registry, and 'all' means every registered one."""
    names: Any = registry.config_transforms.names() if transforms == 'all' else ([transforms] if isinstance(transforms, str) else transforms or ())
    result = dict(config)
    for transform in names:
        function: Any = registry.config_transforms.get(transform) if isinstance(transform, str) else transform
        result = function(result)
    return result


def forbid_unknown_keys(config: Mapping[str, Any], valid: Iterable[str]) -> None:
    """Raises one ``ConfigError`` (a ValueError) that names every key outside ``valid``, with the nearest valid one."""
    valid = set(valid)
    report = Report()
    for key in sorted(k for k in config if k not in valid):
        report.add_unknown((key,), valid)
    report.raise_if_any()


def make_dataclass_and_log_config(
    cfg: Mapping[str, Any] | DictConfig,
    dataclass_constructor: Callable[..., T],
    dataclass_fields: set[str],
    transforms: list[Callable[[dict[str, Any]], dict[str, Any]] | str] | str | None = None,
    icl_tasks_required: bool = False,
) -> tuple[dict[str, Any], T]:
    """Types a config dict: separate spellings, transforms, unknown keys, construction.

    Returns:
        A deep copy for logging and the typed config.

    Raises:
        ValueError: unknown keys, all of them; or no in-context-learning tasks although required.
    """
    config = split_spellings(to_dict_container(cfg))
    if icl_tasks_required and not (config.get('icl_tasks') or config.get('icl_tasks_str')):
        raise ValueError('icl_tasks must be set')
    config = apply_transforms(config, transforms)
    config.setdefault('variables', {})
    logged = copy.deepcopy(config)
    forbid_unknown_keys(config, dataclass_fields)
    return logged, dataclass_constructor(**config)


def config_to_yaml(config: Mapping[str, Any]) -> str:
    """The config as YAML text, as ``log_config`` prints it; keys keep their order."""
    return OmegaConf.to_yaml(OmegaConf.create(to_container(config)), resolve=True)
