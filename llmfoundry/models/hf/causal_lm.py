"""Any transformers causal LM for Composer's Trainer: ``model.name: hf_causal_lm``.

The model keeps transformers' own modules and parameter names; only its loss is ours (see ``fused_head``). Folders of model type ``mpt`` are the exception: they are
built from our own MPT classes, without remote code.
"""

from __future__ import annotations

import logging
from typing import Any, Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from llmfoundry import dist
from llmfoundry.errors import PackingNotSupportedError
from llmfoundry.models.composer_base import BaseHuggingFaceModel, fit_embeddings
from llmfoundry.models.hf.adapters import build_peft_config, load_adapter
from llmfoundry.models.hf.fsdp import prepare_hf_model_for_fsdp
from llmfoundry.models.hf.fused_head import add_loss_to_forward
from llmfoundry.models.hf.load import load_config, load_model, resolve_attn_implementation
from llmfoundry.models.hf.packing import has_packed_rows
from llmfoundry.models.mpt.configuration_mpt import MPTConfig
from llmfoundry.models.mpt.modeling_mpt import MPTForCausalLM
from llmfoundry.models.mpt.param_count import flops_per_sequence

__all__ = ['ComposerHFCausalLM']

log = logging.getLogger(__name__)


class ComposerHFCausalLM(BaseHuggingFaceModel):
    """A transformers causal LM, newly initialised or pretrained, with an optional PEFT adapter.

    Args:
        tokenizer: saved in checkpoints; must not have more tokens than the model unless ``allow_embedding_resizing``.
        pretrained_model_name_or_path: name on the Hub or local folder.
        pretrained: load the weights; False initialises them from the config alone.
        pretrained_lora_id_or_path: an adapter to go on training.
        trust_remote_code: run code that the repository brings. Off by default: it is somebody else's code.
        use_auth_token: token for gated repositories, or True for the one that ``huggingface-cli login`` stored.
        use_flash_attention_2: the older spelling of ``attn_implementation: flash_attention_2``.
        load_in_8bit: quantise frozen weights with bitsandbytes.
        init_device: ``cpu``, ``meta`` (weights come later) or ``mixed`` (only global rank 0 loads weights).
        config_overrides: attributes of the config to set; nested dicts are merged.
        peft_config: a new adapter: ``peft_type`` (LORA unless given), ``task_type: CAUSAL_LM`` and the arguments of that method's config class in PEFT.
        use_train_metrics: whether metrics are computed on training batches.
        allow_embedding_resizing: grow the embeddings to the tokenizer.
        additional_train_metrics: registry names of further metrics on training batches.
        additional_eval_metrics: the same for evaluation.
        should_save_peft_only: with an adapter, checkpoints hold it alone. Not with ``pretrained: false``: no other file would have the base model.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``; None leaves the choice to transformers.
        loss_fn: ``fused_crossentropy`` or ``torch_crossentropy``.

    Raises:
        ValueError: a value that does not fit; the text names the key.
        ImportError: an adapter without the ``peft`` package.
        RuntimeError: in a run of several processes, loading failed on the ranks that the text names.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        pretrained_model_name_or_path: str,
        pretrained: bool = True,
        pretrained_lora_id_or_path: str | None = None,
        trust_remote_code: bool = False,
        use_auth_token: bool | str = False,
        use_flash_attention_2: bool = False,
        load_in_8bit: bool = False,
        init_device: str = 'cpu',
        config_overrides: Mapping[str, Any] | None = None,
        peft_config: Mapping[str, Any] | None = None,
        use_train_metrics: bool = True,
        allow_embedding_resizing: bool = False,
        additional_train_metrics: Sequence[str] | None = None,
        additional_eval_metrics: Sequence[str] | None = None,
        should_save_peft_only: bool = True,
        attn_implementation: str | None = None,
        loss_fn: str = 'fused_crossentropy',
    ) -> None:
        adapter_config = None if peft_config is None else build_peft_config(peft_config)
        has_adapter = adapter_config is not None or pretrained_lora_id_or_path is not None
        _check_adapter_settings(peft_config, pretrained_lora_id_or_path, load_in_8bit, init_device)
        attn_implementation = resolve_attn_implementation(attn_implementation, use_flash_attention_2)
        config = load_config(pretrained_model_name_or_path, trust_remote_code, use_auth_token, attn_implementation, config_overrides)
        if config.is_encoder_decoder:
            raise ValueError(
                f'model.pretrained_model_name_or_path: hf_causal_lm trains decoder-only models, and {pretrained_model_name_or_path!r} (model type {config.model_type!r}) is an encoder-decoder. '
                'Use hf_t5.',
            )
        model = load_model(pretrained_model_name_or_path, config, pretrained, init_device, trust_remote_code, use_auth_token, load_in_8bit)
        if not isinstance(config, MPTConfig):  # whose forward computes our loss by itself
            model = add_loss_to_forward(model)
        if tokenizer is not None and pretrained_lora_id_or_path is not None:  # the base class would come too late: the adapter may bring embeddings of the grown size
            fit_embeddings(model, tokenizer, allow_embedding_resizing)
        if has_adapter and should_save_peft_only and not pretrained:
            log.warning('should_save_peft_only: true has no effect with pretrained: false, since the random base model is in no other file; checkpoints hold all weights')
            should_save_peft_only = False
        super().__init__(
            model=model if pretrained_lora_id_or_path is None else load_adapter(model, pretrained_lora_id_or_path, use_auth_token),
            tokenizer=tokenizer,
            loss_fn=loss_fn,
            use_train_metrics=use_train_metrics,
            additional_train_metrics=additional_train_metrics,
            additional_eval_metrics=additional_eval_metrics,
            allow_embedding_resizing=allow_embedding_resizing,
            peft_config=adapter_config,
            should_save_peft_only=should_save_peft_only,
        )
        if isinstance(config, MPTConfig):
            _finish_mpt(model, self.model)
        else:
            prepare_hf_model_for_fsdp(model, outer=self.model)

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """As in the base class. An MPT is told where documents end, also that a row holds one where the loader does not say."""
        if isinstance(self.config, MPTConfig) and batch.get('sequence_id') is None:
            mask = batch.get('attention_mask')
            ones = torch.ones_like(batch['input_ids']) if mask is None else mask.long()
            batch = {**batch, 'sequence_id': ones - 1}  # 0 for the one document, -1 for padding
        if self._learns_a_prompt and batch.get('sequence_id') is not None and has_packed_rows(batch['sequence_id']):
            kind = self.model.active_peft_config.peft_type.value
            raise PackingNotSupportedError(type(self.config).__name__, kind, 'the learned prompt stands before the first document of a row only')
        return super().forward(batch)

    @property
    def _learns_a_prompt(self) -> bool:
        return self.using_peft and self.model.active_peft_config.is_prompt_learning

    def _logits(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """(batch, seq, vocab) logits, without those of a learned prompt."""
        return super()._logits(batch)[:, -batch['input_ids'].shape[1] :]

    def flops_per_batch(self, batch: Mapping[str, Any]) -> int:
        """Training FLOPs of a batch: 4 per parameter and token, 2 more where the parameter is trained, plus attention.

        0, so that no utilisation is reported, for mixtures of experts, whose active parameters transformers does not name in one way.
        """
        config = self.config
        if isinstance(config, MPTConfig):
            return batch['input_ids'].shape[0] * flops_per_sequence(self.model, config, batch['input_ids'].shape[1])
        if any(getattr(config, key, None) for key in ('num_local_experts', 'num_experts', 'n_routed_experts')):
            return 0
        batch_size, seq_len = batch['input_ids'].shape[:2]
        n_params = sum(p.numel() for p in self.model.parameters())
        n_trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        attention = 3 * 4 * config.num_hidden_layers * config.hidden_size * seq_len**2
        return batch_size * ((4 * n_params + 2 * n_trainable) * seq_len + attention)


def _finish_mpt(model: MPTForCausalLM, outer: Any) -> None:
    """Shows Composer the units that an MPT names itself, through an adapter too.

    Raises:
        ValueError: an adapter on the head, whose weight the loss takes without it.
    """
    if hasattr(model.get_output_embeddings(), 'base_layer'):
        raise ValueError('peft_config.target_modules: an adapter on the head or the embedding of an MPT would be passed over by its loss; leave wte and lm_head out, or name lm_head in modules_to_save.')
    if outer is not model:
        for name in ('fsdp_wrap_fn', 'activation_checkpointing_fn', 'param_init_fn'):
            setattr(outer, name, getattr(model, name))


def _check_adapter_settings(peft_config: Mapping[str, Any] | None, adapter: str | None, load_in_8bit: bool, init_device: str) -> None:
    """Settings that exclude each other, before anything is loaded.

    Raises:
        ValueError: the two ways to have an adapter together; 8-bit weights without one; an adapter on a model that has no weights yet.
    """
    if peft_config is not None and adapter is not None:
        raise ValueError('peft_config makes a new adapter and pretrained_lora_id_or_path loads one: set one of them.')
    has_adapter = peft_config is not None or adapter is not None
    if load_in_8bit and not has_adapter:
        raise ValueError('load_in_8bit: true freezes the weights, so there is nothing to train: set peft_config (or pretrained_lora_id_or_path), or load_in_8bit: false.')
    # With mixed, every rank but the first is told meta.
    if has_adapter and init_device == 'meta' and dist.get_global_rank() == 0:
        raise ValueError('init_device: meta with an adapter: adapters start from the weights of the base model, which a meta model does not have; use init_device: mixed (or cpu).')
