"""mono_checkpoint_saver: what is in its files, where they go, and what they do not replace (sharded runs: test_two_ranks)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Timestamp

from llmfoundry.callbacks.monolithic_ckpt_callback import MonolithicCheckpointSaver
from llmfoundry.errors import CheckpointError


class _Fake:
    """As much of a State as saving needs, with weights that are easy to tell."""

    run_name, fsdp_config, is_model_ddp = 'r', None, False

    def __init__(self, batch: int) -> None:
        self.timestamp, self.model = Timestamp(batch=batch), torch.nn.Linear(1, 1)

    def state_dict(self) -> dict[str, Any]:
        return {'model': self.model.state_dict(), 'optimizers': {'big': 1}}


def test_optimizers_are_left_out_unless_asked_for_and_files_are_kept(tmp_path: Path) -> None:
    saver = MonolithicCheckpointSaver(str(tmp_path), batch_interval=2)
    for batch in (1, 2):
        saver.batch_checkpoint(_Fake(batch), None)
    saver.fit_end(_Fake(2), None)
    assert [p.name for p in tmp_path.iterdir()] == ['ep0-ba2.pt']
    assert list(torch.load(tmp_path / 'ep0-ba2.pt', weights_only=False)['state']) == ['model']
    with pytest.raises(CheckpointError, match='ep0-ba2.pt exists already. Set overwrite: true'):
        MonolithicCheckpointSaver(str(tmp_path), batch_interval=1).save(_Fake(2))
    MonolithicCheckpointSaver(str(tmp_path), batch_interval=1, overwrite=True, keep_optimizers=True).save(_Fake(2))
    assert 'optimizers' in torch.load(tmp_path / 'ep0-ba2.pt', weights_only=False)['state']


def test_to_an_object_store(tmp_path: Path) -> None:
    fsspec = pytest.importorskip('fsspec')
    for _ in range(2):
        MonolithicCheckpointSaver('memory://mono/{run_name}', batch_interval=1, overwrite=True).save(_Fake(4))
    assert fsspec.filesystem('memory').exists('/mono/r/ep0-ba4.pt')
    with pytest.raises(CheckpointError, match='memory://mono/r/ep0-ba4.pt exists already'):
        MonolithicCheckpointSaver('memory://mono/{run_name}', batch_interval=1).save(_Fake(4))


def test_an_interval_below_one_batch() -> None:
    with pytest.raises(ValueError, match='at least 1 batch, got 0'):
        MonolithicCheckpointSaver('x', 0)
