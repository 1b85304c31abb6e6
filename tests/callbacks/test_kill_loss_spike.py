"""Spikes and losses that stay high: when they are seen, when not, and across a resume."""

from __future__ import annotations

import types
from typing import Any, Iterable

import pytest
import torch
from composer.core import Time, Timestamp

from llmfoundry.callbacks.kill_loss_spike_callback import KillLossSpike
from llmfoundry.errors import HighLossError, LossSpikeError

pytestmark = pytest.mark.filterwarnings('ignore::llmfoundry.experimental.ExperimentalWarning')


class _Metadata:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.destinations = [self]

    def log_metadata(self, metadata: dict[str, Any]) -> None:
        self.logged.append(metadata)


def _run(callback: KillLossSpike, losses: Iterable[float]) -> _Metadata:
    logger = _Metadata()
    for loss in losses:
        callback.batch_end(types.SimpleNamespace(loss=torch.tensor(loss)), logger)
    return logger


def test_a_spike_of_several_steps_stops_the_run() -> None:
    callback = KillLossSpike(log_only=False, patience=3, window_size=20)
    _run(callback, [2.0] * 20 + [9.0, 9.0])
    with pytest.raises(LossSpikeError, match='more than 2 times greater than the running average loss'):
        _run(callback, [9.0])


def test_one_bad_batch_is_no_spike() -> None:
    assert _run(KillLossSpike(log_only=False, patience=2, window_size=5), [2.0] * 5 + [8.0, 2.0, 8.0, 2.0, 2.0]).logged == []


def test_before_the_window_is_full_nothing_is_judged() -> None:
    assert _run(KillLossSpike(log_only=False, patience=1, window_size=50), [1.0] * 20 + [50.0] * 5).logged == []


def test_a_loss_that_stays_high() -> None:
    callback = KillLossSpike(log_only=False, patience=99, window_size=4, loss_cap=3)
    with pytest.raises(HighLossError, match='exceeded the threshold of 3 for more than half of the 4'):
        _run(callback, [2.0, 3.5, 3.5, 3.5, 3.5])


def test_the_default_cap_learns_from_the_first_window() -> None:
    callback = KillLossSpike(log_only=False, patience=99, window_size=4)
    assert _run(callback, [12.0, 11.0, 11.0, 11.0, 11.0, 11.0]).logged == [] and callback.loss_cap == 12.0


def test_log_only_goes_on_and_records() -> None:
    callback = KillLossSpike(patience=2, window_size=3)
    logged = _run(callback, [1.0, 1.0, 1.0, 5.0, 5.0, 1.0]).logged
    assert [list(entry) for entry in logged] == [['loss_spike', 'loss_window']] and 'loss spike' in logged[0]['loss_spike']


def test_the_window_grows_with_the_run_unless_it_was_set() -> None:
    state = types.SimpleNamespace(max_duration=Time.from_timestring('10000ba'), dataloader_len=None)
    default, chosen = KillLossSpike(), KillLossSpike(window_size=7)
    for callback in (default, chosen):
        callback.fit_start(state, None)
    assert (default.window_size, chosen.window_size) == (500, 7)


@pytest.mark.parametrize(('duration', 'loader', 'window'), [('4ep', 1000, 200), ('10ba', None, 100), ('1000000tok', None, 250)])
def test_the_window_is_a_share_of_the_run_in_any_unit(duration: str, loader: int | None, window: int) -> None:
    """The run of a million tokens sees 200 in its first batch."""
    callback = KillLossSpike()
    state = types.SimpleNamespace(max_duration=Time.from_timestring(duration), dataloader_len=loader, loss=torch.tensor(1.0), timestamp=Timestamp(batch=1, sample=2, token=200))
    callback.fit_start(state, None)
    callback.batch_end(state, _Metadata())
    assert callback.window_size == callback.loss_window.maxlen == window and list(callback.loss_window) == [1.0]


def test_a_resumed_run_remembers() -> None:
    first = KillLossSpike(log_only=False, patience=2, window_size=3)
    _run(first, [1.0, 1.0, 1.0, 5.0])
    second = KillLossSpike(log_only=False, patience=2, window_size=3)
    second.load_state_dict(first.state_dict())
    with pytest.raises(LossSpikeError):
        _run(second, [7.0])
