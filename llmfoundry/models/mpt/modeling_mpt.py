"""MPT, a decoder-only transformer, as a language model: the backbone of ``modeling_backbone`` and a head.

A ``PreTrainedModel``, so that transformers' ``from_pretrained``, ``generate``, PEFT and exported folders work; Composer's side is in ``composer_mpt``.
In training the loss is computed inside ``MPTForCausalLM.forward`` from the last hidden state and the head's weight, for two reasons: the logits matrix (tokens x vocabulary), usually the
largest tensor of all, never exists; and when the weights are sharded, they are whole only inside the root module's forward.

Shapes: b batch, s new tokens, k cached and new tokens.
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from typing import Any, Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmfoundry.models.layers.position import LlamaRotaryEmbeddingFoundry, PartialLlamaConfig, gen_rotary_embedding
from llmfoundry.models.mpt.attention_inputs import apply_sequence_id, gen_attention_mask_in_length, gen_flash_attn_padding_info, gen_sequence_id_info
from llmfoundry.models.mpt.configuration_mpt import MPTConfig
from llmfoundry.models.mpt.modeling_backbone import MPTModel, MPTPreTrainedModel, past_length

__all__ = [
    'CROSS_ENTROPY_IGNORE_INDEX',
    'LlamaRotaryEmbeddingFoundry',
    'MPTForCausalLM',
    'MPTModel',
    'MPTPreTrainedModel',
    'PartialLlamaConfig',
    'apply_sequence_id',
    'gen_attention_mask_in_length',
    'gen_flash_attn_padding_info',
    'gen_rotary_embedding',
    'gen_sequence_id_info',
    'shift_labels',
]

log = logging.getLogger(__name__)

CROSS_ENTROPY_IGNORE_INDEX = -100


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Targets (b, s): position i gets the label of i + 1, and the last one is ignored."""
    return F.pad(labels[:, 1:], (0, 1), value=CROSS_ENTROPY_IGNORE_INDEX)


class MPTForCausalLM(MPTPreTrainedModel, GenerationMixin):
    """MPT with a language-model head, tied to the token embedding unless ``tie_word_embeddings`` is False."""

    def __init__(self, config: MPTConfig) -> None:
        super().__init__(config)
        log.info('Instantiating an MPTForCausalLM model from %s', __file__)
        self.transformer = MPTModel(config)
        # Not a sharding unit of its own: the loss reads its weight here, where only the root's parameters are whole.
        self.lm_head = None
        if not config.tie_word_embeddings:
            device = None if config.init_device in ('cpu', 'mixed') else config.init_device
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False, device=device)
        scale = config.logit_scale
        self.logit_scale = 1 / math.sqrt(config.d_model) if scale == 'inv_sqrt_d_model' else scale
        self.final_logit_softcapping = config.final_logit_softcapping
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.get_input_embeddings() if self.lm_head is None else self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if self.lm_head is None:
            self.transformer.set_input_embeddings(new_embeddings)
        else:
            self.lm_head = new_embeddings

    def set_decoder(self, decoder: MPTModel) -> None:
        self.transformer = decoder

    def get_decoder(self) -> MPTModel:
        return self.transformer

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | Sequence[tuple[torch.Tensor, ...]] | None = None,
        attention_mask: torch.Tensor | None = None,
        sequence_id: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        use_cache: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        loss_fn: Callable[..., Any] | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast:
        """Applies the model; arguments not listed are those of ``MPTModel.forward``.

        Args:
            labels: (b, s), not shifted, -100 where no loss is wanted.
            loss_fn: called as ``loss_fn(hidden (b, s, d_model), head weight (vocab, d_model), targets (b, s), logit_scale=, softcap=)`` with shifted targets when
                labels are given; its result is ``.loss``, and no logits are made. Default: mean cross entropy of the logits.
            logits_to_keep: logits of this many last positions only; 0 for all.
        """
        out = self.transformer(
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            sequence_id=sequence_id,
            return_dict=return_dict,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            use_cache=use_cache,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
        )
        hidden = out.last_hidden_state
        logits, loss = None, None
        if self.logit_scale == 0:
            warnings.warn('logit_scale is 0: all logits are equal, so the output does not depend on the input.')
        if labels is not None and loss_fn is not None:
            weight = self.get_output_embeddings().weight
            loss = loss_fn(hidden, weight, shift_labels(labels), logit_scale=self.logit_scale, softcap=self.final_logit_softcapping)
        else:
            logits = self._logits(hidden[:, -logits_to_keep:] if logits_to_keep and labels is None else hidden)
            if labels is not None:
                loss = F.cross_entropy(
                    logits.flatten(0, 1).float(), shift_labels(labels).flatten().to(logits.device), ignore_index=CROSS_ENTROPY_IGNORE_INDEX
                )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(b, s, d_model) -> (b, s, vocab)"""
        logits = self.transformer.wte(hidden, True) if self.lm_head is None else self.lm_head(hidden)
        if self.logit_scale is not None:
            logits = logits * self.logit_scale
        cap = self.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What ``generate`` feeds to ``forward``: after the first step only the tokens that are not cached.

        Raises:
            NotImplementedError: padding on the right.
        """
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            raise NotImplementedError(
                "MPT generates with padding on the left only: attention_mask is 0 at the last token of a row; set tokenizer.padding_side = 'left'"
            )
        past_len = 0
        if past_key_values is not None:
            pasts = [] if isinstance(past_key_values, Cache) else list(past_key_values)
            past_len = past_length(past_key_values if not pasts else None, pasts, self.config.attn_config['attn_impl'])
        if inputs_embeds is not None and past_len == 0:
            model_inputs: dict[str, Any] = {'inputs_embeds': inputs_embeds}
        else:
            # With inputs_embeds the prompt has no ids, so ids may be fewer than cached tokens.
            n_new = max(1, input_ids.shape[1] - past_len) if inputs_embeds is None else 1
            model_inputs = {'input_ids': input_ids[:, -n_new:].contiguous()}
        return {
            **model_inputs,
            'attention_mask': attention_mask,
            'past_key_values': past_key_values,
            'use_cache': kwargs.get('use_cache', True),
            'logits_to_keep': 1 if kwargs.get('logits_to_keep') is None else kwargs['logits_to_keep'],
        }

    @staticmethod
    def _reorder_cache(past_key_values: Any, beam_idx: torch.LongTensor) -> Any:
        """Rows of the cache in the order of the beams that survived."""
        if isinstance(past_key_values, Cache):
            past_key_values.reorder_cache(beam_idx)
            return past_key_values
        return tuple(tuple(state.index_select(0, beam_idx.to(state.device)) for state in layer) for layer in past_key_values)


def __getattr__(name: str) -> Any:
    # An old import path. The class itself needs Composer, which this module must not.
    if name == 'ComposerMPTCausalLM':
        try:
            return getattr(importlib.import_module('llmfoundry.models.mpt.composer_mpt'), name)
        except ImportError as e:
            raise AttributeError(f'{name} needs LLM Foundry and Composer: {e}') from e
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
