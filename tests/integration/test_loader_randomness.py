"""Dropout is the same however the data are read: in the training process or by workers that stay or go, with evaluations in between or without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.train_runs import make_data, run_config, tiny_config, train_losses

WORKERS = {'num_workers': 1, 'prefetch_factor': 1}
EVALUATED = {'eval_interval': '3ba', 'eval_subset_num_batches': 1}


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp('randomness'), num_train=32)


@pytest.fixture(scope='module')
def losses(data: Path) -> list[float]:
    """Of ten steps, over the ends of two epochs, read in the training process."""
    return _losses(data, {}, {})


def _losses(data: Path, loader: dict[str, Any], changes: dict[str, Any]) -> list[float]:
    config = tiny_config(data, max_duration='10ba', **changes)
    assert config['model']['resid_pdrop'] > 0
    if changes:
        block = config['train_loader']
        config['eval_loader'] = {**block, 'drop_last': False, 'dataset': {**block['dataset'], 'split': 'val', 'shuffle': False}}
    config['train_loader'] |= loader
    return train_losses(run_config(config))


@pytest.mark.parametrize(
    ('loader', 'changes'), [({**WORKERS, 'persistent_workers': True}, {}), ({**WORKERS, 'persistent_workers': False}, {}), ({}, EVALUATED)],
    ids=['workers that stay', 'workers that go', 'evaluations'],
)  # fmt: skip
def test_losses_do_not_depend_on_how_data_are_read(data: Path, losses: list[float], loader: dict[str, Any], changes: dict[str, Any]) -> None:
    assert _losses(data, loader, changes) == losses and len(losses) == 10
