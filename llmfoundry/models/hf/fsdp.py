"""Tells Composer which parts of a transformers model to shard and to checkpoint as units: its decoder layers.

transformers has no common name for the list of layers; the names below cover its decoder families. Guessing any ``ModuleList`` was
dropped: in a mixture of experts that would be the experts.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

__all__ = ['find_decoder_layers', 'prepare_hf_model_for_fsdp', 'rgetattr', 'rhasattr']

_DECODERS = ('transformer', 'model.decoder', 'gpt_neox', 'model.transformer', 'model', 'decoder')
_LAYERS = ('h', 'decoder.layers', 'layers', 'block', 'blocks')


def rgetattr(obj: Any, path: str, *default: Any) -> Any:
    """``getattr`` along a dotted path; ``default`` is returned if any step is missing."""
    try:
        return functools.reduce(getattr, path.split('.'), obj)
    except AttributeError:
        if default:
            return default[0]
        raise


def rhasattr(obj: Any, path: str) -> bool:
    """Whether a dotted path of attributes exists."""
    return rgetattr(obj, path, None) is not None


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers of a causal LM.

    Raises:
        ValueError: none of the known names exists.
    """
    for decoder_path in _DECODERS:
        decoder = rgetattr(model, decoder_path, None)
        for layers_path in _LAYERS:
            layers = rgetattr(decoder, layers_path, None)
            if isinstance(layers, nn.ModuleList) and len(layers) > 0:
                return layers
    raise ValueError(
        f'{type(model).__name__}: cannot find its decoder layers, which FSDP shards one by one. '
        f'Looked below {", ".join(_DECODERS)} for a ModuleList named {", ".join(_LAYERS)}.',
    )


def prepare_hf_model_for_fsdp(model: nn.Module, outer: nn.Module | None = None) -> None:
    """Sets ``fsdp_wrap_fn``, ``activation_checkpointing_fn`` and ``param_init_fn`` (for the meta device), which Composer calls if it shards or checkpoints.

    Embeddings and head stay in the root unit, since they may share a weight. A model whose layers cannot be found fails when it is sharded, not before.

    Args:
        model: the transformers model.
        outer: what Composer sees, if it is wrapped (PEFT).
    """
    outer = model if outer is None else outer
    outer.fsdp_wrap_fn = functools.partial(_is_layer, model)
    outer.activation_checkpointing_fn = functools.partial(_is_layer, model)
    outer.param_init_fn = functools.partial(_init_module, model)


def _is_layer(model: nn.Module, module: nn.Module) -> bool:
    if getattr(module, '_fsdp_wrap', None) is not None:
        return bool(module._fsdp_wrap)
    return isinstance(module, tuple({type(layer) for layer in find_decoder_layers(model)}))


def _init_module(model: Any, module: nn.Module) -> None:
    # Older transformers leave RMS norms out of _init_weights; after to_empty they would hold arbitrary memory. A model whose norms
    # start elsewhere (Gemma scales by 1 + weight, so its weights start at 0) sets them itself afterwards.
    if 'RMSNorm' in type(module).__name__ and getattr(module, 'weight', None) is not None:
        nn.init.ones_(module.weight)
    model._init_weights(module)
