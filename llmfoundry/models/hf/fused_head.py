"""Gives a transformers causal LM a forward that computes our loss from hidden states, without logits.

transformers has no hook between decoder and head, so the model's class is replaced by a subclass whose ``forward`` also takes ``loss_fn``. That works inside
the root module's forward (sharded weights are whole there), through PEFT, and on copies of the model. Heads differ in more than their weight:
scales and caps are read from the config, and the first call compares the result with the model's own logits on a few tokens. A model that
disagrees, or whose head is not one linear layer, keeps its own logits and gets the same loss from them.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmfoundry import dist
from llmfoundry.models.losses import LossFn, LossOutput, head_logits, loss_from_logits, shift_labels

__all__ = ['add_loss_to_forward']

log = logging.getLogger(__name__)

_CHECK_TOKENS = 8
_TOLERANCE = 2e-2  # of the logits' norm: above what bf16 rounding does, below what a missing scale does


def add_loss_to_forward(model: PreTrainedModel) -> PreTrainedModel:
    """Makes ``model(..., labels=labels, loss_fn=fn)`` return ``fn``'s ``LossOutput`` as ``loss``; without ``loss_fn`` nothing changes.

    Args:
        model: a transformers causal LM; changed in place.

    Returns:
        The same object.
    """
    cls = type(model)

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss_fn = kwargs.pop('loss_fn', None)
        labels = kwargs.get('labels')
        if loss_fn is None or labels is None:
            return cls.forward(self, *args, **kwargs)
        del kwargs['labels']
        kwargs['use_cache'] = False
        if self._fuse_head is None:
            self._fuse_head = _can_fuse(self, cls, args, kwargs)
        if not self._fuse_head:
            logits = cls.forward(self, *args, **kwargs)['logits']
            return CausalLMOutputWithPast(loss=loss_from_logits(logits, shift_labels(labels)))
        return CausalLMOutputWithPast(loss=_fused(self, loss_fn, labels, args, kwargs))

    # None: not checked yet. Class attributes, so that no submodule or state dict sees them.
    body = {'forward': forward, '_fuse_head': None, '__module__': cls.__module__, '__qualname__': cls.__qualname__, '__doc__': cls.__doc__}
    model.__class__ = type(cls.__name__, (cls,), body)
    return model


def _fused(model: Any, loss_fn: LossFn, labels: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LossOutput:
    hidden = _last_hidden_state(model, args, kwargs)
    head = model.get_output_embeddings()
    return loss_fn(hidden, head.weight, shift_labels(labels), bias=head.bias, logit_scale=_logit_scale(model.config), softcap=_softcap(model.config))


def _last_hidden_state(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """(batch, seq, hidden_size), after the final norm."""
    return _decoder(model)(*args, **{**kwargs, 'return_dict': True})[0]


def _decoder(model: Any) -> Any:
    """What stands before the head. ``base_model`` is the model itself where its prefix names no attribute (Gemma 3 before transformers 5)."""
    return model.base_model if model.base_model is not model else model.get_decoder()


def _logit_scale(config: Any) -> float | None:
    """Cohere multiplies the logits by ``logit_scale``, Granite divides them by ``logits_scaling``."""
    if getattr(config, 'logit_scale', None) is not None:
        return config.logit_scale
    divisor = getattr(config, 'logits_scaling', None)
    return None if divisor is None else 1.0 / divisor


def _softcap(config: Any) -> float | None:
    return getattr(config, 'final_logit_softcapping', None)


def _can_fuse(model: Any, cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether hidden states times the head's weight give this model's logits; decided once, the same on every rank, since ranks run collectives in step."""
    if dist.all_reduce_min(int(_has_plain_head(model, args))) == 0:
        log.warning('%s: its head is not one linear layer after the decoder (or it adds a loss of its own), so the loss is computed from full logits.', cls.__name__)
        return False
    if dist.all_reduce_min(int(_agrees_on_a_few_tokens(model, cls, kwargs))) == 0:
        log.warning('%s: hidden states times head do not give its own logits (an unknown scaling in the head?), so the loss is computed from full logits.', cls.__name__)
        return False
    return True


def _has_plain_head(model: Any, args: tuple[Any, ...]) -> bool:
    head = model.get_output_embeddings()
    # An adapter around the head (LoRA, modules_to_save) computes more than weight and bias say.
    is_linear = isinstance(head, nn.Linear) and not hasattr(head, 'base_layer')
    adds_router_loss = bool(getattr(model.config, 'output_router_logits', False))
    return is_linear and not args and _decoder(model) not in (None, model) and not adds_router_loss


@torch.compiler.disable
@torch.no_grad()
def _agrees_on_a_few_tokens(model: Any, cls: type, kwargs: dict[str, Any]) -> bool:
    """Compares both ways on the first tokens of the first row, without dropout."""
    inputs = {key: kwargs[key][:1, :_CHECK_TOKENS] for key in ('input_ids', 'inputs_embeds') if kwargs.get(key) is not None}
    inputs['use_cache'] = False
    training_modules = [module for module in model.modules() if module.training]
    for module in training_modules:
        module.training = False
    try:
        head = model.get_output_embeddings()
        logits = head_logits(_last_hidden_state(model, (), inputs), head.weight, head.bias, _logit_scale(model.config), _softcap(model.config)).float()
        own = cls.forward(model, **inputs)['logits'].float()
    finally:
        for module in training_modules:
            module.training = True
        # Autocast keeps the weights that it has cast; these were cast without gradients, and the pass that follows would train nothing.
        torch.clear_autocast_cache()
    return bool((logits - own).norm() <= _TOLERANCE * own.norm())
