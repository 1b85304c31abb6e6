"""Keeps documents that share a row apart in any transformers causal LM: attention within each document only, positions from 0 in each.

transformers has several ways to do this and no common one. The route is chosen once per model and device, from how the model is built:

1. *varlen*: flash attention takes the cumulated lengths of documents, rows as they are, padding as documents of its own.
2. *documents*: SDPA on the CPU, once per document (``document_attention``).
3. *block mask*: SDPA elsewhere, eager attention, and the older models that make masks themselves take ready masks, one for all layers or one per type of layer.

Everything else is refused with the reason: recurrent and convolutional layers carry state across documents whatever the mask says, and a model without position ids counts
positions from the start of the row. The choice is made without running the model, so that ranks never wait for each other; whether it holds is what the packing self-test
measures. Dropped: position ids alone, from which transformers makes the mask itself, since some models (GPT-OSS; Falcon and OPT of version 5) do not pass them on and
silently attend across documents; and unpacking rows, one document per row, which is right for any model but brings all the padding back.

Rows with one document each cost one look at the ids, and the model gets the batch that it would get anyway.

Shapes: b batch, s tokens per row, n documents of all rows.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
from typing import Any, Mapping, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from llmfoundry.errors import PackingNotSupportedError
from llmfoundry.models.hf.document_attention import IMPLEMENTATION, document_lengths_as_mask, use_document_attention
from llmfoundry.models.mpt.attention_inputs import positions_within_documents, run_lengths

__all__ = ['PackingRoute', 'attention_backend', 'choose_route', 'has_packed_rows', 'separate_documents']

log = logging.getLogger(__name__)

PADDING_ID = -1
# Class names of layers that mix tokens by other means than attention.
_STATEFUL = re.compile(r'mamba|rwkv|recurrent|xlstm|[sm]lstm|deltanet|shortconv|lightningattention|retention|hyena', re.IGNORECASE)
_MASK_DICT = re.compile(r'isinstance\([^()]*attention_mask[^()]*, dict\)')
_ATTENTION_LAYERS = {'full_attention', 'sliding_attention', 'chunked_attention', 'attention'}


class PackingRoute(NamedTuple):
    """How a model keeps documents apart: ``varlen``, ``documents``, ``block_mask``, or ``refused``; in words, and for ``refused`` the reason."""

    kind: str
    reason: str = ''


# Not for compilers: the choice reads classes and sources, and what follows depends on lengths.
@torch.compiler.disable
def separate_documents(model: nn.Module, inputs: Mapping[str, Any], sequence_id: torch.Tensor, routes: dict[str, PackingRoute]) -> dict[str, Any]:
    """The inputs with which ``model`` computes each document as if it stood alone.

    Args:
        model: a transformers causal LM, or a PEFT model around one.
        inputs: arguments of its forward: ``input_ids`` (b, s), ``attention_mask`` (b, s) or none, ...
        sequence_id: (b, s) the document of each token, ``-1`` at padding. A document is a run of equal ids.
        routes: the model's routes by device type, filled here.

    Returns:
        The same inputs if no row holds several documents; else with position ids and with what the route takes in place of the mask.

    Raises:
        PackingNotSupportedError: the model has no way to keep documents apart.
    """
    if sequence_id.max() <= 0:
        return dict(inputs)
    mask = inputs.get('attention_mask')
    ids = sequence_id if mask is None else torch.where(mask.bool(), sequence_id, PADDING_ID)
    if not has_packed_rows(ids):
        return dict(inputs)
    device = ids.device.type
    if device not in routes:
        routes[device] = choose_route(model, device)
        if routes[device].kind == 'documents':
            use_document_attention(_causal_lm(model))
        log.debug('%s: packed documents: %s (%s)', type(_causal_lm(model)).__name__, *routes[device])
    route = routes[device]
    if route.kind == 'refused':
        raise PackingNotSupportedError(type(_causal_lm(model)).__name__, attention_backend(model), route.reason)
    positions = positions_within_documents(ids)
    return {**inputs, 'position_ids': positions, **_mask_arguments(_causal_lm(model), route.kind, ids, positions)}


def has_packed_rows(sequence_id: torch.Tensor) -> bool:
    """Whether a row of (b, s) holds tokens of several documents; negative ids are padding."""
    highest = sequence_id.amax(dim=1)
    lowest = sequence_id.masked_fill(sequence_id < 0, torch.iinfo(sequence_id.dtype).max).amin(dim=1)
    return bool((highest > lowest).any())


def attention_backend(model: nn.Module) -> str:
    """The attention implementation of a transformers model, by the name that ``attn_implementation`` has."""
    name = str(getattr(_causal_lm(model).config, '_attn_implementation', None))
    return 'sdpa' if name == IMPLEMENTATION else name


def choose_route(model: nn.Module, device_type: str) -> PackingRoute:
    """Picks the route for ``model`` on ``device_type`` (``cpu``, ``cuda``) from its class, config and attention implementation."""
    model, outer = _causal_lm(model), model
    reason = _unfit(model, outer)
    if reason is not None:
        return PackingRoute('refused', reason)
    backend, decoder = attention_backend(model), model.base_model
    uses_masking_utils = _knows(model, 'create_causal_mask')
    if 'flash' in backend:
        # Files older than transformers' table of attention functions accept the lengths, and drop them on the way (DBRX, Qwen2-MoE, Falcon, StableLM, ...).
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in inspect.signature(decoder.forward).parameters.values())
        if not takes_any or not _knows(model, 'ALL_ATTENTION_FUNCTIONS'):
            return PackingRoute('refused', f'{type(decoder).__name__}.forward takes no cu_seq_lens, so flash attention cannot be told where documents end; set attn_implementation: sdpa')
        return PackingRoute('varlen', 'flash attention with the lengths of documents')
    if backend not in ('sdpa', 'eager'):
        return PackingRoute('refused', f'there is no known way to tell the attention implementation {backend!r} where documents end; set attn_implementation: sdpa')
    if backend == 'sdpa' and device_type == 'cpu' and uses_masking_utils and not _chunk(model.config) and _knows(model, 'ALL_ATTENTION_FUNCTIONS'):
        return PackingRoute('documents', 'SDPA once per document')
    if not uses_masking_utils and not any(hasattr(type(module), '_prepare_4d_causal_attention_mask_with_cache_position') for module in model.modules()):
        return PackingRoute('refused', 'it makes its masks in a way of its own')
    if _takes_masks_by_layer_type(model):
        return PackingRoute('block_mask', 'a mask per type of layer')
    if len(set(getattr(model.config, 'layer_types', None) or ())) > 1 or (not uses_masking_utils and _window(model.config) is not None):
        return PackingRoute('refused', 'it makes the masks of its sliding-window layers itself')
    return PackingRoute('block_mask', 'one mask for all layers')


def _unfit(model: PreTrainedModel, outer: nn.Module) -> str | None:
    """Why no mask would help, or None."""
    config = model.config
    if getattr(config, 'is_encoder_decoder', False):
        return 'encoder-decoder models cannot be packed'
    adapters = getattr(outer, 'peft_config', None) or {}
    if any(getattr(adapter, 'is_prompt_learning', False) for adapter in adapters.values()):
        return 'prompt-learning adapters put their virtual tokens before the row, not before each document'
    unknown = set(getattr(config, 'layer_types', None) or ()) - _ATTENTION_LAYERS
    if unknown:
        return f'layers of type {", ".join(sorted(unknown))} carry state from one document into the next'
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d) or getattr(module, '_is_stateful', False) or _STATEFUL.search(type(module).__name__):
            return f'{type(module).__name__}{f" ({name})" if name else ""} carries state from one document into the next'
    if 'position_ids' not in inspect.signature(model.base_model.forward).parameters or getattr(config, 'alibi', False):
        return 'its forward takes no position ids, so positions would be counted from the start of the row'
    return None


def _causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, 'get_base_model') else model


def _classes(model: nn.Module) -> list[type]:
    """The classes of a model and of the decoders inside it, without transformers' base. Sharding and our loss put classes of their own on top of those that its file defines."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [cls for part in parts for cls in type(part).__mro__ if issubclass(cls, PreTrainedModel) and cls is not PreTrainedModel]


