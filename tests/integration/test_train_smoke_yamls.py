"""Every smoke YAML trains as shipped, on tiny data in place of the corpus."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.mds import write_token_mds
from tests.helpers.train_runs import ROOT, metrics_of

SMOKE = sorted(p for p in (ROOT / 'yamls/smoke').glob('*.yaml') if p.name != 'quickstart.yaml')
SEQ_LEN, EOS = 128, 50256


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random tokens of a small alphabet with an end-of-text every 50 or so."""
    folder, rng = tmp_path_factory.mktemp('smoke'), np.random.default_rng(0)
    for split, count in (('train', 96), ('val', 24)):
        tokens = rng.integers(1, 40, size=(count, SEQ_LEN))
        write_token_mds(folder / split, np.where(rng.random(tokens.shape) < 0.02, EOS, tokens))
    return folder


def test_all_of_them_are_run() -> None:
    assert len(SMOKE) == 9


@pytest.mark.parametrize('path', SMOKE, ids=lambda p: p.stem)
def test_smoke_yaml_trains(path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    from llmfoundry.command_utils.train import train_from_yaml

    monkeypatch.chdir(ROOT)
    overrides = [f'variables.data_local={data}', 'loggers.inmemory={}']
    if 'folder:' in path.read_text():
        overrides.append(f'variables.folder={tmp_path}')
    trainer = train_from_yaml(str(path), overrides)
    trainer.close()
    losses = metrics_of(trainer, 'loss/train/total')
    assert len(losses) == 8
    assert losses[0] == pytest.approx(np.log(50257) + 0.5, abs=0.7)
    assert losses[-1] < losses[0] - 0.5
    printed = capfd.readouterr().err
    for step in range(1, 9):
        assert f'[batch={step}/8]:\n\t Train LanguageCrossEntropy: {losses[step - 1]:.4f}\n\t Train Perplexity: ' in printed
    if path.stem == 'eval-checkpoint-callbacks':
        evals = metrics_of(trainer, 'metrics/eval/val/LanguageCrossEntropy')
        assert len(evals) == 3 and evals[-1] < evals[0]
        assert sorted(os.listdir(tmp_path / 'checkpoints')) == ['ep0-ba8-rank0.pt', 'latest-rank0.pt']
        assert list((tmp_path / 'tensorboard').rglob('events.*'))
        assert metrics_of(trainer, 'throughput/tokens_per_sec')
