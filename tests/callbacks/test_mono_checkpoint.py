"""mono_checkpoint_saver: one whole file from two FSDP2 ranks whose own checkpoints are sharded, which one process resumes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Timestamp

from llmfoundry.callbacks.monolithic_ckpt_callback import MonolithicCheckpointSaver
from llmfoundry.errors import CheckpointError
from tests.helpers.train_runs import losses_in, make_data, run_config, start_training, tiny_config, train_losses


@pytest.fixture(scope='module')
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, dict[int, float]]:
    folder = tmp_path_factory.mktemp('mono')
    config = tiny_config(make_data(folder / 'data'), max_duration='5ba')
    config['model']['resid_pdrop'] = 0.0
    sharded = {
        **config, 'fsdp_config': {'state_dict_type': 'sharded'}, 'run_name': 'r', 'save_folder': str(folder / 'own'), 'save_interval': '5ba',
        'callbacks': {'mono_checkpoint_saver': {'save_folder': f'{folder}/{{run_name}}/mono', 'batch_interval': 3, 'keep_optimizers': True}},
    }  # fmt: skip
    process = start_training(sharded, folder / 'run', ranks=2)
    assert process.wait(600) == 0, (folder / 'run' / 'out.txt').read_text()[-3000:]
    return config, folder, losses_in(folder / 'run')


def test_files_are_whole(two_ranks: Any) -> None:
    config, folder, _ = two_ranks
    files = sorted((folder / 'r' / 'mono').iterdir())
    assert [f.name for f in files] == ['ep0-ba3.pt', 'ep0-ba5.pt'], 'one at the interval, one at the end, and nothing unfinished'
    weights = torch.load(files[0], map_location='cpu', weights_only=False)['state']['model']
    assert weights['model.transformer.wte.weight'].shape == (config['model']['vocab_size'], config['model']['d_model'])
    assert all(type(w) is torch.Tensor for w in weights.values())
    assert list((folder / 'own').rglob('*.distcp')), "the run's own checkpoints are sharded all the same"


def test_one_process_resumes_from_it(two_ranks: Any) -> None:
    config, folder, losses = two_ranks
    resumed = train_losses(run_config({**config, 'load_path': str(folder / 'r' / 'mono' / 'ep0-ba3.pt')}))
    assert resumed == pytest.approx([losses[3], losses[4]], abs=1e-5)


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
