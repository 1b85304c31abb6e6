"""The rest of what a training YAML can ask for, and the ways to start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.train_runs import ROOT, make_data, metrics_of, run_config, tiny_config, train_losses
from tests.helpers.workspace import command_environment


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp('features'))


def _with_eval(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, 'eval_loader': {**config['train_loader'], 'drop_last': False, 'dataset': {**config['train_loader']['dataset'], 'split': 'val', 'shuffle': False}}}


def test_evaluation_first_and_at_intervals(data: Path) -> None:
    config = _with_eval(tiny_config(data, eval_first=True, eval_interval='2ba', device_eval_batch_size=4))
    losses = metrics_of(run_config(config), 'metrics/eval/LanguageCrossEntropy')
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert len(metrics_of(run_config({**config, 'eval_first': False}), 'metrics/eval/LanguageCrossEntropy')) == 3
    assert metrics_of(run_config({**config, 'eval_first': False, 'eval_interval': 0}), 'metrics/eval/LanguageCrossEntropy') == []


def test_training_metric_is_the_loss(data: Path) -> None:
    trainer = run_config(tiny_config(data))
    assert metrics_of(trainer, 'metrics/train/LanguageCrossEntropy') == pytest.approx(train_losses(trainer), rel=1e-5)
    assert metrics_of(trainer, 'metrics/train/LanguagePerplexity') == pytest.approx(torch.exp(torch.tensor(train_losses(trainer))).tolist(), rel=1e-4)


def test_only_composer_checkpoint(data: Path, tmp_path: Path) -> None:
    trainer = run_config(tiny_config(data, only_composer_checkpoint=True, save_folder=str(tmp_path)))
    assert int(trainer.state.timestamp.batch) == 0
    assert sorted(os.listdir(tmp_path)) == ['ep0-ba0-rank0.pt', 'latest-rank0.pt']


def test_only_hf_checkpoint(data: Path, tmp_path: Path) -> None:
    """The way to export what another run saved: its weights are written, and no step is taken."""
    run_config(tiny_config(data, save_folder=str(tmp_path / 'ckpt'), max_duration='2ba', save_interval='2ba'))
    checkpoint = tmp_path / 'ckpt' / 'ep0-ba2-rank0.pt'
    callback = {'hf_checkpointer': {'save_folder': str(tmp_path / 'hf'), 'save_interval': '1ba'}}
    trainer = run_config(tiny_config(data, only_hf_checkpoint=True, load_path=str(checkpoint), callbacks=callback))
    assert int(trainer.state.timestamp.batch) == 2 and train_losses(trainer) == []
    assert os.listdir(tmp_path / 'hf' / 'huggingface') == ['ba2']
    written = load_file(tmp_path / 'hf' / 'huggingface' / 'ba2' / 'model.safetensors')
    saved = torch.load(checkpoint, weights_only=False)['state']['model']
    assert written.keys() <= {name.removeprefix('model.') for name in saved} and len(written) > 5
    assert all(torch.equal(weight, saved[f'model.{name}']) for name, weight in written.items())


def test_profiler_writes_a_trace(data: Path, tmp_path: Path) -> None:
    profiler = {'schedule': {'wait': 0, 'warmup': 1, 'active': 2, 'repeat': 1}, 'json_trace_handler': {'folder': str(tmp_path / 'traces')}, 'torch_prof_folder': str(tmp_path / 'torch')}
    run_config(tiny_config(data, profiler=profiler, run_name='p'))
    assert list((tmp_path / 'traces').rglob('*.json'))


def test_compile_changes_nothing(data: Path) -> None:
    config = tiny_config(data, max_duration='3ba')
    config['model']['resid_pdrop'] = 0.0
    compiled = run_config({**config, 'compile_config': {'backend': 'eager'}, 'device_train_microbatch_size': 'auto'})
    assert train_losses(compiled) == pytest.approx(train_losses(run_config({**config, 'device_train_microbatch_size': 8})), rel=1e-5)


def test_config_metadata_and_parameter_counts_are_logged(data: Path, capsys: pytest.CaptureFixture) -> None:
    trainer = run_config(tiny_config(data, log_config=True, metadata={'experiment': 'e1'}, max_duration='1ba'))
    memory = next(d for d in trainer.logger.destinations if type(d).__name__ == 'InMemoryLogger')
    n_params = sum(p.numel() for p in trainer.state.model.parameters())
    assert memory.hyperparameters['experiment'] == 'e1' and 'metadata' not in memory.hyperparameters
    assert memory.hyperparameters['n_params'] == memory.hyperparameters['n_trainable_params'] == n_params
    out = capsys.readouterr().out
    assert out.count('config:\n') == 1 and out.count('batch: global 8 samples') == 1
    assert f'n_params: {n_params}' in out and ': null' not in out


def test_checkpoint_savers_come_last(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, save_folder=str(tmp_path / 'c'), max_duration='1ba', callbacks={'hf_checkpointer': {'save_folder': str(tmp_path / 'hf'), 'save_interval': '9ba'}, 'lr_monitor': {}})
    names = [type(c).__name__ for c in run_config(config).state.callbacks]
    assert names[-2:] == ['AtomicCheckpointSaver', 'HuggingFaceCheckpointer']


def test_the_allocator_setting_of_the_user_is_kept(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PYTORCH_CUDA_ALLOC_CONF', 'garbage_collection_threshold:0.8')
    run_config(tiny_config(data, max_duration='1ba'))
    assert os.environ['PYTORCH_CUDA_ALLOC_CONF'] == 'garbage_collection_threshold:0.8'
    monkeypatch.delenv('PYTORCH_CUDA_ALLOC_CONF')
    run_config(tiny_config(data, max_duration='1ba', max_split_size_mb=64))
    assert os.environ['PYTORCH_CUDA_ALLOC_CONF'] == 'max_split_size_mb:64,expandable_segments:True'


def _run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=command_environment(), capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize('command', [['composer', 'train.py'], [sys.executable, 'train.py'], ['llmfoundry', 'train']], ids=lambda c: Path(c[0]).name)
def test_the_documented_ways_to_start(data: Path, tmp_path: Path, command: list[str]) -> None:
    """From inside scripts/train, with overrides, as document 002 prints it."""
    path = tmp_path / 'run.yaml'
    path.write_text(json.dumps(tiny_config(data, log_to_console=True, loggers={})))
    if command[0] in ('composer', 'llmfoundry'):
        command = [str(Path(sys.executable).parent / command[0]), *command[1:]]
    done = _run([*command, str(path), 'max_duration=2ba', 'train_loader.dataset.split=val'], ROOT / 'scripts' / 'train')
    assert done.returncode == 0, done.stderr[-3000:]
    assert '[batch=2/2]:\n\t Train LanguageCrossEntropy: ' in done.stdout + done.stderr


def test_usage_error_and_config_error_come_without_torch(tmp_path: Path) -> None:
    script = str(ROOT / 'scripts/train/train.py')
    done = _run([sys.executable, script], tmp_path)
    assert done.returncode == 2 and done.stderr.startswith('usage: train.py CONFIG.yaml')
    path = tmp_path / 'bad.yaml'
    path.write_text('max_seq_len: 16\nmodle: {}\n')
    done = _run([sys.executable, '-X', 'importtime', script, str(path)], tmp_path)
    assert done.returncode == 1 and 'modle' in done.stderr and '| torch\n' not in done.stderr
