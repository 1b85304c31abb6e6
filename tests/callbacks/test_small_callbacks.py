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
from composer.utils import reproducibility

from llmfoundry.callbacks.fdiff_callback import FDiffMetrics
from llmfoundry.callbacks.global_lr_scaling import GlobalLRScaling
from llmfoundry.callbacks.layer_freezing import LayerFreezing
from llmfoundry.callbacks.rng_restorer import RNGRestorer
from llmfoundry.callbacks.run_timeout_callback import RunTimeoutCallback
from llmfoundry.callbacks.scheduled_gc_callback import ScheduledGarbageCollector
from llmfoundry.errors import ConfigError
from llmfoundry.optim.parameter_names import plain_name
from tests.helpers.train_runs import make_data, run_config, tiny_config

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


def test_names_in_a_run_that_recomputes_activations(tmp_path: Path) -> None:
    frozen = 'model.transformer.blocks.0.ffn.up_proj.weight'
    config = tiny_config(make_data(tmp_path), max_duration='2ba', fsdp_config={'activation_checkpointing': True}, callbacks={'layer_freezing': {'layer_names': [frozen]}})
    model = run_config(config).state.model
    wrapped = {name: parameter for name, parameter in model.named_parameters() if plain_name(name) == frozen}
    assert list(wrapped) != [frozen] and not any(p.requires_grad for p in wrapped.values())
    assert sum(not p.requires_grad for p in model.parameters()) == 1


@pytest.mark.parametrize('event', ['epoch_start', 'batch_start'])
def test_random_state_comes_back_once(event: str) -> None:
    """Of a checkpoint taken after an epoch's last batch before the next epoch begins, since its loader draws a seed; else before the first batch."""
    torch.manual_seed(1)
    state = reproducibility.get_rng_state()
    wanted = torch.rand(3)
    restorer = RNGRestorer(state)
    torch.manual_seed(2)
    getattr(restorer, event)(None, None)
    assert torch.equal(torch.rand(3), wanted)
    restorer.batch_start(None, None)
    assert not torch.equal(torch.rand(3), wanted)


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
        time.sleep(300)
    """
    result = subprocess.run([sys.executable, '-c', textwrap.dedent(code)], capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode in (-signal.SIGINT, 130) and 'has not ended 1 s after' in result.stderr
    with pytest.raises(ValueError, match='positive number of seconds, got 0'):
        RunTimeoutCallback(0)
