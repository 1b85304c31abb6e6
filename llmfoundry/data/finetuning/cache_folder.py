"""Where finetuning data are cached: ``LLMFOUNDRY_CACHE``, else below the cache of ``datasets``."""

from __future__ import annotations

import os
from pathlib import Path

import datasets

__all__ = ['cache_folder']


def cache_folder() -> Path:
    """The folder, not made yet."""
    chosen = os.environ.get('LLMFOUNDRY_CACHE')
    return Path(chosen).expanduser() if chosen else Path(datasets.config.HF_DATASETS_CACHE) / 'llmfoundry'
