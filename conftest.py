"""Settings that every test needs: offline hubs, one thread per process, the repository root on sys.path."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('OMP_NUM_THREADS', '1')

ROOT = Path(__file__).resolve().parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope='session')
def launcher() -> Any:
    """Composer's launcher with torch imported, for runs of several processes."""
    from tests.helpers.warm_launcher import shared_launcher

    return shared_launcher()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with the mark ``first`` go first."""
    items.sort(key=lambda item: item.get_closest_marker('first') is None)
