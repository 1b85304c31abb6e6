"""One YAML is one training on 1, 2 and 4 processes, data parallel or sharded: losses, first gradients, and checkpoints that any of them continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.finetuning_runs import finetuning_config, write_jsonl
from tests.helpers.rank_stages import run_stages
from tests.helpers.tiny_hf import save_model
from tests.helpers.train_runs import make_data, tiny_config

STEPS, SAVED_AT = 6, 3
LORA = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': 2, 'lora_alpha': 8, 'target_modules': ['q_proj', 'v_proj'], 'lora_dropout': 0.0}
SGD = {'name': 'sgd', 'lr': 0.5}
FSDP = {'sharding_strategy': 'FULL_SHARD', 'mixed_precision': 'FULL', 'state_dict_type': 'full', 'activation_checkpointing': True}
HYBRID = {**FSDP, 'sharding_strategy': 'HYBRID_SHARD', 'data_parallel_replicate_degree': 2, 'activation_checkpointing': False}
KINDS = ('mpt', 'lora', 'packed', 'unpacked')
WAYS: dict[str, dict[str, Any] | None] = {'ddp': None, 'fsdp': FSDP}


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Four kinds of training without dropout; SGD, so that a gradient that is off by a factor shows in the second loss."""
    make_data(folder / 'data')
    base = save_model(folder / 'base', 'llama', vocab_size=50304, max_position_embeddings=64)
    rows = write_jsonl(folder / 'train.jsonl', 103)
    mpt = tiny_config(folder / 'data', optimizer=SGD, device_train_microbatch_size=1)
    mpt['model'] |= {'resid_pdrop': 0.0, 'n_layers': 2}
    lora = {**mpt, 'optimizer': {**SGD, 'lr': 20}, 'model': {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': base, 'pretrained': True, 'peft_config': LORA}}
    source = {'hf_name': 'json', 'hf_kwargs': {'data_files': str(rows), 'cache_dir': str(folder / 'hf')}, 'split': 'train'}
    finetuning = {packing: finetuning_config({**source, 'packing': packing}, optimizer=SGD, device_train_microbatch_size=2) for packing in (True, False)}
    return {'mpt': mpt, 'lora': lora, 'packed': finetuning[True], 'unpacked': finetuning[False]}


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('elastic')


@pytest.fixture(scope='module')
def runs(folder: Path) -> dict[str, list[float]]:
    configs, stages = _configs(folder), []
    for ranks in (1, 2, 4):
        chosen: dict[str, dict[str, Any]] = {}
        for kind, config in configs.items():
            for way, fsdp in {**WAYS, **({'hybrid': HYBRID} if ranks == 4 and kind == 'mpt' else {})}.items():
                name = f'{kind}-{way}-{ranks}'
                # HF modules with the mixed start, where the weights are those of rank 0.
                model = {**config['model'], 'init_device': 'mixed'} if kind == 'lora' and fsdp else config['model']
                chosen[name] = {**config, 'model': model, 'fsdp_config': fsdp, 'callbacks': {'save_gradients': {'path': str(folder / f'{name}.grads.pt')}}}
        stages.append({'ranks': ranks, 'runs': chosen})
    return run_stages(folder, stages)


CASES = [f'{kind}-{way}-{ranks}' for kind in KINDS for way in WAYS for ranks in (1, 2, 4) if (way, ranks) != ('ddp', 1)] + ['mpt-hybrid-4']


@pytest.mark.parametrize('case', CASES)
def test_losses_are_those_of_one_process(runs: dict[str, list[float]], case: str) -> None:
    reference = runs[f'{case.split("-")[0]}-ddp-1']
    assert len(reference) == STEPS and abs(reference[0] - reference[-1]) > 1e-3
    assert runs[case] == pytest.approx(reference, rel=0, abs=1e-5)


@pytest.mark.parametrize('case', CASES)
def test_first_gradients_are_those_of_one_process(runs: dict[str, list[float]], folder: Path, case: str) -> None:
    del runs
    reference = torch.load(folder / f'{case.split("-")[0]}-ddp-1.grads.pt')
    found = torch.load(folder / f'{case}.grads.pt')
    assert set(found) == set(reference) and max(float(g.abs().max()) for g in reference.values()) > 1e-3
    for name, gradient in reference.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-6, msg=lambda m, n=name: f'{n}: {m}')
