"""What every causal language model of ours shows to Composer's Trainer: forward with the loss inside, loss, metrics, generation.

The loss is computed inside the forward of the wrapped model, so that it also holds when the head's weight is sharded, and the model returns its sum and
counts (``LossOutput``) in place of logits. Training metrics read those. Logits are made only for metrics that ask for them. Composer weights
microbatches and ranks by their loss-generating tokens (``accumulate_train_batch_on_tokens``), which turns our means per microbatch into the
mean over the tokens of the global batch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from typing import Any, Iterator, Literal, Mapping, Sequence

import torch
from composer.models import huggingface as composer_hf
from torchmetrics import Metric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmfoundry import registry
from llmfoundry.models.losses import LossOutput, get_loss_fn, shift_labels

__all__ = ['BaseHuggingFaceModel', 'build_metrics', 'default_metrics']

log = logging.getLogger(__name__)

DEFAULT_METRICS = ('language_cross_entropy', 'language_perplexity', 'token_accuracy')


def build_metrics(names: Sequence[str]) -> list[Metric]:
    """One metric per registry name; repeated names once.

    Raises:
        RegistryError: (a ValueError) unknown name.
    """
    return [registry.construct_from_registry(name, registry.metrics) for name in dict.fromkeys(names)]


def default_metrics(additional: Sequence[str] | None = None) -> list[Metric]:
    """Cross entropy, perplexity and accuracy per token, and those that the config adds."""
    return build_metrics([*DEFAULT_METRICS, *(additional or ())])


@contextlib.contextmanager
def _without_causal_lm_scan() -> Iterator[None]:
    """Composer asks whether a model is a registered causal LM by importing every causal LM of transformers (10 s). Ours all are."""
    original = composer_hf._is_registered_causal_lm
    composer_hf._is_registered_causal_lm = lambda model: True
    try:
        yield
    finally:
        composer_hf._is_registered_causal_lm = original


class BaseHuggingFaceModel(composer_hf.HuggingFaceModel):
    """A transformers causal LM for Composer's Trainer.

    Args:
        model: the model. Its forward must take ``labels`` and ``loss_fn`` and, given both, return a ``LossOutput`` as ``loss``.
        tokenizer: saved in checkpoints with the model's config, so that they can be exported later.
        loss_fn: ``fused_crossentropy`` or ``torch_crossentropy``.
        use_train_metrics: whether metrics are computed on training batches.
        additional_train_metrics: registry names of metrics on training batches, besides the default ones.
        additional_eval_metrics: the same for evaluation.
        allow_embedding_resizing: grow the embeddings if the tokenizer has more tokens than the model, instead of failing.
        peft_config: LoRA adapter to add.
        should_save_peft_only: checkpoints hold the adapter only.

    Raises:
        ValueError: unknown loss or metric; more tokens than embeddings.

    Attributes:
        loss_token_scale: factor on the loss, 1.0. For trainers that do not weight ranks and microbatches by tokens themselves.
        metadata_form: what ``get_metadata`` gives to a checkpoint. The trainer changes it for sharded ones.
    """

    metadata_form: Literal['parsed', 'text', 'none'] = 'parsed'

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        loss_fn: str = 'fused_crossentropy',
        use_train_metrics: bool = True,
        additional_train_metrics: Sequence[str] | None = None,
        additional_eval_metrics: Sequence[str] | None = None,
        allow_embedding_resizing: bool = False,
        peft_config: Any = None,
        should_save_peft_only: bool = True,
    ) -> None:
        self_loss_fn = get_loss_fn(loss_fn)
        with _without_causal_lm_scan():
            super().__init__(
                model=model,
                tokenizer=tokenizer,
                use_logits=True,
                metrics=default_metrics(additional_train_metrics) if use_train_metrics else [],
                eval_metrics=default_metrics(additional_eval_metrics),
                shift_labels=True,
                allow_embedding_resizing=allow_embedding_resizing,
                peft_config=peft_config,
                should_save_peft_only=should_save_peft_only,
            )
        self.loss_fn = self_loss_fn
        self.loss_token_scale = 1.0

    def get_metadata(self) -> dict[str, Any]:
        """The files that a checkpoint needs to be exported later: config, adapter config and tokenizer.

        ``metadata_form`` decides in which form. ``parsed``: Composer's, dictionaries and lists, which its converters read. ``text``: the content of each file as one string, for
        sharded checkpoints, since torch saves a nested dictionary value by value (100,000 for GPT-2's tokenizer: 36 MB of metadata and half a minute per checkpoint) and drops the
        empty ones. ``none``: nothing, while a sharded checkpoint is loaded: torch asks the checkpoint for every value that the state has, and Composer uses none of these.
        """
        if self.metadata_form == 'none':
            return {}
        files = super().get_metadata()
        if self.metadata_form == 'text':
            return {group: {name: _as_text(entry) for name, entry in entries.items()} for group, entries in files.items()}
        return files

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Runs the model. With ``labels`` in the batch the output's ``loss`` is a ``LossOutput`` and there are no logits; without, there are logits.

        Args:
            batch: ``input_ids`` (batch, seq) and what else the model's forward takes; other keys are left out.
        """
        inputs = {key: value for key, value in batch.items() if key in self.model_forward_args}
        if 'sequence_id' in batch and 'sequence_id' not in inputs:
            _warn_about_packing(type(self.model).__name__)
        if inputs.get('labels') is not None:
            return self.model(**inputs, loss_fn=self.loss_fn)
        return self.model(**inputs)

    def loss(self, outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor | dict[str, torch.Tensor]:
        """Mean loss over the tokens of the microbatch that have a target; with an auxiliary loss, a dict of total, loss and the auxiliary one."""
        mean = outputs['loss'].mean() * self.loss_token_scale
        auxiliary = self.auxiliary_losses(outputs, batch)
        if not auxiliary:
            return mean
        return {'total': mean + sum(auxiliary.values()), 'loss': mean, **auxiliary}

    def auxiliary_losses(self, outputs: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Losses besides cross entropy, by the name under which they are logged; none here."""
        return {}

    def eval_forward(self, batch: Any, outputs: Any = None) -> Any:
        """What metrics are computed from: in training the output of the training pass, in evaluation a summed loss or logits.

        Batches with a ``mode`` (in-context tasks, generation) are Composer's business.
        """
        if batch.get('mode') is not None:
            return super().eval_forward(batch, outputs)
        self.labels = shift_labels(batch['labels'])
        if outputs is not None:
            return outputs
        if any(_needs_logits(metric) for metric in self.get_metrics(is_train=False).values()):
            return self._logits(batch)
        return self.forward(batch)

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> dict:
        """Updates one metric from the summed loss, or from logits where the metric knows nothing else."""
        loss = outputs.get('loss') if isinstance(outputs, Mapping) else None
        if not isinstance(loss, LossOutput) or batch.get('mode') is not None:
            return super().update_metric(batch, outputs, metric)
        if getattr(metric, 'accepts_loss_output', False):
            metric.update(loss)
            return {}
        if outputs.get('logits') is None:
            outputs['logits'] = self._logits(batch)
        return super().update_metric(batch, outputs['logits'], metric)

    def _logits(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """(batch, seq, vocab) logits by a pass of their own."""
        return self.forward({key: value for key, value in batch.items() if key != 'labels'})['logits']


@functools.cache
def _warn_about_packing(model_name: str) -> None:
    """Once per model class: silence here would be a loss that looks right and is not what the user asked for."""
    log.warning(
        f'{model_name} takes no sequence_id: documents that share a row attend to each other, although eos_token_id or bos_token_id of the dataset marks where they end. '
        'Use mpt_causal_lm with attn_config.attn_uses_sequence_id: true to keep them apart, or drop the id to say that this is wanted.',
    )


def _needs_logits(metric: Metric) -> bool:
    """Metrics that take the batch (``needs_batch``) belong to in-context tasks, which never come here."""
    return not getattr(metric, 'accepts_loss_output', False) and not getattr(metric, 'needs_batch', False)


def _as_text(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of Composer's metadata with its content as it stood in the file; what is text or bytes already stays."""
    content = entry['content']
    if entry['file_extension'] == '.json':
        return {**entry, 'content': json.dumps(content, ensure_ascii=False)}
    return {**entry, 'content': '\n'.join(content)} if isinstance(content, list) else entry
