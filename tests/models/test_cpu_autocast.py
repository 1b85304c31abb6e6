"""bf16 on the CPU: products in bf16, parameters, gradients and loss in float32, through a real Trainer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from llmfoundry.models.cpu_autocast import wrap_forward
from tests.helpers.one_step import one_step, padded_rows
from tests.models.test_composer_mpt import SEQ_LEN, VOCAB, batch_of, build


def test_products_are_bf16_and_the_rest_float32() -> None:
    model = wrap_forward(build())
    seen: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: o.dtype}))
            module.register_full_backward_hook(lambda m, i, o, name=name: seen.update({name + ' backward': o[0].dtype}))
    batch = batch_of(padded_rows(2, SEQ_LEN, VOCAB))
    loss = model.loss(model(batch), batch)
    assert loss.dtype == torch.float32
    loss.backward()
    assert seen and set(seen.values()) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.parameters())
    assert not torch.is_autocast_enabled('cpu')


def test_a_step_is_close_to_float32_but_not_equal() -> None:
    rows, model = padded_rows(4, SEQ_LEN, VOCAB), build()
    exact = one_step(copy.deepcopy(model), rows, 2)
    rounded = one_step(wrap_forward(copy.deepcopy(model)), rows, 2)
    assert rounded['loss'] != exact['loss']
    assert rounded['loss'] == pytest.approx(exact['loss'], rel=1e-2)
    for name, gradient in exact['gradients'].items():
        assert (rounded['gradients'][name] - gradient).norm() < 0.1 * gradient.norm() + 1e-4, name


def test_copies_wrap_themselves() -> None:
    model = wrap_forward(build())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    batch = {'input_ids': torch.zeros(1, 4, dtype=torch.long)}
    assert twin(batch)['logits'].abs().sum() == 0 and model(batch)['logits'].abs().sum() > 0
    assert twin(batch)['logits'].dtype == torch.bfloat16


def test_wraps_once_and_keeps_the_class_name() -> None:
    model: Any = build()
    wrapped = wrap_forward(wrap_forward(model))
    assert wrapped is model and type(model).__name__ == 'ComposerMPTCausalLM'
    assert len([c for c in type(model).__mro__ if 'cpu_autocast_dtype' in c.__dict__]) == 1


def test_float16_is_refused() -> None:
    with pytest.raises(ValueError, match='float16 is not offered.*amp_bf16'):
        wrap_forward(build(), torch.float16)
