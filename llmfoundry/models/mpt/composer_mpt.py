"""MPT for Composer's Trainer: ``model.name: mpt_causal_lm``.

Kept apart from the model, because exported folders carry the model's source and must not need Composer.
"""

from __future__ import annotations

import importlib
from typing import Any, Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from llmfoundry.layers_registry import ffns_with_megablocks
from llmfoundry.models.composer_base import BaseHuggingFaceModel
from llmfoundry.models.mpt.configuration_mpt import MPTConfig
from llmfoundry.models.mpt.modeling_mpt import MPTForCausalLM
from llmfoundry.models.mpt.param_count import flops_per_sequence

__all__ = ['ComposerMPTCausalLM']


class ComposerMPTCausalLM(BaseHuggingFaceModel):
    """A newly initialised MPT causal language model.

    Args:
        tokenizer: saved in checkpoints; embeddings grow, with a log line, if it has more tokens than ``vocab_size``.
        use_train_metrics: whether cross entropy, perplexity and accuracy are computed on training batches.
        additional_train_metrics: registry names of further metrics on training batches.
        additional_eval_metrics: the same for evaluation.
        loss_fn: ``fused_crossentropy`` or ``torch_crossentropy``.
        **kwargs: keys of ``MPTConfig``.

    Raises:
        ValueError: unknown loss or metric, or a rule of ``MPTConfig`` is broken.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        use_train_metrics: bool = True,
        additional_train_metrics: Sequence[str] | None = None,
        additional_eval_metrics: Sequence[str] | None = None,
        loss_fn: str = 'fused_crossentropy',
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model=self.model_class(MPTConfig(**kwargs)),
            tokenizer=tokenizer,
            loss_fn=loss_fn,
            use_train_metrics=use_train_metrics,
            additional_train_metrics=additional_train_metrics,
            additional_eval_metrics=additional_eval_metrics,
            allow_embedding_resizing=True,
        )

    @property
    def model_class(self) -> type[MPTForCausalLM]:
        """The model that is built; a subclass may name another."""
        return MPTForCausalLM

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """As in the base class. Experts' load-balancing statistics of the last batch are dropped first."""
        if self._has_megablocks():
            _megablocks_moe().clear_load_balancing_loss()
        return super().forward(batch)

    def auxiliary_losses(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """``lbl``: the load-balancing loss of megablocks' experts (Switch Transformer, arXiv:2101.03961), if the model has any and its weight is not 0."""
        if not self._has_megablocks():
            return {}
        args = next(module.args for module in self.model.modules() if hasattr(getattr(module, 'args', None), 'moe_loss_weight'))
        if not args.moe_loss_weight:
            return {}
        moe = _megablocks_moe()
        lbl = moe.batched_load_balancing_loss(args)
        moe.clear_load_balancing_loss()
        return {'lbl': lbl}

    def flops_per_batch(self, batch: Mapping[str, Any]) -> int:
        """Training FLOPs of a batch, padding included: 6 per active parameter and token, plus attention (Composer's SpeedMonitor makes MFU of it)."""
        batch_size, seq_len = batch['input_ids'].shape[:2]
        return batch_size * flops_per_sequence(self.model, self.model.config, seq_len)

    def _has_megablocks(self) -> bool:
        return self.config.ffn_config['ffn_type'] in ffns_with_megablocks


def _megablocks_moe() -> Any:
    return importlib.import_module('megablocks.layers.moe')
