"""``process_init_device`` as plug-ins call it: dicts edited in place, a context returned."""

from __future__ import annotations

import contextlib

import pytest

from llmfoundry.utils.config_utils import process_init_device


@pytest.mark.parametrize(('given', 'expected'), [('meta', 'cpu'), ('cpu', 'cpu'), ('mixed', 'cpu')])
def test_one_process_without_fsdp(given: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    model = {'name': 'mpt_causal_lm', 'init_device': given}
    fsdp = {'sharding_strategy': 'FULL_SHARD'}
    context = process_init_device(model, fsdp)
    assert model['init_device'] == expected and isinstance(context, contextlib.nullcontext)
    assert fsdp == {'sharding_strategy': 'FULL_SHARD'}


def test_other_ranks_of_mixed_build_without_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for name, value in (('WORLD_SIZE', '2'), ('RANK', '1')):
        monkeypatch.setenv(name, value)
    model, fsdp = {'name': 'mpt_causal_lm', 'init_device': 'mixed'}, {}
    with process_init_device(model, fsdp):
        layer = torch.nn.Linear(2, 2)
    assert layer.weight.is_meta and model['init_device'] == 'meta' and fsdp == {'load_monolith_rank0_only': True}


def test_an_absent_key_stays_absent() -> None:
    model = {'name': 'mpt_causal_lm'}
    process_init_device(model)
    assert model == {'name': 'mpt_causal_lm'}
