"""What every causal language model of ours shows to Composer's Trainer: forward with the loss inside, loss, metrics, generation.

The loss is computed inside the forward of the wrapped model, so that it also holds when the head's weight is sharded, and the model returns its sum and
counts (``LossOutput``) in place of logits. Training metrics read those. Logits are made only for metrics that ask for them. Composer weights
microbatches and ranks by their loss-generating tokens (``accumulate_train_batch_on_tokens``), which turns our means per microbatch into the
mean over the tokens of the global batch.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
from typing import Any, Iterator, Literal, Mapping, Sequence

import torch
from composer.models import huggingface as composer_hf
from torchmetrics import Metric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmfoundry import registry
from llmfoundry.models.hf import adapters
from llmfoundry.models.hf.packing import PackingRoute, separate_documents
from llmfoundry.models.losses import LossOutput, get_loss_fn, shift_labels
from llmfoundry.optim.parameter_names import plain_name
from llmfoundry.tokenizers.build import num_token_ids

__all__ = ['BaseHuggingFaceModel', 'build_metrics', 'default_metrics']

log = logging.getLogger(__name__)

DEFAULT_METRICS = ('language_cross_entropy', 'language_perplexity', 'token_accuracy')


def build_metrics(names: Sequence[str]) -> list[Metric]:
    """One metric per registry name; repeated names once.

    Raises:
        RegistryError: (a ValueError) unknown name.
    """
    return [registry.construct_from_registry(name, registry.metrics) for name in dict.fromkeys(names)]


def default_metrics(additional: Sequence[str] | None = None, names: Sequence[str] = DEFAULT_METRICS) -> list[Metric]:
    """The metrics called ``names`` (cross entropy, perplexity and accuracy per token), and those that the config adds."""
    return build_metrics([*names, *(additional or ())])


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, allow_resizing: bool) -> None:
    """Grows the embeddings to the highest token id of ``tokenizer``, if that is allowed. New rows get the mean of the old ones and some noise, except on the meta device.

    Raises:
        ValueError: they are too small and ``allow_resizing`` is off.
    """
    rows, needed = model.get_input_embeddings().weight.shape[0], num_token_ids(tokenizer)
    if rows >= needed:
        return
    if not allow_resizing:
        raise ValueError(
            f'The tokenizer has {needed} token ids and the embeddings of the model only {rows} rows, so ids from {rows} on would have no embedding. '
            'Set model.allow_embedding_resizing: true to add rows, or use the tokenizer of the model.',
        )
    log.warning('the embeddings of the model grow from %d to %d rows, for the tokenizer; the new rows hold the mean of the others until they are trained', rows, needed)
    model.resize_token_embeddings(needed, mean_resizing=not model.get_input_embeddings().weight.is_meta)
    # The new rows are in no folder of the base model, so adapters have to carry them.
    setattr(model, adapters.RESIZED, True)


@contextlib.contextmanager
def _without_causal_lm_scan(is_causal_lm: bool) -> Iterator[None]:
    """Composer asks whether a model is a registered causal LM by importing every causal LM of transformers (10 s). The class knows."""
    original = composer_hf._is_registered_causal_lm
    composer_hf._is_registered_causal_lm = lambda model: is_causal_lm
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
        peft_config: config of the adapter to add, of any class of PEFT's.
        should_save_peft_only: checkpoints hold the adapter only: what it added, what it trains, and embeddings that were resized.

    Raises:
        ValueError: unknown loss or metric; more tokens than embeddings.

    Attributes:
        loss_token_scale: factor on the loss, 1.0. For trainers that do not weight ranks and microbatches by tokens themselves.
        shifts_labels: whether position i predicts label i + 1; False for encoder-decoder models, whose labels are targets as they stand.
        metric_names: registry names of the metrics that are always computed.
        metadata_form: what ``get_metadata`` gives to a checkpoint. The trainer changes it for sharded ones.
    """

    metadata_form: Literal['parsed', 'text', 'none'] = 'parsed'
    shifts_labels = True
    metric_names: Sequence[str] = DEFAULT_METRICS

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
        if tokenizer is not None:
            fit_embeddings(model, tokenizer, allow_embedding_resizing)
        if peft_config is not None:
            model = adapters.add_adapter(model, peft_config)
        with _without_causal_lm_scan(self.shifts_labels):
            super().__init__(
                model=model,
                tokenizer=tokenizer,
                use_logits=True,
                metrics=default_metrics(additional_train_metrics, self.metric_names) if use_train_metrics else [],
                eval_metrics=default_metrics(additional_eval_metrics, self.metric_names),
                shift_labels=self.shifts_labels,
                allow_embedding_resizing=allow_embedding_resizing,
                should_save_peft_only=should_save_peft_only,
            )
        self.loss_fn = self_loss_fn
        self.loss_token_scale = 1.0
        self._packing_routes: dict[str, PackingRoute] = {}

    def _get_model_forward_args(self) -> set[str]:
        """Names that the model's forward takes. Composer looks for them in ``base_model.model``, which is one module too deep under a learned prompt."""
        if not hasattr(self.model, 'get_base_model'):
            return super()._get_model_forward_args()
        return set(inspect.signature(self.model.get_base_model().forward).parameters)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The weights; of an adapted model with ``should_save_peft_only`` those that are not the frozen base model's."""
        if not self.saves_adapter_only:
            return super(composer_hf.HuggingFaceModel, self).state_dict(*args, **kwargs)
        state = super(composer_hf.HuggingFaceModel, self).state_dict(*args, **kwargs)
        prefix = f'{kwargs.get("prefix", "")}model.'
        for name in [name for name in state if self._is_frozen(name, prefix)]:
            del state[name]
        return state

    def adapter_state_dict(self) -> dict[str, torch.Tensor]:
        """Of an adapted model, what is not the frozen base model, by the names that PEFT's model gives; sharded as the model is."""
        state = self.model.state_dict()
        return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor) and not self._is_frozen(name, '')}

    @property
    def saves_adapter_only(self) -> bool:
        """Whether checkpoints leave the base model out."""
        return self.using_peft and self.should_save_peft_only

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads weights. Frozen weights of the base model may be missing as long as all are: those come from its own files.

        Raises:
            RuntimeError: ``strict``, and other names are missing or unknown.
        """
        if not self.using_peft or any(self._is_frozen(name) for name in state_dict):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [name for name in result.missing_keys if not self._is_frozen(name)]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(f'the checkpoint does not hold the adapter of this model. Missing: {missing[:8]}; unknown: {result.unexpected_keys[:8]}. Was peft_config changed?')
        return type(result)(missing, result.unexpected_keys)

    def _is_frozen(self, name: str, prefix: str = 'model.') -> bool:
        return plain_name(name).removeprefix(prefix) in getattr(self.model, adapters.FROZEN_NAMES, ())

    def get_metadata(self) -> dict[str, Any]:
        """The files that a checkpoint needs to be exported later: config, adapter config, generation config and tokenizer.

        ``metadata_form`` decides in which form. ``parsed``: Composer's, dictionaries and lists, which its converters read. ``text``: the content of each file as one string, for
        sharded checkpoints, since torch saves a nested dictionary value by value (100,000 for GPT-2's tokenizer: 36 MB of metadata and half a minute per checkpoint) and drops the
        empty ones. ``none``: nothing, while a sharded checkpoint is loaded: torch asks the checkpoint for every value that the state has, and Composer uses none of these.
        """
        if self.metadata_form == 'none':
            return {}
        files = super().get_metadata()
        inner = self.model.get_base_model() if self.using_peft else self.model
        # An adapter belongs to a model of this class; PEFT's own says nothing about it.
        files['model']['config']['class'] = f'{type(inner).__module__}.{type(inner).__name__}'
        if getattr(inner, adapters.RESIZED, False):
            files['model']['config']['resized_embeddings'] = True
        generation = getattr(inner, 'generation_config', None)
        if generation is not None:
            files['model']['generation_config'] = {'file_extension': '.json', 'content': json.loads(generation.to_json_string(use_diff=True))}
        if self.metadata_form == 'text':
            return {group: {name: _as_text(entry) for name, entry in entries.items()} for group, entries in files.items()}
        return files

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Runs the model. With ``labels`` in the batch the output's ``loss`` is a ``LossOutput`` and there are no logits; without, there are logits.

        Args:
            batch: ``input_ids`` (batch, seq) and what else the model's forward takes; other keys are left out. ``sequence_id`` (batch, seq) names each token's document.

        Raises:
            PackingNotSupportedError: rows hold several documents, and the model has no way to keep them apart.
        """
        inputs = {key: value for key, value in batch.items() if key in self.model_forward_args}
        if batch.get('sequence_id') is not None and 'sequence_id' not in inputs:
            inputs = separate_documents(self.model, inputs, batch['sequence_id'], self._packing_routes)
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
        self.labels = shift_labels(batch['labels']) if self.shifts_labels else batch['labels']
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


def _needs_logits(metric: Metric) -> bool:
    """Metrics that take the batch (``needs_batch``) belong to in-context tasks, which never come here."""
    return not getattr(metric, 'accepts_loss_output', False) and not getattr(metric, 'needs_batch', False)


def _as_text(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of Composer's metadata with its content as it stood in the file; what is text or bytes already stays."""
    content = entry['content']
    if entry['file_extension'] == '.json':
        return {**entry, 'content': json.dumps(content, ensure_ascii=False)}
    return {**entry, 'content': '\n'.join(content)} if isinstance(content, list) else entry
