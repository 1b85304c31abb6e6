"""A few faults of the campaign; all of them are ``python -m tests.faults``."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.campaign import Campaign, prepare, produce, table
from tests.faults.kinds import KINDS
from tests.faults.object_store import OBJECT_STORE_KINDS
from tests.helpers.warm_launcher import WarmLauncher

FEW = ('kill rank 1', 'kill all in a write', 'flipped bit in a checkpoint')


@pytest.fixture(scope='module')
def campaign(launcher: WarmLauncher, tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return prepare(tmp_path_factory.mktemp('faults'), launcher)


@pytest.mark.parametrize('name', FEW)
def test_a_fault(campaign: Campaign, tmp_path: Path, name: str) -> None:
    fault = next(kind for kind in KINDS if kind.name == name)
    row = produce(campaign, fault, tmp_path, random.Random())
    assert row.passed, row.line()
    assert row.status in ('survived', 'refused') and 'bit-identical' in row.outcome.result
    assert f'| {row.outcome.fault} |' in table([row])


def test_the_campaign_has_at_least_thirty_faults_under_different_names() -> None:
    kinds = [*KINDS, *OBJECT_STORE_KINDS]
    assert sum(kind.times for kind in kinds) >= 30
    assert len({kind.name for kind in kinds}) == len(kinds)
