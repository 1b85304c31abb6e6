"""The mathematics of a run does not depend on the number of ranks, on how they share it, or on the microbatch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.mds import write_text_mds
from tests.helpers.train_runs import SEQ_LEN, run_config, run_script, tiny_config, train_losses

# Plain gradient descent: Adam would hide a gradient that is too large by a factor.
PLUGIN = """
import torch
from llmfoundry.registry import optimizers
optimizers.register('sgd', func=torch.optim.SGD)
"""
RUN_ALL = """
import json, sys
from tests.helpers.train_runs import run_config, train_losses
from llmfoundry import dist
results = [train_losses(run_config(c)) for c in json.load(open(sys.argv[1]))]
if dist.get_global_rank() == 0:
    json.dump(results, open(sys.argv[2], 'w'))
"""


def _uneven_config(folder: Path) -> dict[str, Any]:
    """Texts of 2 to 16 tokens: padding differs between ranks and microbatches."""
    texts = [' '.join(['word'] * (2 + (7 * i) % 15)) for i in range(64)]
    write_text_mds(folder / 'data' / 'train', texts)
    (folder / 'plugin.py').write_text(PLUGIN)
    config = tiny_config(folder / 'data', code_paths=[str(folder / 'plugin.py')], optimizer={'name': 'sgd', 'lr': 0.5})
    config['model'] = {**config['model'], 'resid_pdrop': 0.0}
    config['tokenizer'] = {'name': 'llmfoundry://gpt2', 'kwargs': {'pad_token': '<|endoftext|>'}}
    config['train_loader']['dataset']['shuffle'] = False
    return config


@pytest.fixture(scope='module')
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of six steps: in this process, and in one job of two ranks."""
    folder = tmp_path_factory.mktemp('ranks')
    config = _uneven_config(folder)
    fsdp = {'sharding_strategy': 'FULL_SHARD', 'mixed_precision': 'FULL', 'activation_checkpointing': True, 'state_dict_type': 'full'}
    meta = {**config['model'], 'init_device': 'meta'}
    jobs = {
        'ddp': {**config, 'device_train_microbatch_size': 4},
        'ddp microbatch 1': {**config, 'device_train_microbatch_size': 1},
        'ddp auto': {**config, 'device_train_microbatch_size': 'auto'},
        'fsdp': {**config, 'device_train_microbatch_size': 2, 'fsdp_config': fsdp, 'model': meta},
        'fsdp mixed, clipped': {
            **config, 'device_train_microbatch_size': 'auto', 'fsdp_config': {**fsdp, 'sharding_strategy': 'SHARD_GRAD_OP'}, 'model': {**meta, 'init_device': 'mixed'},
            'algorithms': {'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': 1e-3}},
        },
    }
    (folder / 'jobs.json').write_text(json.dumps(list(jobs.values())))
    (folder / 'run_all.py').write_text(RUN_ALL)
    run_script(folder, folder / 'run_all.py', folder / 'jobs.json', folder / 'out.json')
    found = dict(zip(jobs, json.loads((folder / 'out.json').read_text()), strict=True))
    found['one rank'] = train_losses(run_config({**config, 'device_train_microbatch_size': 8}))
    found['one rank, microbatch 1'] = train_losses(run_config({**config, 'device_train_microbatch_size': 1}))
    found['one rank, clipped'] = train_losses(run_config({**config, 'device_train_microbatch_size': 3, 'algorithms': jobs['fsdp mixed, clipped']['algorithms']}))
    return found


@pytest.mark.parametrize(
    ('name', 'reference'),
    [
        ('one rank, microbatch 1', 'one rank'), ('ddp', 'one rank'), ('ddp microbatch 1', 'one rank'), ('ddp auto', 'one rank'), ('fsdp', 'one rank'),
        ('fsdp mixed, clipped', 'one rank, clipped'),
    ],
)
def test_losses_are_those_of_one_rank(results: dict[str, list[float]], name: str, reference: str) -> None:
    """Six steps of gradient descent: a wrong weight of a rank, a microbatch or a shard would show from the second step on."""
    assert len(results[reference]) == 6
    assert results[name] == pytest.approx(results[reference], rel=2e-6)
    assert abs(results[reference][0] - results[reference][-1]) > 1e-4


def test_seq_len_is_what_the_texts_were_made_for() -> None:
    assert SEQ_LEN == 16
