"""The attention modules of MPT: projections, positions and cache around an attention implementation.

One class does all three kinds, since multi-head and multi-query attention are grouped-query attention with as many, or one, key/value heads. Parameter names are those
of released checkpoints: ``Wqkv`` (rows: queries, keys, values) or ``Wq``, ``Wk``, ``Wv``; ``q_ln``, ``k_ln``; ``out_proj``.

Keys and values may come from three places: the input; another layer's keys and values (``reuse_kv_layer_idx``, then only ``Wq`` exists); or this layer's
projections of another layer's input (``reuse_kv_x_layer_idx``).

Shapes: b batch, s query length, k key length, h heads, g key/value heads, d head_dim.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from llmfoundry.layers_registry import attention_implementations
from llmfoundry.models.layers.attention_impls import (
    attn_bias_shape,
    build_attn_bias,
    check_alibi_support,
    flash_attn_fn,
    is_flash_v1_installed,
    is_flash_v2_installed,
    is_transformers_version_gte,
    scaled_multihead_dot_product_attention,
)
from llmfoundry.models.layers.attention_kernels import AttentionMask
from llmfoundry.models.layers.layer_builders import build_fc, build_norm, split_fc_type
from llmfoundry.models.layers.position import (
    RotaryTables,
    apply_rotary,
    apply_temperature_tuning,
    build_alibi_bias,
    gen_slopes,
)

__all__ = [
    'AttentionInputs',
    'GroupedQueryAttention',
    'MultiQueryAttention',
    'MultiheadAttention',
    'apply_temperature_tuning',
    'attn_bias_shape',
    'build_alibi_bias',
    'build_attn_bias',
    'check_alibi_support',
    'flash_attn_fn',
    'gen_slopes',
    'is_flash_v1_installed',
    'is_flash_v2_installed',
    'is_transformers_version_gte',
    'scaled_multihead_dot_product_attention',
]

KeyValue = tuple[torch.Tensor, torch.Tensor]


class AttentionInputs:
    """What all layers of one forward share; built once by ``build_attention_inputs``.

    A plain class and not a dataclass: sharded training casts tensors inside dataclass arguments to bf16, and tables must stay fp32.

    Attributes:
        mask: visibility and alibi.
        position_ids: (1 or b, s), or None when no layer needs them.
        rotary: tables of this forward, or None without rope.
        cache: transformers' cache object, or None.
        flash_attn_padding_info: from ``gen_flash_attn_padding_info``, or None when nothing is padded or packed.
        token_mask: (b, s) bool of real tokens, for feed-forward blocks that skip padding; None when all are real.
    """

    def __init__(
        self,
        mask: AttentionMask | None = None,
        position_ids: torch.Tensor | None = None,
        rotary: RotaryTables | None = None,
        cache: Cache | None = None,
        flash_attn_padding_info: dict[str, Any] | None = None,
        token_mask: torch.Tensor | None = None,
    ) -> None:
        self.mask = mask or AttentionMask()
        self.position_ids = position_ids
        self.rotary = rotary
        self.cache = cache
        self.flash_attn_padding_info = flash_attn_padding_info
        self.token_mask = token_mask
        self._mask_without_alibi: AttentionMask | None = None

    @property
    def mask_without_alibi(self) -> AttentionMask:
        """The mask for layers without positions."""
        if self.mask.alibi_slopes is None:
            return self.mask
        if self._mask_without_alibi is None:
            self._mask_without_alibi = AttentionMask(self.mask.is_causal, self.mask.key_padding, self.mask.sequence_id, self.mask.doc_lengths)
        return self._mask_without_alibi


@dataclass
class AttentionSettings:
    """Keys of ``attn_config``, and what the model adds to them, as one attention module sees them.

    Attributes:
        attn_impl: name in the registry ``attention_implementations``.
        qk_ln: norm over all query and key features.
        qk_gn: norm of each head.
        fused_qkv: one ``Wqkv`` instead of ``Wq``, ``Wk``, ``Wv``.
        clip_qkv: clamp of projected queries, keys and values to +- this.
        softmax_scale: default ``1 / sqrt(d_model / n_heads)``.
        attn_pdrop: dropout on the attention weights.
        norm_type: norm of ``qk_ln`` and ``qk_gn``.
        norm_eps: its epsilon.
        fc_type: linear layers, a name or a dict with ``name``.
        device: where parameters are created.
        bias: whether ``out_proj`` has a bias.
        attention_bias: whether the other projections have one; None: as ``bias``.
        sliding_window_size: keys that a query sees before itself; -1 for all.
        attn_logit_softcapping: tanh cap of the scores.
        reuse_kv_layer_idx: layer whose keys and values are used.
        reuse_kv_x_layer_idx: layer whose input gives the keys and values.
        attn_temperature_tuning: ``floor_scale`` and ``attn_scale``.
        nope: no positions in this layer.
        kv_dim: width of the input of keys and values, for cross attention.
        head_dim: features per head; default ``d_model / n_heads``.
        layer_idx: place of the layer, for the cache.
    """

    attn_impl: str = 'flash'
    qk_ln: bool = False
    qk_gn: bool = False
    fused_qkv: bool = True
    clip_qkv: float | None = None
    softmax_scale: float | None = None
    attn_pdrop: float = 0.0
    norm_type: str = 'low_precision_layernorm'
    norm_eps: float = 1e-5
    fc_type: str | dict[str, Any] = 'torch'
    device: str | None = None
    bias: bool = True
    attention_bias: bool | None = None
    sliding_window_size: int = -1
    attn_logit_softcapping: float | None = None
    reuse_kv_layer_idx: int | None = None
    reuse_kv_x_layer_idx: int | None = None
    attn_temperature_tuning: dict[str, float] | None = None
    nope: bool = False
    kv_dim: int | None = None
    head_dim: int | None = None
    layer_idx: int = 0

    @classmethod
    def from_kwargs(cls, kwargs: dict[str, Any]) -> AttentionSettings:
        """Like the constructor, with an error that names the key as the user wrote it and the nearest one."""
        known = [f.name for f in fields(cls)]
        for key in kwargs:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise TypeError(f'attn_config.{key}: unknown key' + (f' (did you mean {near[0]!r}?)' if near else ''))
        return cls(**kwargs)


class GroupedQueryAttention(nn.Module):
    """Attention in which ``n_heads / kv_n_heads`` query heads share a key/value head (Ainslie et al. 2023, https://arxiv.org/abs/2305.13245)."""

    def __init__(self, d_model: int, n_heads: int, kv_n_heads: int, **settings: Any) -> None:
        """Builds the projections.

        Args:
            d_model: width of the input and the output.
            n_heads: query heads.
            kv_n_heads: key/value heads.
            **settings: fields of ``AttentionSettings``.

        Raises:
            ValueError: head numbers that do not divide.
            TypeError: an unknown key.
        """
        super().__init__()
        if kv_n_heads <= 0 or n_heads % kv_n_heads:
            raise ValueError(
                f'attn_config.kv_n_heads must be between 1 and n_heads and divide n_heads, got kv_n_heads {kv_n_heads} and n_heads {n_heads}'
            )
        self.settings = s = AttentionSettings.from_kwargs(settings)
        self.d_model, self.n_heads, self.kv_n_heads = d_model, n_heads, kv_n_heads
        self.head_dim = s.head_dim or d_model // n_heads
        self.softmax_scale = 1.0 / math.sqrt(d_model / n_heads) if s.softmax_scale is None else s.softmax_scale
        self.attn_impl, self.layer_idx = s.attn_impl, s.layer_idx
        self.reuses_kv, self.reuses_x = s.reuse_kv_layer_idx is not None, s.reuse_kv_x_layer_idx is not None
        self.attn_fn = attention_implementations.get(s.attn_impl)
        self._build_projections()
        self._build_qk_norms()

    def _build_projections(self) -> None:
        s = self.settings
        fc_name, fc_kwargs = split_fc_type(s.fc_type)
        in_kwargs = {**fc_kwargs, 'device': s.device, 'bias': s.bias if s.attention_bias is None else s.attention_bias}
        q_dim, kv_dim = self.n_heads * self.head_dim, self.kv_n_heads * self.head_dim
        kv_width = s.kv_dim or self.d_model
        self.is_fused = s.fused_qkv and not self.reuses_kv
        if self.is_fused:
            self.Wqkv = build_fc(fc_name, self.d_model, q_dim + 2 * kv_dim, in_kwargs)
            self.Wqkv._fused = (0, _head_splits(self.n_heads + 2 * self.kv_n_heads, self.head_dim))
        else:
            self.Wq = build_fc(fc_name, self.d_model, q_dim, in_kwargs)
            self.Wq._fused = (0, _head_splits(self.n_heads, self.head_dim))
            if not self.reuses_kv:
                self.Wk = build_fc(fc_name, kv_width, kv_dim, in_kwargs)
                self.Wv = build_fc(fc_name, kv_width, kv_dim, in_kwargs)
                for projection in (self.Wk, self.Wv):
                    projection._fused = (0, _head_splits(self.kv_n_heads, self.head_dim))
        self.out_proj = build_fc(fc_name, q_dim, self.d_model, {**fc_kwargs, 'device': s.device, 'bias': s.bias})
        self.out_proj._is_residual = True

    def _build_qk_norms(self) -> None:
        s = self.settings
        if not (s.qk_ln or s.qk_gn):
            return
        self.q_ln = build_norm(s.norm_type, self.head_dim if s.qk_gn else self.n_heads * self.head_dim, s.norm_eps, s.device)
        if not self.reuses_kv:
            self.k_ln = build_norm(s.norm_type, self.head_dim if s.qk_gn else self.kv_n_heads * self.head_dim, s.norm_eps, s.device)

    def forward(
        self,
        x: torch.Tensor,
        inputs: AttentionInputs | None = None,
        past_key_value: KeyValue | tuple[()] | None = None,
        prev_layer_key_value: KeyValue | None = None,
        key_value_states: torch.Tensor | None = None,
        needs_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, KeyValue | tuple[()] | None, KeyValue]:
        """Attends.

        Args:
            x: (b, s, d_model).
            inputs: masks and tables; default plain causal attention without positions.
            past_key_value: None without a tuple cache, an empty tuple before the first token, else this layer's entry, laid out as
                the implementations say.
            prev_layer_key_value: keys and values (b, g, k, d) of the layer to reuse.
            key_value_states: (b, k, kv_dim) to take keys and values from: another layer's input, or with ``kv_dim`` another sequence, which is seen as a whole.
            needs_weights: also return the attention weights.

        Returns:
            Output (b, s, d_model); weights (b, h, s, k) or None; the cache entry or None; keys and values (b, g, k, d) that were attended to.
        """
        inputs = inputs or AttentionInputs()
        mask = inputs.mask_without_alibi if self.settings.nope else inputs.mask
        if self.settings.kv_dim is not None and key_value_states is not None:
            mask = AttentionMask(is_causal=False)
        query, key, value = self._project(x, key_value_states)
        query = self._position(query, inputs)
        present: KeyValue | tuple[()] | None = None
        if self.reuses_kv:
            if prev_layer_key_value is None:
                raise ValueError(
                    f'layer {self.layer_idx} reuses the keys and values of layer {self.settings.reuse_kv_layer_idx}, but prev_layer_key_value was not given'
                )
            key, value = prev_layer_key_value
            present = None if past_key_value is None else ()
        else:
            key = self._position(key, inputs, is_key=True).transpose(1, 2)
            key, value, present = self._update_cache(key, value.transpose(1, 2), inputs.cache, past_key_value)
        context, weights, _ = self.attn_fn(
            query.transpose(1, 2),
            key,
            value,
            self.n_heads,
            self.kv_n_heads,
            mask=mask,
            softmax_scale=self.softmax_scale,
            dropout_p=self.settings.attn_pdrop,
            training=self.training,
            needs_weights=needs_weights,
            attn_logit_softcapping=self.settings.attn_logit_softcapping,
            sliding_window_size=self.settings.sliding_window_size,
            flash_attn_padding_info=inputs.flash_attn_padding_info,
        )
        return self.out_proj(context), weights, present, (key, value)

    def _project(self, x: torch.Tensor, key_value_states: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Clipped and normed query (b, s, h, d), key and value (b, k, g, d); the latter two are empty when another layer's are reused."""
        kv_features = self.kv_n_heads * self.head_dim
        if self.is_fused:
            qkv = self._clip(self.Wqkv(x))
            query, key, value = qkv.split([self.n_heads * self.head_dim, kv_features, kv_features], dim=-1)
        else:
            query = self._clip(self.Wq(x))
            if self.reuses_kv:
                key = value = query[..., :0]
            else:
                source = x if key_value_states is None else key_value_states
                key, value = self._clip(self.Wk(source)), self._clip(self.Wv(source))
        is_per_head, has_norm = self.settings.qk_gn, hasattr(self, 'q_ln')
        query = self._to_heads(self.q_ln(query), self.n_heads, query) if has_norm and not is_per_head else self._to_heads(query, self.n_heads)
        if self.reuses_kv:
            return (self.q_ln(query).to(value.dtype) if is_per_head else query), key, value
        key = self._to_heads(self.k_ln(key), self.kv_n_heads, key) if has_norm and not is_per_head else self._to_heads(key, self.kv_n_heads)
        if is_per_head:
            query, key = self.q_ln(query).to(value.dtype), self.k_ln(key).to(value.dtype)
        return query, key, self._to_heads(value, self.kv_n_heads)

    def _to_heads(self, x: torch.Tensor, n_heads: int, like: torch.Tensor | None = None) -> torch.Tensor:
        """(b, s, n * d) -> (b, s, n, d), in the type of ``like``: norms in fp32 must not make the attention fp32."""
        x = x if like is None else x.to(like.dtype)
        return x.view(x.shape[0], x.shape[1], n_heads, self.head_dim)

    def _clip(self, x: torch.Tensor) -> torch.Tensor:
        limit = self.settings.clip_qkv
        return x.clamp(min=-limit, max=limit) if limit else x

    def _position(self, x: torch.Tensor, inputs: AttentionInputs, is_key: bool = False) -> torch.Tensor:
        """Rotates queries and keys, and scales queries by the attention temperature, (b, s, n, d)."""
        if inputs.rotary is not None and not self.settings.nope:
            x = apply_rotary(x, inputs.rotary, is_key)
        tuning = self.settings.attn_temperature_tuning
        if tuning and tuning['attn_scale'] and not is_key:
            x = apply_temperature_tuning(x, tuning['floor_scale'], tuning['attn_scale'], inputs.position_ids)
        return x

    def _update_cache(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: Cache | None,
        past: KeyValue | tuple[()] | None,
    ) -> tuple[torch.Tensor, torch.Tensor, KeyValue | None]:
        """Joins cached and new (b, g, s, d). Returns all keys, all values, and the entry of a tuple cache, in the layout of the implementation."""
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
            return key, value, None
        if past is None:
            return key, value, None
        if self.attn_impl == 'torch':
            if len(past) != 0:
                key, value = torch.cat([past[0].transpose(-1, -2), key], dim=2), torch.cat([past[1], value], dim=2)
            return key, value, (key.transpose(-1, -2), value)
        flat_key, flat_value = (x.transpose(1, 2).flatten(2) for x in (key, value))
        if len(past) != 0:
            flat_key, flat_value = torch.cat([past[0], flat_key], dim=1), torch.cat([past[1], flat_value], dim=1)
        key, value = (x.unflatten(2, (self.kv_n_heads, self.head_dim)).transpose(1, 2) for x in (flat_key, flat_value))
        return key, value, (flat_key, flat_value)


class MultiheadAttention(GroupedQueryAttention):
    """Attention with one key/value head per query head."""

    def __init__(self, d_model: int, n_heads: int, **settings: Any) -> None:
        super().__init__(d_model, n_heads, kv_n_heads=n_heads, **settings)


class MultiQueryAttention(GroupedQueryAttention):
    """Attention with one key/value head for all query heads (Shazeer 2019, https://arxiv.org/abs/1911.02150)."""

    def __init__(self, d_model: int, n_heads: int, **settings: Any) -> None:
        super().__init__(d_model, n_heads, kv_n_heads=1, **settings)


def _head_splits(n_heads: int, head_dim: int) -> list[int]:
    """Rows where each head after the first begins, so that heads are initialised one by one."""
    return [i * head_dim for i in range(1, n_heads)]
