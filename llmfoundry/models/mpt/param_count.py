"""Parameters of an MPT model, and the floating point operations that training on a sequence takes.

Counts use the whole shape of sharded parameters. FLOPs are those of the matrix products that the model needs, not what checkpointing
recomputes ("model FLOPs", https://arxiv.org/abs/2204.02311, appendix B), so that utilisations compare.
"""

from __future__ import annotations

import warnings
from typing import Any, Iterator

from torch import nn

__all__ = ['attention_flops_per_sequence', 'flops_per_sequence', 'flops_per_token', 'n_active_params', 'n_params', 'n_trainable_params']


def n_params(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(param.numel() for param in model.parameters())


def n_trainable_params(model: nn.Module) -> int:
    """Number of parameters that get a gradient."""
    return sum(param.numel() for param in model.parameters() if param.requires_grad)


def _expert_params(model: nn.Module) -> Iterator[nn.Parameter]:
    """The stacked weights of experts (``moe`` and megablocks name them alike)."""
    for module in model.modules():
        if isinstance(getattr(module, 'w1', None), nn.Parameter) and isinstance(getattr(module, 'w2', None), nn.Parameter):
            yield from (param for name in ('w1', 'v1', 'w2') if (param := getattr(module, name, None)) is not None)


def n_active_params(model: nn.Module, config: Any) -> int:
    """Number of parameters that one token meets: of ``moe_num_experts`` experts only ``moe_top_k`` count.

    Args:
        model: an MPT model, or one whose experts are stacked in the same way (DBRX).
        config: its config.
    """
    ffn_config = config.ffn_config or {}
    if not isinstance(ffn_config, dict):
        ffn_config = ffn_config.to_dict()
    n_experts, top_k = ffn_config.get('moe_num_experts'), ffn_config.get('moe_top_k', 1)
    if not n_experts:
        return n_params(model)
    n_expert_params = sum(param.numel() for param in _expert_params(model))
    # Expert parallelism leaves each rank moe_world_size times fewer of the experts.
    n_all_expert_params = n_expert_params * (ffn_config.get('moe_world_size') or 1)
    return n_params(model) - n_expert_params + n_all_expert_params * top_k // n_experts


def attention_flops_per_sequence(config: Any, seq_len: int) -> int:
    """Forward FLOPs of the two attention products of every layer: ``2 products * 2 * (n_heads * head_dim) * seq_len * window``.

    The causal mask is not discounted, as is the custom of the published MFU tables; a sliding window is.
    """
    head_dim = config.head_dim or config.d_model // config.n_heads
    window = config.attn_config.get('sliding_window_size', -1)
    keys = seq_len if window is None or window < 0 else min(seq_len, window)
    return config.n_layers * 2 * 2 * config.n_heads * head_dim * seq_len * keys


def flops_per_sequence(model: nn.Module, config: Any, seq_len: int) -> int:
    """Training FLOPs of one sequence: ``6 * active parameters * tokens`` plus three times the attention products (forward once, backward twice).

    An embedding that is not tied to the head is a lookup without arithmetic, so its parameters do not count.

    Args:
        model: an MPT model.
        config: its MPTConfig.
        seq_len: tokens of the sequence, padding included.

    Returns:
        The FLOPs; 0 with a warning when ``block_overrides`` make layers differ, for which the formula does not hold.
    """
    if config.block_overrides is not None:
        warnings.warn('FLOPs are not counted for models with block_overrides: 0 is reported, so there is no MFU')
        return 0
    n_matmul_params = n_active_params(model, config)
    if not config.tie_word_embeddings:
        n_matmul_params -= config.vocab_size * config.d_model
    return 3 * (2 * n_matmul_params * seq_len + attention_flops_per_sequence(config, seq_len))


def flops_per_token(model: nn.Module, config: Any, seq_len: int) -> float:
    """``flops_per_sequence`` over the tokens of the sequence."""
    return flops_per_sequence(model, config, seq_len) / seq_len
