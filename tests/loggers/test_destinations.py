"""Every logger in a real run, read back with its own tools: files, TensorBoard, MLflow in SQLite and over HTTP, W&B offline."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Iterator

import pytest

from llmfoundry.loggers.metrics_file import read_metrics
from tests.helpers.train_runs import make_data, run_config, tiny_config, train_losses
from tests.helpers.workspace import command_environment

pytestmark = pytest.mark.filterwarnings('ignore::llmfoundry.experimental.ExperimentalWarning')
LOSS = 'loss/train/total'
HAS_MLFLOW = all(importlib.util.find_spec(name) for name in ('mlflow', 'sqlalchemy', 'alembic'))
HAS_SERVER = HAS_MLFLOW and all(importlib.util.find_spec(name) for name in ('flask', 'flask_cors'))
HAS_WANDB = importlib.util.find_spec('wandb') is not None


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory, since MLflow and W&B write into it."""
    folder = tmp_path_factory.mktemp('destinations')
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope='module')
def run(folder: Path) -> tuple[Path, list[float], dict[str, str]]:
    """One run with all of them at once: its folder, its losses, and the tables that it kept in memory."""
    loggers: dict[str, Any] = {
        'inmemory': {}, 'tensorboard': {'log_dir': str(folder / 'tb')}, 'file': {'filename': str(folder / 'log.txt'), 'remote_file_name': 'log.txt'},
        'jsonl': {'path': str(folder / 'metrics.jsonl')},
    }  # fmt: skip
    if HAS_MLFLOW:
        loggers['mlflow'] = {
            'experiment_name': 'tiny', 'tracking_uri': f'sqlite:///{folder}/runs.db', 'synchronous': True, 'log_system_metrics': False, 'tags': {'who': 'test'},
            'rename_metrics': {LOSS: 'the_loss'}, 'ignore_metrics': ['time/*'],
        }  # fmt: skip
    if HAS_WANDB:
        loggers['wandb'] = {'project': 'tiny', 'name': 'mine', 'init_kwargs': {'mode': 'offline', 'dir': str(folder)}}
    generate = {'generate_callback': {'prompts': ['Emma'], 'interval': '3ba', 'max_new_tokens': 2}}
    trainer = run_config(tiny_config(make_data(folder / 'data'), max_duration='3ba', run_name='r', loggers=loggers, log_config=True, callbacks=generate))
    memory = next(d for d in trainer.logger.destinations if type(d).__name__ == 'InMemoryLogger')
    return folder, train_losses(trainer), memory.tables


def test_jsonl(run: Any) -> None:
    assert [value for _, value in read_metrics(run[0] / 'metrics.jsonl', LOSS)] == pytest.approx(run[1])


def test_file(run: Any) -> None:
    lines = [line for line in (run[0] / 'log.txt').read_text().splitlines() if line.startswith('[metric]') and LOSS in line]
    assert len(lines) == 3 and f'{run[1][0]:.4f}' in lines[0]


def test_table_of_generations(run: Any) -> None:
    table = json.loads(run[2]['generations'])
    assert table['columns'] == ['prompt', 'generation'] and table['data'][0][0] == 'Emma' and len(table['data']) == 1


def test_tensorboard(run: Any) -> None:
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator', reason='the tensorboard extra is not installed')
    events = accumulator.EventAccumulator(str(run[0] / 'tb' / 'r'))
    events.Reload()
    assert [e.value for e in events.Scalars(LOSS)] == pytest.approx(run[1], rel=1e-6)


@pytest.mark.skipif(not HAS_MLFLOW, reason='the mlflow extra is not installed')
def test_mlflow_in_sqlite(run: Any) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f'sqlite:///{run[0]}/runs.db')
    (found,) = client.search_runs([client.get_experiment_by_name('tiny').experiment_id])
    assert found.info.status == 'FINISHED' and found.data.tags['who'] == 'test'
    assert found.data.params['max_duration'] == '3ba' and found.data.params['n_params']
    assert [m.value for m in client.get_metric_history(found.info.run_id, 'the_loss')] == pytest.approx(run[1])
    assert not any(name.startswith('time/') for name in found.data.metrics)


@pytest.mark.skipif(not HAS_WANDB, reason='the wandb extra is not installed')
def test_wandb_offline(run: Any) -> None:
    (record,) = (run[0] / 'wandb').glob('offline-run-*/run-*.wandb')
    content = record.read_bytes()
    assert LOSS.encode() in content and b'mine' in content and b'max_duration' in content


@pytest.fixture(scope='module')
def server(folder: Path) -> Iterator[str]:
    """A real MLflow server on loopback, in a process group of its own."""
    if not HAS_SERVER:
        pytest.skip('mlflow, sqlalchemy, alembic, flask and flask-cors are needed for an MLflow server')
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    command = [
        sys.executable, '-m', 'mlflow', 'server', '--host', '127.0.0.1', '--port', str(port), '--workers', '1', '--backend-store-uri', f'sqlite:///{folder}/server.db',
        '--artifacts-destination', str(folder / 'artifacts'),
    ]  # fmt: skip
    with (folder / 'server.log').open('w') as out:
        process = subprocess.Popen(command, cwd=folder, env=command_environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION='false'), stdout=out, stderr=out, start_new_session=True)
    uri = f'http://127.0.0.1:{port}'
    try:
        _wait_until_healthy(uri, process, folder / 'server.log')
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_healthy(uri: str, process: subprocess.Popen, log: Path) -> None:
    for _ in range(1200):
        try:
            with urllib.request.urlopen(f'{uri}/health', timeout=5) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-2000:])


def test_mlflow_over_http_with_the_table_of_losses_by_context(folder: Path, server: str) -> None:
    from mlflow.artifacts import load_dict
    from mlflow.tracking import MlflowClient

    mlflow_logger = {'experiment_name': 'remote', 'tracking_uri': server, 'synchronous': True, 'log_system_metrics': False}
    config = tiny_config(
        make_data(folder / 'more'), max_duration='2ba', loggers={'inmemory': {}, 'mlflow': mlflow_logger}, callbacks={'loss_perp_v_len': {'log_batch_interval': 2, 'compute_batch_interval': 1}},
    )
    config['model']['resid_pdrop'] = 0.0
    losses = train_losses(run_config(config))
    client = MlflowClient(tracking_uri=server)
    (found,) = client.search_runs([client.get_experiment_by_name('remote').experiment_id])
    assert found.info.status == 'FINISHED'
    assert [m.value for m in client.get_metric_history(found.info.run_id, LOSS)] == pytest.approx(losses)
    table = load_dict(f'{found.info.artifact_uri}/loss_perp_v_len.json')
    rows = [dict(zip(table['columns'], row, strict=True)) for row in table['data']]
    assert [(row['step'], row['context_length'], row['num_targets']) for row in rows] == [(2, n, 16) for n in range(1, 16)]
    # Each position holds as many targets as every other, so their mean is the loss of the two batches.
    assert sum(row['mean_loss'] for row in rows) / 15 == pytest.approx(sum(losses) / 2, rel=1e-5)
