"""The two attention implementations of ``attn_impl``, ``torch`` and ``flash``, under the call that the registry ``attention_implementations`` prescribes.

``torch`` is scaled_dot_product_attention with a bias only where one is needed (``attention_kernels``). ``flash`` is the flash-attn library for fp16 and bf16 on
CUDA; where it is missing, too old for a feature, or cannot take the tensors, ``torch`` does the work, which one log line says. So one YAML runs
everywhere; the price is that a missing library costs speed and not an error.

Shapes: b batch, s query length, k key length, h heads, g key/value heads, d head_dim.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from packaging import version

from llmfoundry.models.layers.attention_kernels import AttentionMask, KernelOptions, attend
from llmfoundry.models.layers.position import build_alibi_bias

__all__ = [
    'AttentionOptions',
    'attn_bias_shape',
    'build_attn_bias',
    'check_alibi_support',
    'flash_attn_fn',
    'is_flash_v1_installed',
    'is_flash_v2_installed',
    'is_transformers_version_gte',
    'scaled_multihead_dot_product_attention',
]

log = logging.getLogger(__name__)
_said: set[str] = set()
PastKeyValue = tuple[torch.Tensor, torch.Tensor]


def is_flash_v2_installed(v2_version: str = '2.0.0') -> bool:
    """Whether flash-attn of at least ``v2_version`` can be imported."""
    if version.parse(v2_version) < version.parse('2.0.0'):
        raise ValueError(f'v2_version must be at least 2.0.0, got {v2_version}')
    return _flash_version() is not None and _flash_version() >= version.parse(v2_version)


def is_flash_v1_installed() -> bool:
    """Whether flash-attn of version 1 can be imported. It is never used."""
    return _flash_version() is not None and _flash_version() < version.parse('2.0.0')


def is_transformers_version_gte(hf_version: str) -> bool:
    """Whether transformers is at least ``hf_version``."""
    return version.parse(metadata.version('transformers')) >= version.parse(hf_version)


@functools.cache
def _flash_version() -> version.Version | None:
    if importlib.util.find_spec('flash_attn') is None:
        return None
    try:
        return version.parse(importlib.import_module('flash_attn').__version__)
    except (ImportError, AttributeError) as e:
        # An undefined symbol: the wheel was built for another torch. Said apart, since "not installed" would send its owner looking in the wrong place.
        _say_once(f'flash-attn is installed but cannot be imported ({e}); it was probably built for another torch. Reinstall it for torch {torch.__version__}.')
        return None


def check_alibi_support(attention_impl: str) -> bool:
    """Whether alibi works under ``attention_impl``: always, since ``flash`` falls back to ``torch`` where flash-attn is older than 2.4.2."""
    return attention_impl in ('torch', 'flash')


def attn_bias_shape(
    attn_impl: str,
    n_heads: int,
    seq_len: int,
    alibi: bool,
    causal: bool,
    use_sequence_id: bool,
) -> tuple[int, int, int, int] | None:
    """Shape of an explicit bias tensor (1, heads, queries, keys), or None where none is needed.

    MPT itself never builds it: biases are made per chunk of queries. This serves callers of ``scaled_multihead_dot_product_attention``.
    """
    if attn_impl == 'flash':
        return None
    if attn_impl != 'torch':
        raise ValueError(f'attn_impl must be torch or flash, got {attn_impl!r}')
    if alibi:
        return (1, n_heads, seq_len, seq_len) if not causal or use_sequence_id else (1, n_heads, 1, seq_len)
    return (1, 1, seq_len, seq_len) if use_sequence_id else None


def build_attn_bias(
    attn_impl: str,
    attn_bias: torch.Tensor,
    n_heads: int,
    seq_len: int,
    causal: bool = False,
    alibi: bool = False,
    alibi_bias_max: int = 8,
) -> torch.Tensor | None:
    """Adds the alibi bias to ``attn_bias`` (as ``attn_bias_shape`` says) for the torch implementation; None for flash."""
    if attn_impl == 'flash':
        return None
    if attn_impl != 'torch':
        raise ValueError(f'attn_impl must be torch or flash, got {attn_impl!r}')
    if not alibi:
        return attn_bias
    return attn_bias + build_alibi_bias(
        n_heads, seq_len, full=not causal, alibi_bias_max=alibi_bias_max, device=attn_bias.device, dtype=attn_bias.dtype
    )


@dataclass
class AttentionOptions:
    """Keyword arguments of an attention implementation.

    Attributes:
        softmax_scale: factor on the scores; default ``1 / sqrt(d)``.
        attn_bias: (b or 1, h or 1, s or 1, k), added to the scores; ``torch`` only.
        key_padding_mask: (b, k) bool, False at keys to hide.
        is_causal: a query sees no key after it.
        dropout_p: dropout on the weights, used if ``training``.
        training: whether dropout applies.
        needs_weights: also return the weights; ``torch`` only.
        attn_logit_softcapping: tanh cap of the scores.
        sliding_window_size: keys that a query sees before itself; -1 for all.
        alibi_slopes: (h,) fp32.
        flash_attn_padding_info: from ``gen_flash_attn_padding_info``; ``flash`` only.
        should_repeat_kv_for_gqa: accepted for old callers; heads are repeated where the kernel needs it.
        mask: everything about visibility in one object; takes the place of ``key_padding_mask``, ``is_causal`` and ``alibi_slopes``.
    """

    softmax_scale: float | None = None
    attn_bias: torch.Tensor | None = None
    key_padding_mask: torch.Tensor | None = None
    is_causal: bool = False
    dropout_p: float = 0.0
    training: bool = False
    needs_weights: bool = False
    attn_logit_softcapping: float | None = None
    sliding_window_size: int = -1
    alibi_slopes: torch.Tensor | None = None
    flash_attn_padding_info: dict[str, Any] | None = None
    should_repeat_kv_for_gqa: bool = True
    mask: AttentionMask | None = field(default=None, repr=False)

    def visibility(self) -> AttentionMask:
        """The mask object, made from the single arguments if none was given."""
        return self.mask or AttentionMask(self.is_causal, key_padding=self.key_padding_mask, alibi_slopes=self.alibi_slopes)

    def kernel(self, head_dim: int) -> KernelOptions:
        """What the kernels need beside the mask."""
        return KernelOptions(
            scale=1.0 / math.sqrt(head_dim) if self.softmax_scale is None else self.softmax_scale,
            window=self.sliding_window_size,
            softcap=self.attn_logit_softcapping,
            dropout_p=self.dropout_p if self.training else 0.0,
            needs_weights=self.needs_weights,
        )


def scaled_multihead_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    n_heads: int,
    kv_n_heads: int | None = None,
    past_key_value: PastKeyValue | tuple[()] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, PastKeyValue | None]:
    """Attention by torch.

    Args:
        query: (b, s, h * d), or (b, h, s, d).
        key: (b, k, g * d), or (b, g, k, d).
        value: (b, k, g * d), or (b, g, k, d).
        n_heads: h.
        kv_n_heads: g; default h.
        past_key_value: None without a cache; an empty tuple before the first token; else key (b, g, d, past) and value (b, g, past, d).
        **options: fields of ``AttentionOptions``.

    Returns:
        Context (b, s, h * d); weights (b, h, s, k) or None; the cache, key (b, g, d, k) and value (b, g, k, d), or None.

    Raises:
        RuntimeError: ``attn_bias`` fits neither query nor key length.
    """
    settings = AttentionOptions(**options)
    kv_n_heads = kv_n_heads or n_heads
    q, k, v = _split_heads(query, n_heads), _split_heads(key, kv_n_heads), _split_heads(value, kv_n_heads)
    present = None
    if past_key_value is not None:
        if len(past_key_value) != 0:
            k = torch.cat([past_key_value[0].transpose(-1, -2), k], dim=2)
            v = torch.cat([past_key_value[1], v], dim=2)
        present = (k.transpose(-1, -2), v)
    mask = settings.visibility()
    if settings.attn_bias is not None:
        mask = _BiasedMask(mask, settings.attn_bias, q.shape[2], k.shape[2])
    context, weights = attend(q, k, v, mask, settings.kernel(q.shape[-1]))
    return context, weights, present


def _split_heads(x: torch.Tensor, n_heads: int) -> torch.Tensor:
    """(b, s, h * d) -> (b, h, s, d); the latter passes as it is."""
    return x if x.dim() == 4 else x.view(x.shape[0], x.shape[1], n_heads, -1).transpose(1, 2)


class _BiasedMask(AttentionMask):
    """A mask with an explicit bias on top, for callers that bring their own."""

    def __init__(self, mask: AttentionMask, attn_bias: torch.Tensor, q_len: int, k_len: int) -> None:
        if attn_bias.shape[-1] not in (1, k_len) or attn_bias.shape[-2] not in (1, q_len):
            # A bias made for the longest sequence: its last rows and columns belong to these queries and keys.
            attn_bias = attn_bias[..., max(0, attn_bias.shape[-2] - q_len) :, max(0, attn_bias.shape[-1] - k_len) :]
        if attn_bias.shape[-1] not in (1, k_len) or attn_bias.shape[-2] not in (1, q_len):
            raise RuntimeError(f'attn_bias of shape {tuple(attn_bias.shape)} does not broadcast to {q_len} queries and {k_len} keys')
        super().__init__(mask.is_causal, mask.key_padding, mask.sequence_id, None, mask.alibi_slopes)
        self.attn_bias = attn_bias.expand(-1, -1, q_len, k_len)
        # Anything but None sends ``attend`` to the routes that read a bias.
        self.alibi_slopes = torch.zeros(1, device=attn_bias.device) if mask.alibi_slopes is None else mask.alibi_slopes

    def chunk_bias(self, queries: tuple[int, int], keys: tuple[int, int], past: int, window: int, template: torch.Tensor) -> torch.Tensor:
        bias = super().chunk_bias(queries, keys, past, window, template)
        return bias + self.attn_bias[..., slice(*queries), slice(*keys)].to(bias.dtype)


def flash_attn_fn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    n_heads: int,
    kv_n_heads: int | None = None,
    past_key_value: PastKeyValue | tuple[()] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, PastKeyValue | None]:
    """Attention by flash-attn, or by torch where that is not possible.

    Args:
        query: (b, s, h * d), or (b, h, s, d).
        key: (b, k, g * d), or (b, g, k, d).
        value: (b, k, g * d), or (b, g, k, d).
        n_heads: h.
        kv_n_heads: g; default h.
        past_key_value: None without a cache; an empty tuple before the first token; else key and value (b, past, g * d).
        **options: fields of ``AttentionOptions``.

    Returns:
        Context (b, s, h * d); None; the cache, key and value (b, k, g * d), or None.

    Raises:
        NotImplementedError: ``attn_bias`` or ``needs_weights``, which flash-attn cannot do.
    """
    settings = AttentionOptions(**options)
    for name, is_wanted in (('attn_bias', settings.attn_bias is not None), ('needs_weights (output_attentions)', settings.needs_weights)):
        if is_wanted:
            raise NotImplementedError(f'attn_impl flash does not support {name}; set attn_config.attn_impl: torch')
    kv_n_heads = kv_n_heads or n_heads
    present = None
    if past_key_value is not None:
        if len(past_key_value) != 0:
            key, value = torch.cat([past_key_value[0], key], dim=1), torch.cat([past_key_value[1], value], dim=1)
        present = (key, value)
    mask = settings.visibility()
    if _can_use_flash(query, mask, settings):
        context = _flash_attention(_unflatten(query, n_heads), _unflatten(key, kv_n_heads), _unflatten(value, kv_n_heads), mask, settings)
    else:
        q, k, v = _split_heads(query, n_heads), _split_heads(key, kv_n_heads), _split_heads(value, kv_n_heads)
        context, _ = attend(q, k, v, mask, settings.kernel(q.shape[-1]))
    return context, None, present


def _unflatten(x: torch.Tensor, n_heads: int) -> torch.Tensor:
    """(b, s, h * d) or (b, h, s, d) -> (b, s, h, d)"""
    return x.transpose(1, 2) if x.dim() == 4 else x.view(x.shape[0], x.shape[1], n_heads, -1)


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.warning(text)


def _can_use_flash(query: torch.Tensor, mask: AttentionMask, settings: AttentionOptions) -> bool:
    """Whether flash-attn takes the call; the first reason why not is logged once."""
    fallback = "torch's scaled_dot_product_attention computes the same"
    if not is_flash_v2_installed():
        _say_once(f'attn_impl flash: flash-attn is not installed, {fallback}.')
        return False
    if query.device.type != 'cuda' or query.dtype not in (torch.float16, torch.bfloat16):
        _say_once(f'attn_impl flash: flash-attn needs fp16 or bf16 on CUDA, got {query.dtype} on {query.device.type}; {fallback}.')
        return False
    needed = {
        '2.1.2': mask.sequence_id is not None,
        '2.3.0': settings.sliding_window_size >= 0,
        '2.4.2': mask.alibi_slopes is not None,
        '2.6.2': settings.attn_logit_softcapping is not None,
    }
    lacking = [wanted for wanted, is_needed in needed.items() if is_needed and not is_flash_v2_installed(wanted)]
    if lacking:
        _say_once(f'attn_impl flash: this model needs flash-attn {max(lacking)}, found {_flash_version()}; {fallback}.')
    return not lacking


def _flash_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: AttentionMask, settings: AttentionOptions) -> torch.Tensor:
    """Calls flash-attn on (b, s, h, d) and returns (b, s, h * d). Padding is removed and documents are separated by their lengths."""
    flash = importlib.import_module('flash_attn')
    batch, q_len, n_heads, head_dim = q.shape
    kernel = settings.kernel(head_dim)
    kwargs: dict[str, Any] = {'dropout_p': kernel.dropout_p, 'softmax_scale': kernel.scale, 'causal': mask.is_causal}
    if kernel.window >= 0:
        kwargs['window_size'] = (kernel.window, 0 if mask.is_causal else kernel.window)
    if mask.alibi_slopes is not None:
        kwargs['alibi_slopes'] = mask.alibi_slopes.float()
    if kernel.softcap is not None:
        kwargs['softcap'] = kernel.softcap
    info = settings.flash_attn_padding_info
    if not info:
        return flash.flash_attn_func(q, k, v, **kwargs).reshape(batch, q_len, n_heads * head_dim)
    flat_q, flat_k, flat_v = (x.reshape(-1, x.shape[2], head_dim) for x in (q, k, v))
    context = flash.flash_attn_varlen_func(
        flat_q[info['indices_q']],
        flat_k[info['indices_k']],
        flat_v[info['indices_v']],
        cu_seqlens_q=info['cu_seqlens_q'],
        cu_seqlens_k=info['cu_seqlens_k'],
        max_seqlen_q=info['max_seqlen_q'],
        max_seqlen_k=info['max_seqlen_k'],
        **kwargs,
    )
    padded = context.new_zeros(flat_q.shape).index_copy(0, info['indices_q'], context)
    return padded.view(batch, q_len, n_heads * head_dim)
