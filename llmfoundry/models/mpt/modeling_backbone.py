"""The MPT backbone: embedding, blocks, final norm, and what both MPT models share.

Masks and positions are settled once per forward (``attention_inputs``) and handed to every block; keys, values and inputs that later layers reuse are passed from block to
block, never stored on modules, so that recomputation and sharding see plain tensors.

Shapes: b batch, s new tokens, k cached and new tokens.
"""

from __future__ import annotations

from typing import Any, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from llmfoundry.models.act_ckpt import mark_activation_checkpointing, should_checkpoint, should_wrap_fsdp
from llmfoundry.models.layers.attention import AttentionInputs
from llmfoundry.models.layers.blocks import BlockOutput, MPTBlock
from llmfoundry.models.layers.embedding import SharedEmbedding
from llmfoundry.models.layers.layer_builders import build_norm
from llmfoundry.models.layers.megablocks_args import config_moe_args
from llmfoundry.models.layers.position import gen_rotary_embedding, gen_slopes
from llmfoundry.models.mpt.attention_inputs import build_mask, check_sequence_id, flash_padding_info_for, gen_position_ids, is_left_padded
from llmfoundry.models.mpt.configuration_mpt import MPTConfig
from llmfoundry.models.param_init import get_param_init_fn

__all__ = ['MPTModel', 'MPTPreTrainedModel', 'past_length']

# Keys of attn_config that the model uses itself; all others are arguments of the attention class.
_MODEL_ATTN_KEYS = (
    'attn_uses_sequence_id',
    'alibi',
    'alibi_bias_max',
    'rope',
    'rope_theta',
    'rope_impl',
    'rope_dail_config',
    'rope_hf_config',
)


class MPTPreTrainedModel(PreTrainedModel):
    """What both MPT models share: initialisation, sharding and checkpointing hooks."""

    config_class = MPTConfig
    base_model_prefix = 'transformer'
    _no_split_modules = ['MPTBlock']
    _supports_cache_class = True

    def param_init_fn(self, module: nn.Module) -> None:
        """Initialises the parameters that ``module`` itself holds, as ``init_config`` says. FSDP calls it to materialise a meta model."""
        get_param_init_fn(self.config.init_config, self.config.n_layers, self.config.d_model)(module)

    def _init_weights(self, module: nn.Module) -> None:
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            return
        self.param_init_fn(module)

    def fsdp_wrap_fn(self, module: nn.Module) -> bool | dict[str, Any]:
        """Whether FSDP shards ``module`` as a unit of its own."""
        return should_wrap_fsdp(module, MPTBlock)

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        """Whether the activations of ``module`` are recomputed, see ``activation_checkpointing_target``."""
        return should_checkpoint(module)


