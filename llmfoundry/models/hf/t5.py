"""T5 and other encoder-decoder language models for Composer's Trainer: ``model.name: hf_t5``.

Labels are the decoder's targets as they stand; nothing is shifted here. As for causal LMs, our loss takes the decoder's hidden states and the head's weight, so logits are never made;
transformers has no hook before the head, so for the length of that call the head passes its input on.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Iterator, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import Seq2SeqLMOutput

from llmfoundry.models.composer_base import BaseHuggingFaceModel
from llmfoundry.models.hf.fsdp import prepare_hf_model_for_fsdp
from llmfoundry.models.hf.load import load_config, load_model, resolve_attn_implementation
from llmfoundry.models.losses import loss_from_logits

__all__ = ['ComposerHFT5']


class ComposerHFT5(BaseHuggingFaceModel):
    """A transformers encoder-decoder language model, newly initialised or pretrained.

    Batches hold ``input_ids``, ``attention_mask``, ``labels`` and ``decoder_attention_mask``, and ``decoder_input_ids`` or nothing in its place (then the labels moved right).

    Args:
        tokenizer: saved in checkpoints; must not have more tokens than the model unless ``allow_embedding_resizing``.
        pretrained_model_name_or_path: name on the Hub or local folder.
        pretrained: load the weights; False initialises them from the config alone.
        trust_remote_code: run code that the repository brings.
        use_auth_token: token for gated repositories, or True for the one that ``huggingface-cli login`` stored.
        init_device: ``cpu``, ``meta`` (weights come later) or ``mixed`` (only global rank 0 loads weights).
        config_overrides: attributes of the config to set; nested dicts are merged.
        use_train_metrics: whether metrics are computed on training batches.
        allow_embedding_resizing: grow the embeddings to the tokenizer.
        additional_train_metrics: registry names of further metrics on training batches.
        additional_eval_metrics: the same for evaluation.
        attn_implementation: ``sdpa`` or ``eager``, where the model has them; None leaves the choice to transformers.
        loss_fn: ``fused_crossentropy`` or ``torch_crossentropy``.
        name: the registry name, which older configs pass on; ignored.

    Raises:
        ValueError: a model that is not an encoder-decoder, or a value that does not fit; the text names the key.
        RuntimeError: in a run of several processes, loading failed on the ranks that the text names.
    """

    shifts_labels = False
    metric_names = ('language_cross_entropy', 'masked_accuracy')

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        pretrained_model_name_or_path: str,
        pretrained: bool = True,
        trust_remote_code: bool = False,
        use_auth_token: bool | str = False,
        init_device: str = 'cpu',
        config_overrides: Mapping[str, Any] | None = None,
        use_train_metrics: bool = True,
        allow_embedding_resizing: bool = False,
        additional_train_metrics: Sequence[str] | None = None,
        additional_eval_metrics: Sequence[str] | None = None,
        attn_implementation: str | None = None,
        loss_fn: str = 'fused_crossentropy',
        name: str = 'hf_t5',
    ) -> None:
        del name
        attn_implementation = resolve_attn_implementation(attn_implementation, False)
        config = load_config(pretrained_model_name_or_path, trust_remote_code, use_auth_token, attn_implementation, config_overrides)
        if not config.is_encoder_decoder:
            raise ValueError(
                f'model.pretrained_model_name_or_path: hf_t5 trains encoder-decoder models, and {pretrained_model_name_or_path!r} (model type {config.model_type!r}) is not one. '
                'Use hf_causal_lm.',
            )
        model = load_model(pretrained_model_name_or_path, config, pretrained, init_device, trust_remote_code, use_auth_token)
        add_loss_to_decoder(model)
        super().__init__(
            model=model,
            tokenizer=tokenizer,
            loss_fn=loss_fn,
            use_train_metrics=use_train_metrics,
            additional_train_metrics=additional_train_metrics,
            additional_eval_metrics=additional_eval_metrics,
            allow_embedding_resizing=allow_embedding_resizing,
        )
        prepare_hf_model_for_fsdp(model)

    def _logits(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """(batch, decoder seq, vocab) logits by a pass of their own, for metrics that need them."""
        if batch.get('decoder_input_ids') is None:
            batch = {**batch, 'decoder_input_ids': self.model.prepare_decoder_input_ids_from_labels(labels=batch['labels'])}
        return super()._logits(batch)


def add_loss_to_decoder(model: PreTrainedModel) -> None:
    """Makes ``model(..., labels=labels, loss_fn=fn)`` return ``fn``'s ``LossOutput`` as ``loss``, without logits; without ``loss_fn`` nothing changes.

    Args:
        model: changed in place: its class becomes a subclass of itself, as in ``fused_head``.
    """
    cls = type(model)

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss_fn, labels = kwargs.pop('loss_fn', None), kwargs.get('labels')
        if loss_fn is None or labels is None:
            return cls.forward(self, *args, **kwargs)
        del kwargs['labels']
        kwargs['use_cache'] = False
        if kwargs.get('decoder_input_ids') is None:
            kwargs['decoder_input_ids'] = self.prepare_decoder_input_ids_from_labels(labels=labels)
        head = self.get_output_embeddings()
        # BART and its kin add a bias to the logits after the head.
        if not isinstance(head, nn.Linear) or hasattr(self, 'final_logits_bias'):
            return Seq2SeqLMOutput(loss=loss_from_logits(cls.forward(self, *args, **kwargs)['logits'], labels))
        with _passing_on(head):
            hidden = cls.forward(self, *args, **kwargs)['logits']  # (batch, decoder seq, d_model), scaled where the head is tied
        return Seq2SeqLMOutput(loss=loss_fn(hidden, head.weight, labels, bias=head.bias))

    model.__class__ = type(cls.__name__, (cls,), {'forward': forward, '__module__': cls.__module__, '__qualname__': cls.__qualname__, '__doc__': cls.__doc__})


@contextlib.contextmanager
def _passing_on(head: nn.Linear) -> Iterator[None]:
    """For as long as the context lasts, the head returns what it is given."""
    head.forward = lambda hidden: hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward
