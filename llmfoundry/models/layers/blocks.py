"""The transformer block of MPT: norm, attention, residual; norm, feed-forward, residual (pre-norm, as in GPT-2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from llmfoundry.models.layers.attention import AttentionInputs
from llmfoundry.models.layers.layer_builders import build_attention_layer, build_ffn, build_norm

__all__ = ['BlockOutput', 'MPTBlock']


class BlockOutput(NamedTuple):
    """What a block returns.

    Attributes:
        hidden: (b, s, d_model).
        weights: attention weights (b, h, s, k), or None.
        past_key_value: this layer's entry of a tuple cache, or None.
        key_value: keys and values (b, g, k, d) for layers that reuse them, or None.
        attn_input: normed input (b, s, d_model) for layers that reuse it, or None.
    """

    hidden: torch.Tensor
    weights: torch.Tensor | None = None
    past_key_value: tuple[torch.Tensor, ...] | None = None
    key_value: tuple[torch.Tensor, torch.Tensor] | None = None
    attn_input: torch.Tensor | None = None


class MPTBlock(nn.Module):
    """One layer.

    Args:
        d_model: width of the residual stream.
        n_heads: query heads.
        expansion_ratio: hidden size of the feed-forward block over ``d_model``.
        attn_config: ``attn_type`` and that attention class's arguments.
        ffn_config: ``ffn_type`` and that block's arguments.
        norm: ``norm_type`` and ``norm_eps``.
        resid_pdrop: dropout on both branches.
        no_bias: linear layers without bias.
        device: where parameters are created.
        use_pad_tok_in_ffn: False drops padding tokens before the feed-forward block.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        expansion_ratio: float,
        attn_config: dict[str, Any],
        ffn_config: dict[str, Any],
        norm: dict[str, Any],
        resid_pdrop: float = 0.0,
        no_bias: bool = False,
        device: str | None = None,
        use_pad_tok_in_ffn: bool = True,
    ) -> None:
        super().__init__()
        attn_kwargs = {**attn_config, 'd_model': d_model, 'n_heads': n_heads, 'bias': not no_bias, 'device': device, **norm}
        ffn_kwargs = dict(ffn_config)
        self.norm_1 = build_norm(norm['norm_type'], d_model, norm['norm_eps'], device)
        self.attn = build_attention_layer(attn_kwargs.pop('attn_type'), attn_kwargs)
        ffn = build_ffn(ffn_kwargs.pop('ffn_type'), d_model, expansion_ratio, device, not no_bias, ffn_kwargs)
        self.norm_2 = None if getattr(ffn, '_has_norm', False) else build_norm(norm['norm_type'], d_model, norm['norm_eps'], device)
        self.ffn = ffn
        # An Identity where there is nothing to drop: Dropout(0) would still draw and keep a mask.
        self.resid_attn_dropout = nn.Dropout(resid_pdrop) if resid_pdrop else nn.Identity()
        self.resid_ffn_dropout = nn.Dropout(resid_pdrop) if resid_pdrop else nn.Identity()
        self.use_pad_tok_in_ffn = use_pad_tok_in_ffn
        # Set by the model where a later layer reuses something of this one; otherwise nothing is kept alive.
        self.is_key_value_reused = False
        self.is_attn_input_reused = False

    def forward(
        self,
        x: torch.Tensor,
        inputs: AttentionInputs | None = None,
        past_key_value: tuple[torch.Tensor, ...] | None = None,
        prev_layer_key_value: tuple[torch.Tensor, torch.Tensor] | None = None,
        x_prev: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> BlockOutput:
        """Applies the layer.

        Args:
            x: (b, s, d_model).
            inputs: masks and tables of this forward; default plain causal attention.
            past_key_value: this layer's entry of a tuple cache; None without one.
            prev_layer_key_value: keys and values of the layer that this one reuses.
            x_prev: normed input of the layer that this one reuses.
            output_attentions: also return the attention weights.
        """
        inputs = inputs or AttentionInputs()
        normed = self.norm_1(x)
        context, weights, present, key_value = self.attn(
            normed,
            inputs,
            past_key_value=past_key_value,
            prev_layer_key_value=prev_layer_key_value,
            key_value_states=x_prev,
            needs_weights=output_attentions,
        )
        x = x + self.resid_attn_dropout(context)
        x = x + self.resid_ffn_dropout(self._apply_ffn(x, inputs.token_mask))
        return BlockOutput(
            x,
            weights,
            present,
            key_value if self.is_key_value_reused else None,
            normed if self.is_attn_input_reused else None,
        )

    def _apply_ffn(self, x: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        """Norm and feed-forward; without padding tokens if ``use_pad_tok_in_ffn`` is False, whose output is then 0."""
        normed = x if self.norm_2 is None else self.norm_2(x)
        if self.use_pad_tok_in_ffn or token_mask is None:
            return self.ffn(normed)
        out = self.ffn(normed[token_mask])
        return torch.zeros(*x.shape[:-1], out.shape[-1], dtype=out.dtype, device=x.device).masked_scatter(token_mask[..., None], out)
