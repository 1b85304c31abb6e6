"""Every YAML that we ship passes validation, with and without the schema, and holds the figures that it promises."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from omegaconf import OmegaConf

from llmfoundry.config.load import load_train_config
from llmfoundry.config.schema import train_schema
from llmfoundry.config.train import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = sorted((ROOT / 'yamls' / 'pretrain').glob('*.yaml'))
FINETUNE = sorted((ROOT / 'yamls' / 'finetune').glob('*.yaml'))
EXAMPLE = sorted((ROOT / 'scripts' / 'train' / 'finetune_example').glob('*.yaml'))
TRAINING = sorted(p for folder in ('pretrain', 'smoke', 'finetune') for p in (ROOT / 'yamls' / folder).rglob('*.yaml')) + EXAMPLE
MCLI = sorted((ROOT / 'mcli').glob('*.yaml'))

# size: d_model, n_heads, n_layers, lr, global batch, microbatch, batches, activation checkpointing
MPT_FIGURES = {
    '125m': (768, 12, 12, 6e-4, 256, 16, 4800, False),
    '350m': (1024, 16, 24, 3e-4, 256, 8, 13400, False),
    '760m': (1536, 12, 24, 2.5e-4, 256, 4, 29000, False),
    '1b': (2048, 16, 24, 2e-4, 512, 4, 24800, False),
    '3b': (2560, 20, 32, 1.6e-4, 512, 8, 51500, True),
    '7b': (4096, 32, 32, 1.2e-4, 1024, 8, 63900, True),
    '13b': (5120, 40, 40, 1e-4, 1024, 8, 124000, True),
    '30b': (7168, 56, 48, 1e-4, 2048, 8, 143100, True),
    '70b': (8192, 64, 80, 0.8e-4, 2048, 4, 333800, True),
}


@pytest.fixture(scope='module')
def schema() -> dict[str, Any]:
    return train_schema()


def test_counts() -> None:
    assert len(PRETRAIN) == 17
    assert {p.stem for p in PRETRAIN} == {*(f'mpt-{size}' for size in MPT_FIGURES), 'mpt-small-cpu', 'testing', 'testing-moe', 'gpt-neo-125m', 'gpt-neo-125m_eval',
                                          'gpt2-small', 'opt-3b', 'hf-llama-3.1-8B'}
    assert {p.stem for p in FINETUNE} == {
        '1b_local_data_sft', '7b_dolly_sft', 'mpt-7b_dolly_sft', 'mpt-30b-instruct', 't5-small_dolly_sft', 'llama-3-8b_domain_adapt', 'dbrx-full-ft', 'dbrx-lora-ft',
        'gpt2-arc-easy-cpu-streaming-dataset', 'quickstart-full', 'smollm2-135m-lora',
    }  # fmt: skip
    assert {p.stem for p in EXAMPLE} == {'gpt2-arc-easy--cpu', 'llama-3-8b-arc-easy--gpu'}
    assert len(TRAINING) == 17 + 10 + 11 + 2


@pytest.mark.parametrize('path', TRAINING, ids=lambda p: p.stem)
def test_yaml_is_valid(path: Path) -> None:
    config = load_train_config(path)
    assert isinstance(config, TrainConfig)
    assert not any('no effect' in note for note in config.notes)


@pytest.mark.parametrize('path', TRAINING, ids=lambda p: p.stem)
def test_header_says_purpose_hardware_command_and_loss(path: Path) -> None:
    header = path.read_text().split('\n\n')[0]
    for word in ('# Purpose:', '# Hardware:', '# Command:', '# Expected:'):
        assert word in header
    assert f'{path.parent.name}/{path.name}' in header or 'make ' in header


@pytest.mark.parametrize('size', MPT_FIGURES)
def test_mpt_figures(size: str) -> None:
    config = load_train_config(ROOT / 'yamls' / 'pretrain' / f'mpt-{size}.yaml')
    model, optimizer, fsdp = config.model, config.optimizer, config.fsdp_config or {}
    seen = (model['d_model'], model['n_heads'], model['n_layers'], optimizer['lr'], config.global_train_batch_size, config.device_train_microbatch_size)
    assert (*seen, int(str(config.max_duration).removesuffix('ba')), fsdp['activation_checkpointing']) == MPT_FIGURES[size]
    assert (config.max_seq_len, model['max_seq_len'], model['vocab_size'], config.precision) == (2048, 2048, 50368, 'amp_bf16')
    assert (optimizer['name'], optimizer['betas'], optimizer['weight_decay']) == ('decoupled_adamw', [0.9, 0.95], 0.0)
    assert (config.scheduler['name'], config.scheduler['t_warmup'], config.scheduler['alpha_f']) == ('cosine_with_warmup', '100ba', 0.1)
    assert config.algorithms == {'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': 1.0}}
    assert (fsdp['sharding_strategy'], fsdp['mixed_precision'], config.tokenizer['name']) == ('FULL_SHARD', 'PURE', 'EleutherAI/gpt-neox-20b')


def test_schema_is_a_schema(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema['properties']['seed'] == {
        'anyOf': [{'type': 'integer'}, {'type': 'string', 'pattern': r'\$\{'}], 'default': 17,
        'description': 'Seeds Python, NumPy and torch; 17 as in the published runs, so that a run without the key is repeatable.',
    }  # fmt: skip


@pytest.mark.parametrize('path', TRAINING, ids=lambda p: p.stem)
def test_yaml_fits_the_schema_as_written_and_as_resolved(schema: dict[str, Any], path: Path) -> None:
    validator = jsonschema.Draft202012Validator(schema)
    tree = OmegaConf.load(path)
    for resolve in (False, True):
        errors = [f'{"/".join(map(str, e.absolute_path))}: {e.message[:200]}' for e in validator.iter_errors(OmegaConf.to_container(tree, resolve=resolve))]
        assert errors == []


@pytest.mark.parametrize(('key', 'value'), [
    ('sede', 3), ('seed', 'three'), ('model', {'name': 'mpt_causal_lm', 'd_modl': 3}), ('optimizer', {'name': 'adamw'}), ('optimizer', {'name': 'decoupled_adamw', 'betta': 1}),
    ('train_loader', {'name': 'text', 'dataset': {'shufle': True, 'max_seq_len': 8}, 'num_workers': 0, 'drop_last': True}), ('callbacks', {'lr_monitor': {'x': 1}}),
    ('callbacks', {'lrmonitor': {}}), ('fsdp_config', {'sharding': 'x'}),
])  # fmt: skip
def test_schema_refuses_what_validation_refuses(schema: dict[str, Any], key: str, value: Any) -> None:
    config = OmegaConf.to_container(OmegaConf.load(PRETRAIN[0]), resolve=True)
    assert isinstance(config, dict)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(config)
    assert not validator.is_valid({**config, key: value})


@pytest.mark.parametrize('stem', ['dbrx-full-ft', 'dbrx-lora-ft', 'mpt-7b_dolly_sft', 'mpt-30b-instruct', '7b_dolly_sft', '1b_local_data_sft'])
def test_finetuning_batches_divide_over_the_gpus_that_the_header_names(stem: str) -> None:
    path = ROOT / 'yamls' / 'finetune' / f'{stem}.yaml'
    config = load_train_config(path)
    gpus = int(re.search(r'# Hardware: (\d+) GPUs', path.read_text())[1])
    device_batch, rest = divmod(config.global_train_batch_size, gpus)
    assert rest == 0 and device_batch % config.device_train_microbatch_size == 0
    assert config.train_loader['dataset']['decoder_only_format'] is True


def test_lora_figures() -> None:
    peft = load_train_config(ROOT / 'yamls' / 'finetune' / 'dbrx-lora-ft.yaml').model['peft_config']
    assert (peft['r'], peft['lora_alpha'], list(peft['target_modules'])) == (64, 128, ['Wqkv'])


def test_launch_files_refer_to_yamls_that_exist() -> None:
    assert {p.stem for p in MCLI} >= {'mcli-1b', 'mcli-1b-max-seq-len-8k', 'mcli-convert-composer-to-hf', 'mcli-hf-generate', 'mcli-benchmark-mpt', 'mcli-pretokenize-oci-upload',
                                      'mcli-llama3-finetune', 'mcli-llama3-70b-instruct-finetune'}
    for path in MCLI:
        launch = yaml.safe_load(path.read_text())
        assert {'name', 'image', 'compute', 'integrations', 'command'} <= set(launch), path
        if 'parameters' in launch:
            config = load_train_config(launch['parameters'])
            assert config.global_train_batch_size % launch['compute']['gpus'] == 0 and '/mnt/config/parameters.yaml' in launch['command']
        for word in launch['command'].replace('/mnt/config/parameters.yaml' if 'parameters' in launch else '', '').split():
            if word.endswith(('.py', '.yaml')):
                folder = ROOT / launch['command'].split()[1].removeprefix('llm-foundry/')
                assert (folder / word).exists(), f'{path.name}: {word}'
