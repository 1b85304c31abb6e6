"""One trained checkpoint, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmfoundry.checkpoint.composer_to_hf import ExportOptions, convert_checkpoint
from tests.helpers.composer_checkpoints import MPT_VARIANTS, TrainedRun, build_mpt, gpt2_tokenizer, train


@pytest.fixture(scope='session')
def alibi_run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return train(build_mpt(gpt2_tokenizer(), **MPT_VARIANTS['alibi']), tmp_path_factory.mktemp('alibi'))


@pytest.fixture(scope='session')
def alibi_folder(alibi_run: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported without the gate, for tests that look at the files."""
    folder = tmp_path_factory.mktemp('export') / 'alibi-hf'
    convert_checkpoint(str(alibi_run.path), folder, ExportOptions(check_parity=False))
    return folder
