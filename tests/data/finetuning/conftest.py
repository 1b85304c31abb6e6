"""Caches of these tests lie in their own folders, in this process and in those it starts."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the token stores; the cache of ``datasets`` lies beside it."""
    root = tmp_path_factory.mktemp('caches')
    monkeypatch.setenv('LLMFOUNDRY_CACHE', str(root / 'llmfoundry'))
    monkeypatch.setenv('HF_DATASETS_CACHE', str(root / 'datasets'))
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', root / 'datasets')
    return root / 'llmfoundry'
