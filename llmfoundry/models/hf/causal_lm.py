"""Any transformers causal LM for Composer's Trainer: ``model.name: hf_causal_lm``.

The model keeps transformers' own modules and parameter names; only its loss is ours (see ``fused_head``).
"""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmfoundry.models.composer_base import BaseHuggingFaceModel
from llmfoundry.models.hf.fsdp import prepare_hf_model_for_fsdp
from llmfoundry.models.hf.fused_head import add_loss_to_forward
from llmfoundry.models.hf.load import load_causal_lm, load_config, resolve_attn_implementation

__all__ = ['ComposerHFCausalLM', 'build_lora_config']


class ComposerHFCausalLM(BaseHuggingFaceModel):
    """A transformers causal LM, newly initialised or pretrained, with an optional LoRA adapter.

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
        peft_config: ``peft_type: LORA``, ``task_type: CAUSAL_LM`` and arguments of peft's ``LoraConfig``.
        use_train_metrics: whether metrics are computed on training batches.
        allow_embedding_resizing: grow the embeddings to the tokenizer.
        additional_train_metrics: registry names of further metrics on training batches.
        additional_eval_metrics: the same for evaluation.
        should_save_peft_only: with an adapter, checkpoints hold it alone.
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
        lora_config = None if peft_config is None else build_lora_config(peft_config)
        attn_implementation = resolve_attn_implementation(attn_implementation, use_flash_attention_2)
        config = load_config(pretrained_model_name_or_path, trust_remote_code, use_auth_token, attn_implementation, config_overrides)
        model = load_causal_lm(pretrained_model_name_or_path, config, pretrained, init_device, trust_remote_code, use_auth_token, load_in_8bit)
        model = add_loss_to_forward(model)
        super().__init__(
            model=model if pretrained_lora_id_or_path is None else _load_adapter(model, pretrained_lora_id_or_path),
            tokenizer=tokenizer,
            loss_fn=loss_fn,
            use_train_metrics=use_train_metrics,
            additional_train_metrics=additional_train_metrics,
            additional_eval_metrics=additional_eval_metrics,
            allow_embedding_resizing=allow_embedding_resizing,
            peft_config=lora_config,
            should_save_peft_only=should_save_peft_only,
        )
        prepare_hf_model_for_fsdp(model, outer=self.model)

    def flops_per_batch(self, batch: Mapping[str, Any]) -> int:
        """Training FLOPs of a batch: 4 per parameter and token, 2 more where the parameter is trained, plus attention.

        0, so that no utilisation is reported, for mixtures of experts, whose active parameters transformers does not name in one way.
        """
        config = self.config
        if any(getattr(config, key, None) for key in ('num_local_experts', 'num_experts', 'n_routed_experts')):
            return 0
        batch_size, seq_len = batch['input_ids'].shape[:2]
        n_params = sum(p.numel() for p in self.model.parameters())
        n_trainable = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        attention = 3 * 4 * config.num_hidden_layers * config.hidden_size * seq_len**2
        return batch_size * ((4 * n_params + 2 * n_trainable) * seq_len + attention)


def build_lora_config(peft_config: Mapping[str, Any]) -> Any:
    """Turns the ``peft_config`` block into peft's ``LoraConfig``.

    Raises:
        ImportError: peft is not installed.
        ValueError: another ``peft_type`` or ``task_type`` than LORA and CAUSAL_LM (in any case), or an argument that ``LoraConfig`` does not have.
    """
    options = dict(peft_config)
    for key, expected in (('peft_type', 'LORA'), ('task_type', 'CAUSAL_LM')):
        value = options.pop(key, expected)
        if str(value).upper() != expected:
            raise ValueError(f'peft_config.{key}: got {value!r}, only {expected} is supported.')
    lora_config_class = _import_peft('peft_config').LoraConfig
    try:
        return lora_config_class(task_type='CAUSAL_LM', **options)
    except TypeError as e:
        raise ValueError(f'peft_config: {e}. The other keys are the arguments of peft.LoraConfig.') from e


def _load_adapter(model: PreTrainedModel, adapter: str) -> Any:
    return _import_peft('pretrained_lora_id_or_path').PeftModel.from_pretrained(model, adapter, is_trainable=True)


def _import_peft(key: str) -> Any:
    try:
        import peft
    except ImportError as e:
        raise ImportError(f"{key} needs the peft package: pip install -e '.[peft]'") from e
    return peft
