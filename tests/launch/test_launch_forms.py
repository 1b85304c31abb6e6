"""The other ways to start two processes, each a real run with the losses of one process: `llmfoundry launch --on local --submit` (composer) and torchrun."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.train_runs import ROOT, losses_in, make_data, run_config, tiny_config, train_losses
from tests.helpers.workspace import run_command

TRAIN = str(ROOT / 'scripts/train/train.py')


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('forms')
    make_data(folder / 'data')
    return folder


def _config(folder: Path, **changes: Any) -> dict[str, Any]:
    config = tiny_config(folder / 'data', **changes)
    config['model']['resid_pdrop'] = 0.0
    return config


@pytest.fixture(scope='module')
def expected(folder: Path) -> list[float]:
    return train_losses(run_config(_config(folder)))


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.mark.parametrize('form', ['launch', 'torchrun'])
def test_losses_are_those_of_one_process(form: str, folder: Path, expected: list[float]) -> None:
    run = folder / form
    run.mkdir()
    (run / 'tiny.yaml').write_text(json.dumps(_config(folder, loggers={'jsonl': {'path': str(run / 'metrics.jsonl')}})))
    port = _free_port()
    command = {
        'launch': f'llmfoundry launch --on local --processes 2 --port {port} --env OMP_NUM_THREADS=1 --script {TRAIN} --submit tiny.yaml',
        'torchrun': f'torchrun --nnodes 1 --nproc-per-node 2 --master-addr 127.0.0.1 --master-port {port} {TRAIN} tiny.yaml',
    }[form]
    done = run_command(command, run)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert 'pre-flight: 2 ranks on 1 node(s) agree' in done.stdout
    assert list(losses_in(run).values()) == pytest.approx(expected, abs=1e-5)
    assert len(expected) == 6
