"""Builds layers by their registry name.

The one place where MPT turns the strings of its config into modules, so that a registered layer can take the place of any of ours.
Names are compared in lower case.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from llmfoundry.layers_registry import attention_classes, fcs, ffns, ffns_with_megablocks, ffns_with_norm, norms
from llmfoundry.typed_registry import RegistryError, TypedRegistry

__all__ = ['build_attention_layer', 'build_fc', 'build_ffn', 'build_norm', 'split_fc_type']


def build_norm(
    name: str,
    normalized_shape: int | list[int],
    eps: float | None = 1e-5,
    device: str | None = None,
) -> nn.Module:
    """Builds the norm ``name`` of the registry ``norms``.

    Raises:
        NotImplementedError: no such norm; the text lists the options.
    """
    key = name.lower()
    if key not in norms:
        raise NotImplementedError(f'norm_type: {norms.unknown_name_error(key)}')
    kwargs = {} if eps is None else {'eps': eps}
    return norms.get(key)(normalized_shape, device=device, **kwargs)


def split_fc_type(fc_type: str | dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Splits ``'te'`` or ``{'name': 'te', 'sequence_parallel': False}`` into the name and the other arguments.

    Raises:
        ValueError: a dict without ``name``.
    """
    if isinstance(fc_type, str):
        return fc_type, {}
    kwargs = dict(fc_type)
    if 'name' not in kwargs:
        raise ValueError(f"fc_type must be a name or a dict with the key 'name', got {fc_type!r}")
    return kwargs.pop('name'), kwargs


def build_fc(name: str, in_features: int, out_features: int, fc_kwargs: dict[str, Any] | None = None) -> nn.Module:
    """Builds the fully connected layer ``name`` of the registry ``fcs``, (..., in_features) -> (..., out_features).

    Args:
        fc_kwargs: ``bias``, ``device`` and whatever else the layer takes.

    Raises:
        RegistryError: no such layer.
        ImportError: the package that it needs is missing.
    """
    key = name.lower()
    _require_package('fc_type', key, fcs)
    return fcs.get(key)(in_features, out_features, **(fc_kwargs or {}))


def build_ffn(
    name: str,
    d_model: int,
    expansion_ratio: float,
    device: str | None,
    bias: bool,
    ffn_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Builds the feed-forward block ``name``, (..., d_model) -> (..., d_model).

    The registries ``ffns``, ``ffns_with_norm`` and ``ffns_with_megablocks`` are searched in this order. Blocks of the second contain
    the norm before them and are marked ``_has_norm = True``; those of the third are marked ``_uses_megablocks = True``.

    Args:
        expansion_ratio: hidden size over ``d_model``; ``ffn_kwargs['ffn_hidden_size']`` overrides it.
        ffn_kwargs: ``fc_type``, ``ffn_hidden_size``, ``ffn_act_fn`` and whatever else the block takes.

    Raises:
        RegistryError: no such block; the text lists the options.
        ImportError: the package that it needs is missing.
    """
    key = name.lower()
    kwargs = {'d_model': d_model, 'expansion_ratio': expansion_ratio, 'device': device, 'bias': bias, **(ffn_kwargs or {})}
    if key in ffns:
        return ffns.get(key)(**kwargs)
    if key in ffns_with_norm:
        ffn = ffns_with_norm.get(key)(**kwargs)
        ffn._has_norm = True
        return ffn
    if key in ffns_with_megablocks:
        ffn = ffns_with_megablocks.get(key)(**kwargs)
        ffn._uses_megablocks = True
        return ffn
    _require_package('ffn_config.ffn_type', key, ffns, ffns_with_norm, ffns_with_megablocks)
    options = sorted({*ffns.names(), *ffns_with_norm.names(), *ffns_with_megablocks.names()})
    raise RegistryError(f"ffn_config.ffn_type: {name!r} is no feed-forward block. Available names: {', '.join(options)}")


def _require_package(where: str, name: str, *registries: TypedRegistry) -> None:
    """Raises ImportError if ``name`` is a built-in entry whose package is not installed, which the registry reports as unknown."""
    for registry in registries:
        if name in registry:
            return
        error = str(registry.unknown_name_error(name))
        if 'needs the package' in error:
            raise ImportError(f'{where}: {error}')


def build_attention_layer(name: str, attn_kwargs: dict[str, Any]) -> nn.Module:
    """Builds the attention module ``name`` of the registry ``attention_classes``.

    Raises:
        RegistryError: no such attention class.
        TypeError: a key of ``attn_kwargs`` that the class does not take.
    """
    return attention_classes.get(name.lower())(**attn_kwargs)
