"""Per-step losses of three tiny runs, pinned in a file: a change of numerics anywhere from initialisation to optimiser shows here first.

The runs use a plain loop, so that neither Composer nor the data pipeline is under test. After an intended change of numerics, write the file anew with
``LLMFOUNDRY_UPDATE_GOLDEN=1 pytest tests/golden`` and say in the changelog why the numbers moved.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from llmfoundry.models.losses import get_loss_fn
from llmfoundry.models.mpt.modeling_mpt import MPTForCausalLM
from llmfoundry.optim.adamw import DecoupledAdamW
from tests.helpers.tiny_mpt import tiny_config

PINNED = Path(__file__).with_name('per_step_losses.json')
UPDATE = 'LLMFOUNDRY_UPDATE_GOLDEN'
NUM_STEPS = 5
# Wide enough for other matrix libraries and torch releases, far below what a wrong scale, mask or decay does to five steps at this learning rate.
TOLERANCE = 1e-4

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    'alibi': ('fused_crossentropy', {'attn_config': {'alibi': True}}),
    'rope_gqa_glu_rmsnorm': (
        'fused_crossentropy',
        {
            'attn_config': {'attn_type': 'grouped_query_attention', 'kv_n_heads': 2, 'rope': True, 'rope_impl': 'hf'},
            'ffn_config': {'ffn_type': 'mptglu'}, 'norm_type': 'rmsnorm', 'no_bias': True, 'tie_word_embeddings': False,
        },
    ),
    'learned_torch_crossentropy': ('torch_crossentropy', {}),
}


def losses_of(loss_name: str, settings: dict[str, Any]) -> list[float]:
    """The mean loss before each of the steps."""
    torch.manual_seed(17)
    model = MPTForCausalLM(tiny_config(**settings)).train()
    optimizer = DecoupledAdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-3)
    input_ids = torch.randint(0, 101, (4, 33), generator=torch.Generator().manual_seed(5))  # (batch, seq)
    attention_mask = torch.arange(33) < torch.tensor([[33], [20], [33], [7]])  # (batch, seq), padded on the right
    labels = input_ids.masked_fill(~attention_mask, -100)
    losses = []
    for _ in range(NUM_STEPS):
        output = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, loss_fn=get_loss_fn(loss_name))
        loss = output.loss.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize('name', RUNS)
def test_losses_are_as_pinned(name: str) -> None:
    found = losses_of(*RUNS[name])
    if os.environ.get(UPDATE) == '1':
        pinned = json.loads(PINNED.read_text(encoding='utf-8')) if PINNED.exists() else {}
        PINNED.write_text(json.dumps({**pinned, name: found}, indent=2, sort_keys=True) + '\n', encoding='utf-8')
        pytest.skip(f'{PINNED.name}: wrote the losses of {name}')
    pinned = json.loads(PINNED.read_text(encoding='utf-8'))[name]
    worst = max(abs(a - b) for a, b in zip(found, pinned, strict=True))
    assert worst <= TOLERANCE, f'{name}: losses {found} differ from the pinned {pinned} by up to {worst:.2e}; if that is intended, run with {UPDATE}=1'


def test_the_file_pins_these_runs_and_each_of_them_learns() -> None:
    pinned = json.loads(PINNED.read_text(encoding='utf-8'))
    assert set(pinned) == set(RUNS)
    for losses in pinned.values():
        assert len(losses) == NUM_STEPS and abs(losses[0] - math.log(101)) < 1.5 and losses[-1] < losses[0] - 0.5
