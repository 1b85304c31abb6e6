"""The ``model`` block of ``mpt_causal_lm``: every key, type and default, without importing torch.

``MPTConfig`` holds the same keys at run time; a test keeps the two equal. The block exists twice in this sense because validation must not import
transformers (seconds) and the exported ``MPTConfig`` must not import pydantic.
"""

from __future__ import annotations

from typing import Any, Literal

from llmfoundry.config.base import Block

__all__ = ['AttnBlock', 'FfnBlock', 'InitBlock', 'MPT_SUB_BLOCKS', 'MPTBlock']

Number = int | float


class AttnBlock(Block):
    """``model.attn_config``."""

    attn_type: str = 'multihead_attention'
    """Name from the attention_classes registry."""
    attn_pdrop: float = 0.0
    """Dropout probability of attention weights; off, as pretraining sees each token about once."""
    attn_impl: str = 'flash'
    """``flash`` (flash-attn, else torch's fused kernel) or ``torch`` (bias tensor)."""
    qk_ln: bool = False
    """Layer norm of queries and keys over all heads together."""
    qk_gn: bool = False
    """Layer norm of queries and keys per head."""
    fused_qkv: bool = True
    """One projection Wqkv rather than Wq, Wk, Wv."""
    clip_qkv: Number | None = None
    """Clamps queries, keys and values to [-x, x]; null does not."""
    softmax_scale: float | None = None
    """Factor on the logits; null is 1/sqrt(d_model/n_heads)."""
    attn_uses_sequence_id: bool = False
    """Packed documents do not attend to each other."""
    sliding_window_size: int = -1
    """Tokens to the left that a query sees; -1 sees all."""
    attn_logit_softcapping: Number | None = None
    """Caps logits softly at this value; null does not."""
    alibi: bool = False
    """Linear biases by distance instead of position embeddings."""
    alibi_bias_max: int = 8
    """Largest exponent of the ALiBi slopes, as in the paper."""
    rope: bool = False
    """Rotary position embeddings."""
    rope_theta: Number = 10000
    """Base of the rotary frequencies, as in the paper."""
    rope_impl: Literal['dail', 'hf'] = 'dail'
    """Which rotary implementation and scalings apply."""
    rope_dail_config: dict[str, Any] = {'type': 'original', 'pos_idx_in_fp32': True, 'xpos_scale_base': 512}
    """Options of rope_impl dail: type original or xpos."""
    rope_hf_config: dict[str, Any] = {'type': 'no_scaling', 'factor': 1.0}
    """Options of rope_impl hf: type no_scaling, linear, dynamic or llama3, and their keys."""
    nope: bool = False
    """No position information in a layer; only through block_overrides."""
    attn_temperature_tuning: dict[str, Any] = {'floor_scale': 8192, 'attn_scale': 0.0}
    """Query scaling by position for long contexts; attn_scale 0.0 is off."""
    kv_dim: int | None = None
    """Width of the key/value input for cross attention; null is d_model."""
    kv_n_heads: int | None = None
    """Key/value heads of grouped-query attention."""
    seq_parallel_world_size: int | None = None
    """Ranks that share a sequence; only 1 is supported."""


class FfnBlock(Block):
    """``model.ffn_config``; mixture-of-experts types take more keys."""

    ffn_type: str = 'mptmlp'
    """Name from the ffns registries."""
    ffn_hidden_size: int | None = None
    """Inner width; null is expansion_ratio * d_model."""
    ffn_act_fn: dict[str, Any] | None = None
    """``name`` of a function in torch.nn.functional plus its arguments; null is exact gelu."""
    moe_num_experts: int | None = None
    """Number of experts."""
    moe_top_k: int | None = None
    """Experts per token."""
    mlp_type: Literal['mlp', 'glu'] | None = None
    """Kind of each expert."""
    moe_jitter_eps: float | None = None
    """Relative noise on the router's input in training; null is none."""
    moe_normalize_expert_weights: Number | None = None
    """Order of the norm by which the chosen weights are divided; null does not."""
    uniform_expert_assignment: bool | None = None
    """Sends tokens to experts in turn, for benchmarks."""
    moe_world_size: int | None = None
    """Ranks over which experts are spread."""
    moe_loss_weight: float | None = None
    """Weight of the load-balancing loss."""


