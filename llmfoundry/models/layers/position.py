"""Positions: alibi slopes and biases, rotary embeddings with all their scalings, and attention temperature.

Rotary tables are computed once per forward, in fp32, from plain numbers: no buffer exists, so a model built on the meta device, loaded by any
version of transformers, or cast to bf16 has exact tables. The alternative, a buffer of inverse frequencies, has been lost or rounded in each
of these cases. The price is one (seq, head_dim/2) cosine per forward.

Both implementations, ``dail`` (named after the flash-attn library) and ``hf`` (after transformers), rotate the two halves of the head dimension and give
the same numbers; they differ in what they can scale: ``dail`` has xpos, ``hf`` has linear, dynamic and llama3.

Shapes: b batch, s sequence, h heads, d head_dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

__all__ = [
    'DailRotaryEmbedding',
    'LlamaRotaryEmbeddingFoundry',
    'PartialLlamaConfig',
    'RotaryTables',
    'apply_rotary',
    'apply_temperature_tuning',
    'build_alibi_bias',
    'gen_rotary_embedding',
    'gen_slopes',
]


def gen_slopes(n_heads: int, alibi_bias_max: int = 8, device: torch.device | str | None = None, return_1d: bool = False) -> torch.Tensor:
    """Slopes of alibi (Press et al. 2022, https://arxiv.org/abs/2108.12409, section 3), one per head, in fp32.

    For a number of heads that is no power of two, the slopes of the next power of two are taken, every second one first.

    Returns:
        (1, n_heads, 1, 1), or (n_heads,) with ``return_1d``.
    """
    power = 2 ** math.ceil(math.log2(n_heads))
    exponents = torch.arange(1, power + 1, dtype=torch.float32, device=device) * (alibi_bias_max / power)
    slopes = 1.0 / torch.pow(2, exponents)
    if power != n_heads:
        slopes = torch.cat([slopes[1::2], slopes[::2]])[:n_heads]
    return slopes if return_1d else slopes.view(1, n_heads, 1, 1)


def build_alibi_bias(
    n_heads: int,
    seq_len: int,
    full: bool = False,
    alibi_bias_max: int = 8,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Alibi bias of keys relative to the last position, or with ``full`` to each query.

    Returns:
        (1, n_heads, 1, seq_len); with ``full`` (1, n_heads, seq_len, seq_len), holding ``-slope * |i - j|``.
    """
    positions = torch.arange(1 - seq_len, 1, dtype=torch.float32, device=device).view(1, 1, 1, seq_len)
    if full:
        positions = -(positions - positions.view(1, 1, seq_len, 1)).abs()
    bias = positions * gen_slopes(n_heads, alibi_bias_max, device)
    return bias if dtype is None else bias.to(dtype)


def apply_temperature_tuning(query: torch.Tensor, floor_scale: float, attn_scale: float, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """Scales queries by ``1 + attn_scale * log(1 + floor((position + 1) / floor_scale))``, the attention temperature of Llama 4.

    Args:
        query: (b, s, ...).
        floor_scale: tokens per step of the scale.
        attn_scale: 0 switches it off.
        position_ids: (1 or b, s); default 0 ... s - 1.
    """
    if attn_scale == 0.0:
        return query
    if position_ids is None:
        position_ids = torch.arange(query.shape[1], device=query.device)[None]
    scale = torch.log1p(torch.floor((position_ids.float() + 1.0) / floor_scale)) * attn_scale + 1.0
    return query * scale.to(query.dtype).view(*scale.shape, *[1] * (query.dim() - 2))


class RotaryTables:
    """Cosines and sines of one forward.

    A plain class and not a dataclass: sharded training casts tensors inside dataclass arguments to bf16, and these must stay fp32.

    Attributes:
        cos, sin: (1 or b, s, 1, d/2), fp32.
        xpos: (1 or b, s, 1, d/2) factor on queries and its inverse on keys, or None.
    """

    def __init__(self, angles: torch.Tensor, xpos: torch.Tensor | None = None) -> None:
        self.cos, self.sin = angles.cos()[:, :, None], angles.sin()[:, :, None]
        self.xpos = None if xpos is None else xpos[:, :, None]


def apply_rotary(x: torch.Tensor, tables: RotaryTables, is_key: bool = False) -> torch.Tensor:
    """Rotates (b, s, h, d) by halves: ``(x1 cos - x2 sin, x2 cos + x1 sin)`` (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""
    cos, sin = tables.cos, tables.sin
    if tables.xpos is not None:
        scale = 1.0 / tables.xpos if is_key else tables.xpos
        cos, sin = cos * scale, sin * scale
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _inverse_frequencies(theta: float, dim: int, device: torch.device | None) -> torch.Tensor:
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim))


class PartialLlamaConfig:
    """The rotary settings under the names of transformers' Llama config; anything else that is read is an error, not a default."""

    _allowed = ('rope_theta', 'rope_scaling', 'head_dim', 'max_position_embeddings')

    def __init__(
        self,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        head_dim: int = 64,
        max_position_embeddings: int = 2048,
    ) -> None:
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        self.head_dim, self.max_position_embeddings = head_dim, max_position_embeddings

    def __getattr__(self, key: str) -> Any:
        raise AttributeError(f'PartialLlamaConfig holds rotary settings only ({", ".join(self._allowed)}); {key!r} was read')


class LlamaRotaryEmbeddingFoundry(nn.Module):
    """Rotary angles of transformers' Llama, with its scalings ``no_scaling``, ``linear``, ``dynamic`` and ``llama3``.

    Computed here, from the same formulas, since the signature of transformers' own class changed with every second release.
    """

    def __init__(self, config: PartialLlamaConfig) -> None:
        super().__init__()
        self.theta, self.dim, self.max_seq_len = float(config.rope_theta), config.head_dim, config.max_position_embeddings
        self.scaling = dict(config.rope_scaling or {'type': 'no_scaling', 'factor': 1.0})
        self.scaling_type = self.scaling.get('rope_type', self.scaling.get('type', 'no_scaling'))
        if self.scaling_type == 'llama3':
            missing = [k for k in ('low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings') if k not in self.scaling]
            if missing:
                raise ValueError(f'attn_config.rope_hf_config: type llama3 also needs {", ".join(missing)}')

    def inverse_frequencies(self, seq_len: int, device: torch.device | None = None) -> torch.Tensor:
        """Scaled inverse frequencies (d/2,) for a sequence of ``seq_len`` tokens including the cached ones."""
        theta, factor = self.theta, float(self.scaling.get('factor', 1.0))
        if self.scaling_type == 'dynamic' and seq_len > self.max_seq_len:
            theta *= ((factor * seq_len / self.max_seq_len) - (factor - 1)) ** (self.dim / (self.dim - 2))
        frequencies = _inverse_frequencies(theta, self.dim, device)
        if self.scaling_type == 'linear':
            return frequencies / factor
        return self._llama3(frequencies, factor) if self.scaling_type == 'llama3' else frequencies

    def _llama3(self, frequencies: torch.Tensor, factor: float) -> torch.Tensor:
        """Divides low frequencies by ``factor``, keeps high ones, interpolates between (Llama 3.1)."""
        low, high = self.scaling['low_freq_factor'], self.scaling['high_freq_factor']
        context = self.scaling['original_max_position_embeddings']
        wavelengths = 2 * math.pi / frequencies
        smooth = (context / wavelengths - low) / (high - low)
        between = (1 - smooth) * frequencies / factor + smooth * frequencies
        scaled = torch.where(wavelengths > context / low, frequencies / factor, frequencies)
        is_between = (wavelengths <= context / low) & (wavelengths >= context / high)
        return torch.where(is_between, between, scaled)

    def forward(self, position_ids: torch.Tensor, seq_len: int) -> RotaryTables:
        """Tables for ``position_ids`` (1 or b, s)."""
        with torch.autocast(position_ids.device.type, enabled=False):
            return RotaryTables(position_ids[..., None].float() * self.inverse_frequencies(seq_len, position_ids.device))


class DailRotaryEmbedding(nn.Module):
    """Rotary angles of flash-attn's ``RotaryEmbedding``, with xpos (Sun et al. 2022, https://arxiv.org/abs/2212.10554) when ``scale_base`` is given.

    The centre of xpos is ``max_seq_len // 2`` and not half of the current length, so that cached keys and full forwards agree; only differences of
    positions matter in between.
    """

    def __init__(self, dim: int, theta: float, max_seq_len: int, scale_base: float | None = None) -> None:
        super().__init__()
        self.dim, self.theta, self.max_seq_len, self.scale_base = dim, float(theta), max_seq_len, scale_base

    def forward(self, position_ids: torch.Tensor, seq_len: int) -> RotaryTables:
        """Tables for ``position_ids`` (1 or b, s)."""
        with torch.autocast(position_ids.device.type, enabled=False):
            angles = position_ids[..., None].float() * _inverse_frequencies(self.theta, self.dim, position_ids.device)
            if self.scale_base is None:
                return RotaryTables(angles)
            base = (torch.arange(0, self.dim, 2, device=angles.device).float() + 0.4 * self.dim) / (1.4 * self.dim)
            power = (position_ids.float() - self.max_seq_len // 2) / self.scale_base
            return RotaryTables(angles, xpos=base ** power[..., None])


def gen_rotary_embedding(
    rope_impl: str,
    rope_theta: float,
    rope_dail_config: dict[str, Any],
    rope_hf_config: dict[str, Any],
    max_seq_len: int,
    d_model: int | None = None,
    n_heads: int | None = None,
    rope_head_dim: int | None = None,
) -> nn.Module:
    """Builds the rotary module that ``attn_config`` describes.

    Args:
        rope_head_dim: features per head; default ``d_model // n_heads``.

    Raises:
        ValueError: an unknown ``rope_impl``, or no head dimension.
    """
    if rope_head_dim is None:
        if d_model is None or n_heads is None:
            raise ValueError('give either rope_head_dim, or both d_model and n_heads')
        rope_head_dim = d_model // n_heads
    if rope_impl == 'dail':
        scale_base = rope_dail_config.get('xpos_scale_base', 512) if rope_dail_config.get('type') == 'xpos' else None
        return DailRotaryEmbedding(rope_head_dim, rope_theta, max_seq_len, scale_base)
    if rope_impl == 'hf':
        scaling = {('rope_type' if key == 'type' else key): value for key, value in rope_hf_config.items()}
        return LlamaRotaryEmbeddingFoundry(PartialLlamaConfig(rope_theta, scaling, rope_head_dim, max_seq_len))
    raise ValueError(f'attn_config.rope_impl must be dail or hf, got {rope_impl!r}')
