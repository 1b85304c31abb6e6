"""One YAML is one training on 1, 2 and 4 processes, data parallel or sharded: losses, first gradients, and checkpoints that any of them continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.finetuning_runs import finetuning_config, write_jsonl
from tests.helpers.rank_stages import run_stages
from tests.helpers.small_tokenizer import write_small_tokenizer
from tests.helpers.tiny_hf import save_model
from tests.helpers.train_runs import make_data, tiny_config

pytestmark = pytest.mark.slow

STEPS, SAVED_AT = 6, 3
LORA = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': 2, 'lora_alpha': 8, 'target_modules': ['q_proj', 'v_proj'], 'lora_dropout': 0.0}
SGD = {'name': 'sgd', 'lr': 0.5}
FULL = {'sharding_strategy': 'FULL_SHARD', 'mixed_precision': 'FULL', 'state_dict_type': 'full', 'activation_checkpointing': True}
SHARDED = {**FULL, 'sharding_strategy': 'SHARD_GRAD_OP', 'state_dict_type': 'sharded', 'activation_checkpointing': False}
HYBRID = {**SHARDED, 'sharding_strategy': 'HYBRID_SHARD', 'data_parallel_replicate_degree': 2}
WAYS: dict[str, dict[str, Any] | None] = {'ddp': None, 'full': FULL, 'sharded': SHARDED, 'hybrid': HYBRID, 'no_shard': {**FULL, 'sharding_strategy': 'NO_SHARD'}, 'tp': {}}
# KIND-WAY-RANKS: trained from the start, and compared with KIND-ddp-1.
CASES = [
    *(f'{kind}-{way}-2' for kind in ('mpt', 'lora', 'packed') for way in ('ddp', 'full')), 'unpacked-ddp-2', 'mpt-no_shard-2', 'mpt-tp-2', 'mpt-sharded-1',
    'mpt-ddp-4', 'mpt-full-4', 'mpt-hybrid-4', 'lora-full-4', 'packed-ddp-4', 'packed-sharded-4', 'unpacked-full-4',
]
# Of Adam, a run that saves after step 3: what another one goes on from.
SAVING = ('adam-ddp-1', 'adam-sharded-1', 'adam-full-2', 'adam-sharded-4', 'adam-hybrid-4')
LOADING = {
    'adam-ddp-1': ('adam-full-2', 'adam-sharded-4'), 'adam-sharded-1': ('adam-hybrid-4',), 'adam-ddp-2': ('adam-sharded-4',), 'adam-full-2': ('adam-ddp-1', 'adam-hybrid-4'),
    'adam-sharded-2': ('adam-ddp-1', 'adam-sharded-4'), 'adam-sharded-4': ('adam-ddp-1',), 'adam-ddp-4': ('adam-sharded-1',),
}  # fmt: skip
CONTINUED = [(name, saved) for name, sources in LOADING.items() for saved in sources]


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Four kinds of training without dropout; SGD, so that a gradient that is off by a factor shows in the second loss."""
    make_data(folder / 'data')
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = save_model(folder / 'base', 'llama', vocab_size=48, max_position_embeddings=64)
    rows = write_jsonl(folder / 'train.jsonl', 103)
    # A tokenizer of few words, since loading a large one takes longer than these runs.
    mpt = tiny_config(folder / 'data', optimizer=SGD, device_train_microbatch_size=1, tokenizer={'name': write_small_tokenizer(folder / 'tokenizer')})
    mpt['model'] |= {'resid_pdrop': 0.0, 'n_layers': 2, 'vocab_size': 48}
    # A rate of 20 makes training chaotic: one process then gives other losses by 5e-5 when the rate changes by 1e-7.
    lora = {**mpt, 'optimizer': {**SGD, 'lr': 5}, 'model': {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': base, 'pretrained': True, 'peft_config': LORA}}
    source = {'hf_name': 'json', 'hf_kwargs': {'data_files': str(rows), 'cache_dir': str(folder / 'hf')}, 'split': 'train'}
    finetuning = {packing: finetuning_config({**source, 'packing': packing}, optimizer=SGD, device_train_microbatch_size=2) for packing in (True, False)}
    adam = {**mpt, 'optimizer': {'name': 'decoupled_adamw', 'lr': 1e-2}}
    return {'mpt': mpt, 'lora': lora, 'packed': finetuning[True], 'unpacked': finetuning[False], 'adam': adam}


def _config(configs: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    kind, way, _ = name.split('-')
    fsdp, config = WAYS[way], configs[kind]
    # transformers models with the mixed start, where the weights of all ranks are those of rank 0.
    model = {**config['model'], 'init_device': 'mixed'} if kind == 'lora' and fsdp else config['model']
    return {**config, 'model': model, 'fsdp_config': fsdp, 'tp_config': {'strategy': 'ffn', 'tensor_parallel_degree': 2} if way == 'tp' else None}


def _saved(folder: Path, name: str) -> str:
    checkpoint = folder / 'saved' / name / f'ep0-ba{SAVED_AT}'
    return str(checkpoint) if name.split('-')[1] in ('sharded', 'hybrid') else f'{checkpoint}-rank0.pt'


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp('elastic')


@pytest.fixture(scope='module')
def runs(folder: Path) -> dict[str, list[float]]:
    configs = _configs(folder)
    stages: list[dict[str, Any]] = []
    for ranks, what in ((1, 'train'), (4, 'train'), (2, 'train'), (1, 'go on')):
        chosen: dict[str, dict[str, Any]] = {}
        if what == 'train':
            for name in (*CASES, *(f'{kind}-ddp-1' for kind in ('mpt', 'lora', 'packed', 'unpacked'))):
                chosen[name] = {**_config(configs, name), 'callbacks': {'save_gradients': {'path': str(folder / f'{name}.grads.pt')}}}
            # Sharded adapters generate too: PEFT's way to the base model goes past FSDP2's hook.
            chosen['lora-full-2']['callbacks']['generate_callback'] = {'prompts': ['w7'], 'interval': f'{STEPS}ba', 'max_new_tokens': 2, 'do_sample': False}
            for name in SAVING:
                chosen[name] = {**_config(configs, name), 'save_folder': str(folder / 'saved' / name), 'save_interval': f'{SAVED_AT}ba'}
            for way in ('ddp', 'full'):
                oom = {'out_of_memory_on_one_rank': {'above': 1, 'path': str(folder / f'oom-{way}')}}
                chosen[f'oom-{way}-2'] = {**_config(configs, f'mpt-{way}-2'), 'device_train_microbatch_size': 'auto', 'callbacks': oom}
        if what == 'go on' or ranks > 1:
            chosen |= {f'{name}-from-{saved}': {**_config(configs, name), 'load_path': _saved(folder, saved)} for name, saved in CONTINUED}
        stages.append({'ranks': ranks, 'runs': {name: config for name, config in chosen.items() if name.split('-')[2] == str(ranks)}})
    return run_stages(folder, stages)


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


@pytest.mark.parametrize(('name', 'saved'), CONTINUED)
def test_any_checkpoint_is_continued_by_any_run(runs: dict[str, list[float]], name: str, saved: str) -> None:
    """Files and folders, of 1, 2 and 4 processes, by data parallel, sharded and hybrid runs: the weights, Adam's moments and the position in the data come along."""
    reference = runs['adam-ddp-1']
    assert runs[saved] == pytest.approx(reference, rel=0, abs=1e-5)
    assert runs[f'{name}-from-{saved}'] == pytest.approx(reference[SAVED_AT:], rel=0, abs=1e-5)


@pytest.mark.parametrize('way', ['ddp', 'full'])
def test_memory_that_ends_on_one_rank_gives_all_the_smaller_microbatch(runs: dict[str, list[float]], folder: Path, way: str) -> None:
    """The last rank has room for one sample at a time. The other one would take the whole device batch; the run is the one with microbatches of one."""
    assert [(folder / f'oom-{way}.{rank}').read_text() for rank in (0, 1)] == ['1', '1']
    assert runs[f'oom-{way}-2'] == pytest.approx(runs['mpt-ddp-1'], rel=0, abs=1e-5)
