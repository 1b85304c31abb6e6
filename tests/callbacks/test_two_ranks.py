"""Callbacks on two ranks: whole files from sharded runs, what touches parameters before and after DDP wraps them, data mixes with workers, and one verdict for all ranks."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmfoundry.loggers.metrics_file import read_metrics
from tests.helpers.mds import write_token_mds
from tests.helpers.train_runs import SEQ_LEN, make_data, run_config, tiny_config, train_losses
from tests.helpers.warm_launcher import WarmLauncher


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp('two_ranks'))


def _run(launcher: WarmLauncher, folder: Path, config: dict[str, Any], code: int = 0) -> Path:
    """Trains on two ranks and returns the metrics file."""
    folder.mkdir(parents=True)
    (folder / 'config.yaml').write_text(json.dumps({**config, 'loggers': {'jsonl': {'path': str(folder / 'metrics.jsonl')}}}))
    job = launcher.start(folder, [str(folder / 'config.yaml')])
    assert job.wait(500) == code, job.output()[-3000:]
    return folder / 'metrics.jsonl'


def _losses(metrics: Path) -> list[float]:
    return [value for _, value in read_metrics(metrics, 'loss/train/total')]


def test_one_whole_file_from_sharded_ranks(launcher: WarmLauncher, data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, max_duration='5ba')
    config['model']['resid_pdrop'] = 0.0
    mono = {'mono_checkpoint_saver': {'save_folder': f'{tmp_path}/{{run_name}}/mono', 'batch_interval': 3, 'keep_optimizers': True}}
    sharded = {**config, 'fsdp_config': {'state_dict_type': 'sharded'}, 'run_name': 'r', 'save_folder': str(tmp_path / 'own'), 'save_interval': '5ba', 'callbacks': mono}
    losses = _losses(_run(launcher, tmp_path / 'run', sharded))
    files = sorted((tmp_path / 'r' / 'mono').iterdir())
    assert [f.name for f in files] == ['ep0-ba3.pt', 'ep0-ba5.pt'], 'one at the interval, one at the end, and nothing unfinished'
    weights = torch.load(files[0], map_location='cpu', weights_only=False)['state']['model']
    assert weights['model.transformer.wte.weight'].shape == (config['model']['vocab_size'], config['model']['d_model'])
    assert all(type(w) is torch.Tensor for w in weights.values())
    assert list((tmp_path / 'own').rglob('*.distcp')), "the run's own checkpoints are sharded all the same"
    resumed = train_losses(run_config({**config, 'load_path': str(files[0])}))
    assert resumed == pytest.approx(losses[3:], abs=1e-5), 'one process resumes from it'


def test_callbacks_under_ddp(launcher: WarmLauncher, data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, max_duration='3ba', save_folder=str(tmp_path / 'saved'), save_interval='1ba', run_name='r', device_train_microbatch_size=2)
    frozen = 'model.transformer.blocks.0.ffn.up_proj.weight'
    config['callbacks'] = {
        'layer_freezing': {'layer_names': [frozen]}, 'global_lr_scaling': {'lr_scale': 0.5}, 'scheduled_gc': {'batch_interval': 2}, 'fdiff_metrics': {'diff_train_metrics': True},
        'kill_loss_spike': {'log_only': False}, 'memory_monitor': {'dist_aggregate_batch_interval': 1}, 'speed_monitor': {'window_size': 1}, 'lr_monitor': {},
        'env_logging': {'workspace_dir': str(tmp_path)}, 'run_timeout': {},
    }  # fmt: skip
    metrics = _run(launcher, tmp_path / 'run', config)
    assert [value for _, value in read_metrics(metrics, 'lr-DecoupledAdamW/group0')] == pytest.approx([5e-3] * 3)
    assert len(_losses(metrics)) == 3 and len(read_metrics(metrics, 'throughput/device/mfu')) == 2 and len(read_metrics(metrics, 'loss/train/total_fdiff')) == 2
    low, high = (read_metrics(metrics, f'memory/current_rss_mem_{end}')[0][1] for end in ('min', 'max'))
    assert 0 < low <= high
    first, last = (torch.load(tmp_path / 'saved' / f'ep0-ba{n}-rank0.pt', weights_only=False)['state']['model'] for n in (1, 3))
    assert {name for name in first if torch.equal(first[name], last[name])} == {frozen}


def test_mixes_on_two_ranks_are_those_of_one(launcher: WarmLauncher, tmp_path: Path) -> None:
    """Streamed with workers into folders that the mixes share."""
    rng = np.random.default_rng(0)
    for name, low in (('a', 1), ('b', 1000)):
        write_token_mds(tmp_path / 'remote' / name / 'train', rng.integers(low, low + 40, size=(24, SEQ_LEN)))

    def config(cache: str, num_workers: int) -> dict[str, Any]:
        streams = {name: {'remote': str(tmp_path / 'remote' / name), 'local': str(tmp_path / cache / name), 'split': 'train'} for name in 'ab'}
        dataset = {'shuffle': True, 'max_seq_len': SEQ_LEN}
        made = tiny_config(tmp_path, max_duration='3ep')
        made['model']['resid_pdrop'], made['scheduler']['t_warmup'] = 0.0, '0ep'
        made['train_loader'] = {'name': 'text', 'drop_last': True, 'num_workers': num_workers, 'dataset': {**dataset, 'streams': {'a': streams['a']}}}
        made['callbacks'] = {'curriculum_learning': {'duration': '1ep', 'schedule': [{'duration': '2ep', 'dataset': {**dataset, 'streams': streams}}]}}
        return made

    alone = train_losses(run_config(config('one', 0)))
    assert len(alone) == 3 + 2 * 6
    assert _losses(_run(launcher, tmp_path / 'run', config('two', 1))) == pytest.approx(alone, abs=1e-5)


def test_rank_zero_decides_on_a_spike_for_all(launcher: WarmLauncher, data: Path, tmp_path: Path) -> None:
    plug_in = tmp_path / 'plug_in.py'
    plug_in.write_text(textwrap.dedent(f"""
        from pathlib import Path
        import torch
        from llmfoundry import dist, registry
        from llmfoundry.callbacks.kill_loss_spike_callback import KillLossSpike
        from llmfoundry.errors import LossSpikeError

        LOSSES = [[1.0, 1.0, 1.0, 5.0, 5.0, 1.0], [1.0] * 6]

        @registry.callbacks.register('spiky')
        class Spiky(KillLossSpike):
            def batch_end(self, state, logger):
                rank, batch = dist.get_global_rank(), int(state.timestamp.batch)
                state.loss = torch.tensor(LOSSES[rank][batch - 1])
                try:
                    super().batch_end(state, logger)
                except LossSpikeError:
                    Path({str(tmp_path)!r}, f'rank{{rank}}').write_text(str(batch))
                    raise
    """))
    config = tiny_config(data, code_paths=[str(plug_in)], callbacks={'spiky': {'log_only': False, 'patience': 2, 'window_size': 3}})
    _run(launcher, tmp_path / 'run', config, code=1)
    assert [(tmp_path / f'rank{rank}').read_text() for rank in (0, 1)] == ['5', '5']