class InitBlock(Block):
    """``model.init_config``."""

    name: str = 'kaiming_normal_'
    """Name from the param_init_fns registry."""
    fan_mode: str = 'fan_in'
    """Which fan the kaiming functions use."""
    init_nonlinearity: str = 'relu'
    """Activation whose gain the kaiming functions use."""
    init_div_is_residual: bool | Number | str = True
    """Divides residual projections by sqrt(2 * n_layers) (true), by this number, or not (false)."""
    emb_init_std: Number | None = None
    """Standard deviation of a normal initialisation of embeddings; wins over the uniform one."""
    emb_init_uniform_lim: Number | list[Number] | None = None
    """Limits of a uniform initialisation of embeddings: x for [-x, x], or [low, high]."""
    init_std: Number | None = None
    """Standard deviation of baseline_."""
    init_gain: Number = 0.0
    """Gain of the xavier and kaiming functions."""


class MPTBlock(Block):
    """``model`` with ``name: mpt_causal_lm``."""

    name: str = 'mpt_causal_lm'
    """Name from the models registry."""
    d_model: int = 2048
    """Width of the residual stream; divisible by n_heads."""
    n_heads: int = 16
    """Attention heads."""
    n_layers: int = 24
    """Blocks."""
    head_dim: int | None = None
    """Size of a head; null is d_model / n_heads."""
    expansion_ratio: Number = 4
    """Inner width of the feed-forward block relative to d_model."""
    max_seq_len: int = 2048
    """Longest sequence in tokens."""
    vocab_size: int = 50368
    """Rows of the embedding: gpt-neox-20b's 50277 tokens, padded to a multiple of 128 for the matrix units."""
    resid_pdrop: float = 0.0
    """Dropout probability on the residual stream."""
    emb_pdrop: float = 0.0
    """Dropout probability on the embeddings."""
    learned_pos_emb: bool = True
    """Learned position embeddings; off by itself with alibi or rope."""
    attn_config: AttnBlock | None = None
    """Attention."""
    ffn_config: FfnBlock | None = None
    """Feed-forward block."""
    init_config: InitBlock | None = None
    """Initialisation."""
    init_device: Literal['cpu', 'meta', 'mixed'] = 'cpu'
    """Where weights are made: meta needs none until they are sharded."""
    logit_scale: Number | str | None = None
    """Factor on the logits, or ``inv_sqrt_d_model``."""
    no_bias: bool = False
    """No bias in any layer."""
    attention_bias: bool | None = None
    """Bias of the query, key and value projections, whatever no_bias says."""
    embedding_fraction: float = 1.0
    """Share of the gradient that reaches the embeddings, in (0, 1]."""
    norm_type: str = 'low_precision_layernorm'
    """Name from the norms registry, in any case."""
    norm_eps: float = 1e-5
    """Added to the variance."""
    use_cache: bool = False
    """Returns keys and values for generation; off, since training has no use for them."""
    fc_type: str | dict[str, Any] = 'torch'
    """Name from the fcs registry, or ``name`` plus arguments."""
    tie_word_embeddings: bool = True
    """Uses the embedding as output head."""
    use_pad_tok_in_ffn: bool = True
    """Runs the feed-forward block over padding too; false removes padding around it."""
    block_overrides: dict[str, Any] | None = None
    """Layers that differ: ``order``, ``overrides`` and ``repeat``."""
    final_logit_softcapping: Number | None = None
    """Caps the output logits softly at this value."""

    # Of the Composer model around it
    loss_fn: Literal['fused_crossentropy', 'torch_crossentropy'] = 'fused_crossentropy'
    """fused_crossentropy never holds the full logits matrix; torch_crossentropy does."""
    use_train_metrics: bool = True
    """Computes metrics on training batches too."""
    additional_train_metrics: list[str] | None = None
    """More metrics from the metrics registry."""
    additional_eval_metrics: list[str] | None = None
    """More metrics from the metrics registry, on evaluation data."""

    # Read by builders
    activation_checkpointing_target: str | list[Any] | dict[str, Any] | None = None
    """Which parts are recomputed in the backward pass; null is whole blocks."""
    master_weights_dtype: Literal['f16', 'float16', 'bf16', 'bfloat16'] | None = None
    """Type of the stored weights; null is float32."""


MPT_SUB_BLOCKS: dict[str, type[Block]] = {'attn_config': AttnBlock, 'ffn_config': FfnBlock, 'init_config': InitBlock}
MPT_COMPOSER_KEYS = frozenset({'name', 'loss_fn', 'use_train_metrics', 'additional_train_metrics', 'additional_eval_metrics', 'activation_checkpointing_target', 'master_weights_dtype'})