def _knows(model: nn.Module, name: str) -> bool:
    """Whether the file in which a model is written uses ``name``."""
    return any(hasattr(sys.modules.get(cls.__module__), name) for cls in _classes(model))


def _takes_masks_by_layer_type(model: nn.Module) -> bool:
    """Whether the model takes a dict of ready masks in place of one; its source is the only place that says so."""
    return any(_MASK_DICT.search(_source(cls.__dict__['forward'])) for cls in _classes(model) if 'forward' in cls.__dict__)


@functools.cache
def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ''


def _window(config: Any) -> int | None:
    return getattr(config, 'sliding_window', None)


def _chunk(config: Any) -> int | None:
    return getattr(config, 'attention_chunk_size', None)


def _mask_arguments(model: PreTrainedModel, kind: str, ids: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
    """What a route passes in the place of ``attention_mask``; ``ids`` and ``positions`` are (b, s)."""
    if kind == 'block_mask':
        return {'attention_mask': _block_masks(model, ids, positions)}
    lengths = run_lengths(ids)
    if kind == 'documents':
        return {'attention_mask': document_lengths_as_mask(lengths)}
    ends = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)  # (n + 1,), from 0
    longest = int(lengths.max())
    return {'attention_mask': None, 'cu_seq_lens_q': ends, 'cu_seq_lens_k': ends, 'max_length_q': longest, 'max_length_k': longest}


def _block_masks(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
    """(b, 1, s, s) masks by type of layer, or the one for all layers. Padding sees itself, so that no row of a mask is empty."""
    window, chunk = _window(model.config), _chunk(model.config)
    index = torch.arange(ids.shape[1], device=ids.device, dtype=torch.int32)
    behind = index[:, None] - index[None]  # (s, s): within a document, distances are those of the row
    sees = (ids[:, :, None] == ids[:, None, :]) & (behind >= 0)
    masks = {'full_attention': sees}
    if window is not None:
        masks['sliding_attention'] = sees & (behind < window)
    if chunk is not None:
        masks['chunked_attention'] = sees & (positions[:, :, None] // chunk == positions[:, None, :] // chunk)
    uses_masking_utils = _knows(model, 'create_causal_mask')
    if not (uses_masking_utils and attention_backend(model) == 'sdpa'):
        masks = {layer_type: _as_bias(mask, model.get_input_embeddings().weight.dtype) for layer_type, mask in masks.items()}
    masks = {layer_type: mask[:, None] for layer_type, mask in masks.items()}
    if _takes_masks_by_layer_type(model):
        return masks
    return masks['sliding_attention' if window is not None and _knows(model, 'create_sliding_window_causal_mask') else 'full_attention']


def _as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where ``mask`` is True, the lowest value of ``dtype`` elsewhere: what is added to scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
