"""Turns ``block_overrides`` of an MPT config into one settings dict per layer.

``block_overrides`` lets layers differ, as in published recipes that mix sliding-window and global attention or share keys and values between layers::

    block_overrides:
      order:
      - name: default
      - order: [{name: sliding_window_layer}, {name: sliding_window_layer_reuse}]
        repeat: 2
      overrides:
        sliding_window_layer: {attn_config: {sliding_window_size: 1024}}
        sliding_window_layer_reuse: {attn_config: {sliding_window_size: 1024, reuse_kv_layer_idx: -1}}

Everything here is a pure function of plain dicts (no torch), so a config is checked before any tensor exists. The price of this generality is
that only the few keys of ``ALLOWED_ATTN_OVERRIDES`` may differ: others would change the number of parameters per layer, which loading, sharding and
the parameter count would each have to know.
"""

from __future__ import annotations

import copy
from typing import Any, Mapping

__all__ = ['ALLOWED_ATTN_OVERRIDES', 'REUSE_KEYS', 'expand_order', 'resolve_block_overrides']

REUSE_KEYS = ('reuse_kv_layer_idx', 'reuse_kv_x_layer_idx')
ALLOWED_ATTN_OVERRIDES: dict[str, Any] = {
    'sliding_window_size': None,
    'reuse_kv_layer_idx': None,
    'reuse_kv_x_layer_idx': None,
    'attn_temperature_tuning': {'floor_scale': None, 'attn_scale': None},
    'nope': None,
}
_DEFAULT = 'default'


def expand_order(order: Any, overrides: Mapping[str, Any], path: str = 'block_overrides.order') -> list[str]:
    """Flattens the nested ``order`` into one name per layer.

    Args:
        order: list of ``{'name': str, 'repeat': int}`` or ``{'order': [...], 'repeat': int}``; ``repeat`` defaults to 1.
        overrides: the named overrides; every name in ``order`` but ``default`` must be one of them.
        path: where ``order`` stands in the config, for error messages.

    Raises:
        ValueError: an item with neither or both of ``name`` and ``order``, an unknown name, or a ``repeat`` below 1.
    """
    names: list[str] = []
    for index, item in enumerate(order):
        where = f'{path}[{index}]'
        if not isinstance(item, Mapping) or ('name' in item) == ('order' in item):
            raise ValueError(f'{where}: each item must have exactly one of the keys name and order, got {item!r}')
        unknown = set(item) - {'name', 'order', 'repeat'}
        if unknown:
            raise ValueError(f'{where}: unknown keys {sorted(unknown)}; allowed are name or order, and repeat')
        repeat = item.get('repeat', 1)
        if isinstance(repeat, bool) or not isinstance(repeat, int) or repeat < 1:
            raise ValueError(f'{where}.repeat must be an integer of at least 1, got {repeat!r}')
        if 'order' in item:
            names += expand_order(item['order'], overrides, f'{where}.order') * repeat
            continue
        name = item['name']
        if name != _DEFAULT and name not in overrides:
            raise ValueError(f'{where}.name: {name!r} is not among block_overrides.overrides; known names: {", ".join([_DEFAULT, *overrides])}')
        names += [name] * repeat
    return names


def resolve_block_overrides(block_overrides: Mapping[str, Any], n_layers: int, attn_config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the ``attn_config`` of every layer, with reuse indices made absolute.

    Args:
        block_overrides: the config value, see the module docstring.
        n_layers: number of blocks.
        attn_config: the model's completed ``attn_config``.

    Returns:
        ``n_layers`` dicts. ``reuse_kv_layer_idx`` and ``reuse_kv_x_layer_idx`` are absolute layer indices, and point to the layer that really
        computes what is reused, however long the chain.

    Raises:
        ValueError: missing keys, an override called ``default``, wrong lengths, types or reuse indices.
        KeyError: an override of a key that may not differ between layers.
    """
    missing = [key for key in ('order', 'overrides') if key not in block_overrides]
    if missing:
        raise ValueError(f'block_overrides must have the keys order and overrides, missing: {", ".join(missing)}')
    overrides = block_overrides['overrides']
    if _DEFAULT in overrides:
        raise ValueError('block_overrides.overrides: default names the layers without overrides and cannot be overridden; choose another name')
    for name, override in overrides.items():
        _check_override(name, override, attn_config)
    names = expand_order(block_overrides['order'], overrides) * block_overrides.get('repeat', 1)
    if len(names) != n_layers:
        raise ValueError(f'block_overrides.order describes {len(names)} layers but n_layers is {n_layers}; they must be equal')
    layers = [_merge(attn_config, overrides[name].get('attn_config', {}) if name != _DEFAULT else {}) for name in names]
    return _resolve_reuse(layers)


def _check_override(name: str, override: Mapping[str, Any], attn_config: Mapping[str, Any]) -> None:
    path = f'block_overrides.overrides.{name}'
    unknown = set(override) - {'attn_config'}
    if unknown:
        raise KeyError(f'{path}: {sorted(unknown)} cannot differ between layers; only attn_config can')
    _check_keys(override.get('attn_config', {}), ALLOWED_ATTN_OVERRIDES, attn_config, f'{path}.attn_config')


def _check_keys(override: Mapping[str, Any], allowed: Mapping[str, Any], defaults: Mapping[str, Any], path: str) -> None:
    for key, value in override.items():
        if key not in allowed:
            raise KeyError(f'{path}.{key} cannot differ between layers; allowed keys: {", ".join(allowed)}')
        if isinstance(allowed[key], dict):
            if not isinstance(value, Mapping):
                raise ValueError(f'{path}.{key} must be a dict, got {value!r}')
            _check_keys(value, allowed[key], defaults.get(key) or {}, f'{path}.{key}')
            continue
        default = defaults.get(key)
        same_type = type(value) is type(default) or {type(value), type(default)} == {int, float}
        if default is not None and not same_type:
            raise ValueError(f'{path}.{key} must be of type {type(default).__name__} as in attn_config, got {value!r}')


def _merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in override.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, Mapping) else value
    return merged


def _resolve_reuse(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for index, layer in enumerate(layers):
        given = [key for key in REUSE_KEYS if layer.get(key) is not None]
        if len(given) == 2:
            raise ValueError(f'layer {index}: only one of {" and ".join(REUSE_KEYS)} can be given')
        for key in given:
            layer[key] = _absolute_index(layers, index, key, layer[key])
        if 'reuse_kv_x_layer_idx' in given and layer.get('fused_qkv', True):
            raise ValueError(
                f'layer {index}: reuse_kv_x_layer_idx needs attn_config.fused_qkv: false, since queries and keys come from different inputs'
            )
    return layers


def _absolute_index(layers: list[dict[str, Any]], index: int, key: str, relative: Any) -> int:
    if isinstance(relative, bool) or not isinstance(relative, int) or relative >= 0:
        raise ValueError(f'layer {index}: {key} is relative to the layer and must be a negative integer, got {relative!r}')
    target = index + relative
    if target < 0:
        raise ValueError(f'layer {index}: {key} {relative} points to layer {target}; the first layer is 0')
    original = layers[target].get(key)
    return target if original is None else original