class MPTModel(MPTPreTrainedModel):
    """Embedding, blocks and final norm."""

    def __init__(self, config: MPTConfig) -> None:
        super().__init__(config)
        device = None if config.init_device in ('cpu', 'mixed') else config.init_device
        attn = config.attn_config
        self.wte = SharedEmbedding(config.vocab_size, config.d_model, device=device)
        if config.learned_pos_emb:
            self.wpe = nn.Embedding(config.max_seq_len, config.d_model, device=device)
        self.emb_drop = nn.Dropout(config.emb_pdrop) if config.emb_pdrop else nn.Identity()
        ffn_config = config_moe_args(config.ffn_config, config.d_model, config.expansion_ratio, config.n_layers)
        self.blocks = nn.ModuleList(_build_block(config, index, layer, ffn_config, device) for index, layer in enumerate(config.layer_attn_configs))
        self.norm_f = build_norm(config.norm_type, config.d_model, config.norm_eps, device)
        self.rotary_embedding = None
        if attn['rope']:
            rope = {key: attn[key] for key in ('rope_impl', 'rope_theta', 'rope_dail_config', 'rope_hf_config')}
            head_dim = config.head_dim or config.d_model // config.n_heads
            self.rotary_embedding = gen_rotary_embedding(**rope, max_seq_len=config.max_seq_len, rope_head_dim=head_dim)
        self._needs_positions = (
            attn['rope'] or config.learned_pos_emb or any(c['attn_temperature_tuning']['attn_scale'] for c in config.layer_attn_configs)
        )
        self._reused_layers = _mark_reuse(self.blocks)
        if config.no_bias:
            _drop_biases(self)
        mark_activation_checkpointing(list(self.blocks), getattr(config, 'activation_checkpointing_target', None))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.wte = value

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | Sequence[tuple[torch.Tensor, ...]] | None = None,
        attention_mask: torch.Tensor | None = None,
        sequence_id: torch.LongTensor | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        use_cache: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
    ) -> BaseModelOutputWithPast:
        """Applies the backbone.

        Args:
            input_ids: (b, s); or give ``inputs_embeds``.
            past_key_values: a ``Cache``, or one entry per layer as an earlier forward returned.
            attention_mask: (b, k), nonzero at real tokens.
            sequence_id: (b, k) ids of packed documents.
            return_dict: only True.
            output_attentions: return the attention weights; ``attn_impl`` torch only.
            output_hidden_states: return the input of every block and the output of the last.
            use_cache: return ``past_key_values``; default from the config.
            inputs_embeds: (b, s, d_model).
            position_ids: (1 or b, s); default from ``attention_mask`` and ``sequence_id``.

        Returns:
            ``last_hidden_state`` (b, s, d_model), and what was asked for.

        Raises:
            ValueError: contradicting or ill-shaped inputs.
            NotImplementedError: ``return_dict`` False, padding on the left in training, or weights from ``flash``.
            AssertionError: more tokens than ``max_seq_len``.
        """
        self._check_arguments(input_ids, inputs_embeds, return_dict, output_attentions)
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values if isinstance(past_key_values, Cache) else None
        if getattr(cache, 'is_compileable', False):
            raise NotImplementedError(
                f'MPT needs a cache that grows, got {type(cache).__name__}; leave cache_implementation out or set it to dynamic'
            )
        layer_pasts = self._layer_pasts(None if cache is not None else past_key_values, use_cache and cache is None)
        past_len = past_length(cache, layer_pasts, self.config.attn_config['attn_impl'])
        inputs = self._attention_inputs(x, past_len, attention_mask, sequence_id, position_ids)
        inputs.cache = cache
        x = self._embed_positions(x, inputs, past_len)
        x, presents, states, weights = self._run_blocks(x, inputs, layer_pasts, bool(output_attentions), bool(output_hidden_states))
        x = self.norm_f(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=(cache if cache is not None else tuple(presents)) if use_cache else None,
            hidden_states=(*states, x) if output_hidden_states else None,
            attentions=tuple(weights) if output_attentions else None,
        )

    def _check_arguments(self, input_ids: Any, inputs_embeds: Any, return_dict: bool | None, output_attentions: bool | None) -> None:
        if return_dict is False:
            raise NotImplementedError('return_dict is False, but MPT returns its outputs by name only; leave it out or set it to True')
        if (input_ids is None) == (inputs_embeds is None):
            given = 'both' if input_ids is not None else 'neither'
            raise ValueError(f'give either input_ids or inputs_embeds, got {given}')
        if output_attentions and self.config.attn_config['attn_impl'] != 'torch':
            raise NotImplementedError(f'output_attentions needs attn_config.attn_impl: torch, got {self.config.attn_config["attn_impl"]!r}')

    def _layer_pasts(self, pasts: Sequence[tuple[torch.Tensor, ...]] | None, use_cache: bool) -> list[tuple[torch.Tensor, ...] | None]:
        """One tuple-cache entry per layer: empty tuples before the first token, None without a tuple cache."""
        n_layers = self.config.n_layers
        if pasts is None:
            return [() if use_cache else None] * n_layers
        if len(pasts) != n_layers:
            raise ValueError(f'past_key_values must have one entry per layer, got {len(pasts)} entries for n_layers {n_layers}')
        return list(pasts)

    def _attention_inputs(
        self,
        x: torch.Tensor,
        past_len: int,
        attention_mask: torch.Tensor | None,
        sequence_id: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> AttentionInputs:
        config, attn = self.config, self.config.attn_config
        seq_len, total_len = x.shape[1], past_len + x.shape[1]
        if seq_len > config.max_seq_len:
            raise AssertionError(f'the input has {seq_len} tokens, but max_seq_len is {config.max_seq_len}; shorten it or raise max_seq_len')
        if attention_mask is not None:
            if attention_mask.shape[-1] != total_len:
                raise ValueError(f'attention_mask has length {attention_mask.shape[-1]}, but there are {total_len} tokens, {past_len} of them cached')
            attention_mask = None if bool((attention_mask != 0).all()) else attention_mask.bool()
        if attention_mask is not None and self.training and is_left_padded(attention_mask):
            raise NotImplementedError(
                'MPT cannot be trained with padding on the left: attention_mask is 0 at the first token of a row; pad on the right'
            )
        sequence_id = check_sequence_id(sequence_id, attn['attn_uses_sequence_id'], total_len, self.training)
        slopes = gen_slopes(config.n_heads, attn['alibi_bias_max'], x.device, return_1d=True) if attn['alibi'] else None
        if self._needs_positions and position_ids is None:
            position_ids = gen_position_ids(past_len, seq_len, attention_mask, sequence_id, x.device)
        return AttentionInputs(
            mask=build_mask(attention_mask, sequence_id, slopes),
            position_ids=position_ids,
            rotary=None if self.rotary_embedding is None else self.rotary_embedding(position_ids, total_len),
            flash_attn_padding_info=flash_padding_info_for(attn['attn_impl'], (x.shape[0], seq_len, past_len), x.device, attention_mask, sequence_id),
            token_mask=None if attention_mask is None or config.use_pad_tok_in_ffn else attention_mask[:, past_len:],
        )

    def _embed_positions(self, x: torch.Tensor, inputs: AttentionInputs, past_len: int) -> torch.Tensor:
        config = self.config
        if config.learned_pos_emb:
            if past_len + x.shape[1] > config.max_seq_len:
                raise ValueError(
                    f'{past_len} cached and {x.shape[1]} new tokens exceed max_seq_len {config.max_seq_len}, beyond which there are no learned positions; '
                    'shorten the input or generate fewer tokens',
                )
            x = x + self.wpe(inputs.position_ids)
        if config.embedding_fraction != 1:
            x = x * config.embedding_fraction + x.detach() * (1 - config.embedding_fraction)
        return self.emb_drop(x)

    def _run_blocks(
        self,
        x: torch.Tensor,
        inputs: AttentionInputs,
        pasts: list[tuple[torch.Tensor, ...] | None],
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> tuple[torch.Tensor, list[Any], list[torch.Tensor], list[Any]]:
        presents: list[Any] = []
        states: list[torch.Tensor] = []
        weights: list[Any] = []
        reusable: dict[int, BlockOutput] = {}
        for index, block in enumerate(self.blocks):
            if output_hidden_states:
                states.append(x)
            kv_source, x_source = self._reused_layers[index]
            out = block(
                x,
                inputs,
                pasts[index],
                prev_layer_key_value=None if kv_source is None else reusable[kv_source].key_value,
                x_prev=None if x_source is None else reusable[x_source].attn_input,
                output_attentions=output_attentions,
            )
            x = out.hidden
            presents.append(out.past_key_value)
            weights.append(out.weights)
            if out.key_value is not None or out.attn_input is not None:
                reusable[index] = out
        return x, presents, states, weights


def _build_block(config: MPTConfig, index: int, layer_attn_config: dict[str, Any], ffn_config: dict[str, Any], device: str | None) -> MPTBlock:
    attn_config = {key: value for key, value in layer_attn_config.items() if key not in _MODEL_ATTN_KEYS}
    attn_config.update(layer_idx=index, head_dim=config.head_dim, fc_type=config.fc_type, attention_bias=config.attention_bias)
    return MPTBlock(
        d_model=config.d_model,
        n_heads=config.n_heads,
        expansion_ratio=config.expansion_ratio,
        attn_config=attn_config,
        ffn_config={**ffn_config, 'fc_type': config.fc_type},
        norm={'norm_type': config.norm_type, 'norm_eps': config.norm_eps},
        resid_pdrop=config.resid_pdrop,
        no_bias=config.no_bias,
        device=device,
        use_pad_tok_in_ffn=config.use_pad_tok_in_ffn,
    )


def _mark_reuse(blocks: nn.ModuleList) -> list[tuple[int | None, int | None]]:
    """Tells blocks whose keys or inputs are reused to return them. Returns, per layer, the layers whose keys and whose input it reuses."""
    reuse = []
    for block in blocks:
        settings = getattr(block.attn, 'settings', None)
        kv_source = getattr(settings, 'reuse_kv_layer_idx', None)
        x_source = getattr(settings, 'reuse_kv_x_layer_idx', None)
        if kv_source is not None:
            blocks[kv_source].is_key_value_reused = True
        if x_source is not None:
            blocks[x_source].is_attn_input_reused = True
        reuse.append((kv_source, x_source))
    return reuse


def _drop_biases(model: nn.Module) -> None:
    """``no_bias``: norms lose their bias too; layers that were built with a bias on purpose (``attention_bias``) keep it."""
    for module in model.modules():
        if not isinstance(module, nn.Linear) and isinstance(getattr(module, 'bias', None), nn.Parameter):
            module.register_parameter('bias', None)


def past_length(cache: Cache | None, layer_pasts: list[tuple[torch.Tensor, ...] | None], attn_impl: str) -> int:
    """Number of cached tokens."""
    if cache is not None:
        return int(cache.get_seq_length())
    entry = layer_pasts[0] if layer_pasts else None
    if not entry:
        return 0
    return entry[0].shape[3] if attn_impl == 'torch' else entry[0].shape[1]
