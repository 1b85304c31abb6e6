"""Callbacks that need no data: learning-rate scaling, freezing, garbage collection, differences of metrics, and the timeout after training."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from llmfoundry.callbacks.fdiff_callback import FDiffMetrics
from llmfoundry.callbacks.global_lr_scaling import GlobalLRScaling
from llmfoundry.callbacks.layer_freezing import LayerFreezing
from llmfoundry.callbacks.run_timeout_callback import RunTimeoutCallback
from llmfoundry.callbacks.scheduled_gc_callback import ScheduledGarbageCollector
from llmfoundry.errors import ConfigError
from llmfoundry.loggers.metrics_file import read_metrics
from tests.helpers.train_runs import make_data, start_training, tiny_config

pytestmark = pytest.mark.filterwarnings('ignore::llmfoundry.experimental.ExperimentalWarning')


class _Logged:
    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)


@pytest.mark.parametrize(('wd_pct', 'decay'), [(0.0, 0.0), (0.5, 0.025)])
def test_learning_rates_are_scaled_for_optimizer_and_scheduler(wd_pct: float, decay: float) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.1, weight_decay=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    GlobalLRScaling(lr_scale=0.5, wd_pct=wd_pct).fit_start(types.SimpleNamespace(optimizers=[optimizer], schedulers=[scheduler]), None)
    group = optimizer.param_groups[0]
    assert (group['lr'], group['initial_lr'], group['weight_decay']) == pytest.approx((0.05, 0.05, decay))
    optimizer.step()
    scheduler.step()
    assert group['lr'] == pytest.approx(0.025)


def test_freezing_by_name() -> None:
    model = torch.nn.Linear(2, 2)
    LayerFreezing(['weight']).fit_start(types.SimpleNamespace(model=model), None)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {'weight': False, 'bias': True}


@pytest.mark.parametrize(('names', 'text'), [(['weights'], r'no parameter is called weights. The model has: bias, weight'), ([], r'names nothing to freeze')])
def test_freezing_the_wrong_name(names: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        LayerFreezing(names).fit_start(types.SimpleNamespace(model=torch.nn.Linear(2, 2)), None)


def test_names_with_and_without_the_prefix_of_ddp() -> None:
    model = torch.nn.ModuleDict({'module': torch.nn.Linear(2, 2)})
    LayerFreezing(['weight', 'module.bias']).fit_start(types.SimpleNamespace(model=model), None)
    assert not any(p.requires_grad for p in model.parameters())


def test_on_two_ranks_under_ddp(tmp_path: Path) -> None:
    """The callbacks that touch parameters, the loss of each rank, and collectives: a run with all of them ends, and logs what it should."""
    config = tiny_config(make_data(tmp_path / 'data'), max_duration='3ba', save_folder=str(tmp_path / 'saved'), save_interval='1ba', run_name='r', device_train_microbatch_size=2)
    frozen = 'model.transformer.blocks.0.ffn.up_proj.weight'
    config['callbacks'] = {
        'layer_freezing': {'layer_names': [frozen]}, 'global_lr_scaling': {'lr_scale': 0.5}, 'scheduled_gc': {'batch_interval': 2}, 'fdiff_metrics': {'diff_train_metrics': True},
        'kill_loss_spike': {'log_only': False}, 'memory_monitor': {'dist_aggregate_batch_interval': 1}, 'speed_monitor': {'window_size': 1}, 'lr_monitor': {},
        'env_logging': {'workspace_dir': str(tmp_path)}, 'run_timeout': {},
    }  # fmt: skip
    process = start_training(config, tmp_path / 'run', ranks=2)
    assert process.wait(600) == 0, (tmp_path / 'run' / 'out.txt').read_text()[-3000:]
    metrics = tmp_path / 'run' / 'metrics.jsonl'
    assert [value for _, value in read_metrics(metrics, 'lr-DecoupledAdamW/group0')] == pytest.approx([5e-3] * 3)
    losses = [value for _, value in read_metrics(metrics, 'loss/train/total')]
    assert len(losses) == 3 and len(read_metrics(metrics, 'throughput/device/mfu')) == 2 and len(read_metrics(metrics, 'loss/train/total_fdiff')) == 2
    low, high = (read_metrics(metrics, f'memory/current_rss_mem_{end}')[0][1] for end in ('min', 'max'))
    assert 0 < low <= high
    first, last = (torch.load(tmp_path / 'saved' / f'ep0-ba{n}-rank0.pt', weights_only=False)['state']['model'] for n in (1, 3))
    assert {name for name in first if torch.equal(first[name], last[name])} == {frozen}


def _at(batch: int) -> Any:
    return types.SimpleNamespace(timestamp=types.SimpleNamespace(batch=batch))


@pytest.mark.parametrize('keep', [False, True])
def test_garbage_is_collected_on_schedule_only(monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    generations: list[int] = []
    monkeypatch.setattr(gc, 'collect', lambda generation=2: generations.append(generation))
    callback = ScheduledGarbageCollector(batch_interval=4, gen_1_batch_interval=2, eval_keep_disabled=keep)
    try:
        callback.fit_start(_at(0), None)
        assert not gc.isenabled()
        for batch in range(1, 9):
            callback.before_dataloader(_at(batch), None)
        assert generations == [2, 1, 2, 1, 2]
        callback.eval_start(_at(8), None)
        assert gc.isenabled() is not keep
        callback.eval_end(_at(8), None)
        assert not gc.isenabled()
        callback.fit_end(_at(8), None)
        assert gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ValueError, match='batch_interval must be at least 1 batch, got 0'):
        ScheduledGarbageCollector(0)


class _Metric:
    def __init__(self, value: float) -> None:
        self.value = value

    def compute(self) -> float:
        return self.value


def test_differences_of_training_and_evaluation() -> None:
    callback, logged = FDiffMetrics(diff_train_metrics=True), _Logged()
    for loss in (3.0, 2.5):
        callback.batch_end(types.SimpleNamespace(loss={'total': torch.tensor(loss)}, train_metrics={'Acc': _Metric(loss / 10)}), logged)
    for label, value in (('a', 1.0), ('b', 9.0), ('a', 0.25), ('b', 9.5)):
        callback.eval_end(types.SimpleNamespace(dataloader_label=label, eval_metrics={label: {'CE': _Metric(value)}}), logged)
    assert [{k: round(v, 6) for k, v in m.items()} for m in logged.metrics] == [
        {'loss/train/total_fdiff': -0.5, 'metrics/train/Acc_fdiff': -0.05}, {'metrics/a/CE_fdiff': -0.75}, {'metrics/b/CE_fdiff': 0.5},
    ]  # fmt: skip
    with pytest.raises(NotImplementedError, match='several losses without a total'):
        callback.batch_end(types.SimpleNamespace(loss=[torch.tensor(1.0)], train_metrics={}), logged)


def test_a_process_that_hangs_after_training_is_interrupted() -> None:
    code = """
        import time
        from llmfoundry.callbacks.run_timeout_callback import RunTimeoutCallback
        RunTimeoutCallback(timeout=1).fit_end(None, None)
        print('waiting', flush=True)
        time.sleep(60)
    """
    result = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, timeout=55, check=False)
    assert result.returncode in (-signal.SIGINT, 130) and 'has not ended 1 s after' in result.stderr
    with pytest.raises(ValueError, match='positive number of seconds, got 0'):
        RunTimeoutCallback(0)
