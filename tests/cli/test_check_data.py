"""``llmfoundry check data`` as a user meets it: the rows, the page, the JSON and the exit code, from one training YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from typer.testing import CliRunner

from llmfoundry.cli import app
from llmfoundry.command_utils.check_data import loader_blocks, model_vocab_size
from llmfoundry.config.load import load_train_config
from tests.cli.test_commands import light, run
from tests.data.checks.test_template_rules import END_IN_NEXT_HEADER, REWRITES
from tests.helpers.chat_rows import TALK, tokenizer_with
from tests.helpers.mds import write_token_mds
from tests.helpers.tokenizers import save_tokenizer

YAML = """\
max_seq_len: 128
model: {{name: mpt_causal_lm, d_model: 16, n_heads: 2, n_layers: 2, max_seq_len: 128, vocab_size: 50304, attn_config: {{attn_impl: torch}}}}
tokenizer: {{name: {folder}/tokenizer, kwargs: {{model_max_length: 128}}}}
train_loader:
  name: finetuning
  dataset:
    hf_name: json
    hf_kwargs: {{data_files: {{train: {folder}/chats.jsonl}}}}
    split: train
    shuffle: true
    max_seq_len: 128
    decoder_only_format: true
    target_responses: all
    packing: true
  drop_last: true
  num_workers: 2
  persistent_workers: true
  prefetch_factor: 4
  pin_memory: true
eval_loader:
- label: pairs
  name: finetuning
  dataset: {{hf_name: json, hf_kwargs: {{data_files: {{train: {folder}/pairs.jsonl}}}}, split: train, shuffle: false, max_seq_len: 128, decoder_only_format: true}}
  num_workers: 0
- label: text
  name: text
  dataset: {{local: {folder}/text, shuffle: false, max_seq_len: 16}}
  drop_last: false
  num_workers: 0
scheduler: {{name: cosine_with_warmup, t_warmup: 2ba, alpha_f: 0.1}}
optimizer: {{name: decoupled_adamw, lr: 6e-4}}
max_duration: 10ba
global_train_batch_size: 4
device_train_microbatch_size: 4
precision: fp32
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('LLMFOUNDRY_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'datasets')


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data that are as they should be, and tokenizers whose templates are not."""
    root = tmp_path_factory.mktemp('check')
    for name, template in (('tokenizer', None), ('endless', END_IN_NEXT_HEADER), ('rewriting', REWRITES)):
        save_tokenizer(tokenizer_with('chatml', template), root / name)
    (root / 'chats.jsonl').write_text(''.join(json.dumps({'messages': TALK}) + '\n' for _ in range(40)), encoding='utf-8')
    (root / 'pairs.jsonl').write_text(''.join(json.dumps({'prompt': f'{i}?', 'response': f' {i}!'}) + '\n' for i in range(40)), encoding='utf-8')
    write_token_mds(root / 'text', [np.arange(16, dtype=np.int32)] * 20)
    (root / 'run.yaml').write_text(YAML.format(folder=root), encoding='utf-8')
    return root


def check(folder: Path, *args: str) -> Any:
    return CliRunner().invoke(app, ['check', 'data', str(folder / 'run.yaml'), *args])


def test_good_data(folder: Path, tmp_path: Path) -> None:
    result = check(folder, '--rows', '20', '--html', str(tmp_path / 'pages' / 'check.html'))
    assert result.exit_code == 0, result.output
    assert '[[Paris|.|<|im_end|>|\\n]]' in result.stdout and '\x1b' not in result.stdout
    assert result.stdout.count('0 errors, 0 warnings') == 3
    for line in ('train_loader\n', 'eval_loader pairs\n', 'eval_loader text\n', '  trained                     prompts none, responses all, packed\n'):
        assert line in result.stdout, line
    page = (tmp_path / 'pages' / 'check.html').read_text(encoding='utf-8')
    assert page.count('<h2>') == 3 and page.count('No findings.') == 3 and page.count('<h4>row ') >= 60


def test_colours_on_demand(folder: Path) -> None:
    assert '\x1b[30;42m' in check(folder, '--color', '--show', '1').stdout


def test_json(folder: Path) -> None:
    result = check(folder, '--json', '--rows', '10')
    data = json.loads(result.stdout)
    assert (result.exit_code, data['errors'], [x['name'] for x in data['loaders']]) == (0, 0, ['train_loader', 'eval_loader pairs', 'eval_loader text'])
    counts = data['loaders'][0]['counts']
    assert (counts['rows'], counts['source_rows'], counts['messages'], counts['trained_turns']) == (10, 40, {'user': 20, 'assistant': 20}, 20)
    assert 0 < counts['trained_share'] < 1


def test_errors_exit_1_and_name_rule_row_place_and_remedy(folder: Path) -> None:
    result = check(folder, f'tokenizer.name={folder}/endless')
    assert result.exit_code == 1
    assert 'error terminator-not-trained (rows 0, 1, 2, 3, 4, 5, 6, 7 and ' in result.stdout
    assert 'seen in row 0: ' in result.stdout and 'remedy: The model would not learn to stop.' in result.stdout


def test_a_loader_that_fails_does_not_hide_the_others(folder: Path) -> None:
    result = check(folder, f'tokenizer.name={folder}/rewriting', '--json')
    loaders = json.loads(result.stdout)['loaders']
    assert result.exit_code == 1
    assert [*dict.fromkeys(f['rule'] for f in loaders[0]['findings'])] == ['history-rewritten', 'loader-fails']
    assert [bool(x['errors']) for x in loaders] == [True, False, False]


def test_a_preprocessing_function_that_does_not_exist(folder: Path) -> None:
    result = check(folder, 'train_loader.dataset.preprocessing_fn=no_such_module:f', '--json')
    findings = json.loads(result.stdout)['loaders'][0]['findings']
    assert result.exit_code == 1 and [f['rule'] for f in findings] == ['loader-fails'] and 'no_such_module' in findings[0]['seen']


def test_a_model_with_fewer_embeddings_than_the_tokenizer(folder: Path) -> None:
    result = check(folder, 'model.vocab_size=50000', '--json')
    assert result.exit_code == 1
    findings = [f for x in json.loads(result.stdout)['loaders'] for f in x['findings']]
    assert {f['rule'] for f in findings} >= {'tokenizer-larger-than-model'}
    assert 'the embedding of the model 50000 rows' in findings[0]['seen']


def test_overrides_and_bad_configs(folder: Path) -> None:
    result = check(folder, 'train_loader.dataset.target_responses=last', '--json')
    assert json.loads(result.stdout)['loaders'][0]['counts']['trained_turns'] == 40
    result = run('check', 'data', str(folder / 'run.yaml'), 'train_loader.dataset.shufle=true')
    assert result.returncode == 1 and "did you mean 'shuffle'" in result.stderr and 'Traceback' not in result.stderr


def test_help_is_light() -> None:
    for args in (('check', '--help'), ('check', 'data', '--help')):
        result = run(*args)
        assert result.returncode == 0 and light(result), result.stderr
    assert 'check' in run('--help').stdout


def test_vocabulary_of_the_model(tmp_path: Path) -> None:
    assert model_vocab_size({'name': 'mpt_causal_lm', 'vocab_size': 512}) == 512
    (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'gpt2', 'vocab_size': 77}))
    hf = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(tmp_path)}
    assert model_vocab_size(hf) == 77
    assert model_vocab_size({**hf, 'config_overrides': {'vocab_size': 99}}) == 99
    assert model_vocab_size({**hf, 'allow_embedding_resizing': True}) is None
    assert model_vocab_size({**hf, 'pretrained_model_name_or_path': str(tmp_path / 'absent')}) is None


def test_blocks_of_one_evaluation_loader(folder: Path) -> None:
    text = (folder / 'run.yaml').read_text().partition('- label: text')[0] + YAML[YAML.index('scheduler') :].format()
    text = text.replace('- label: pairs\n  name', '  name')
    (folder / 'one.yaml').write_text(text)
    names = [name for name, _, _ in loader_blocks(load_train_config(str(folder / 'one.yaml')))]
    assert names == ['train_loader', 'eval_loader']
