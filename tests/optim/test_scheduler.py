"""The inverse square root schedule at points computed by hand, and its errors."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
from composer.core import Time, Timestamp
from hypothesis import given
from hypothesis import strategies as st

from llmfoundry import registry
from llmfoundry.experimental import ExperimentalWarning
from llmfoundry.optim.scheduler import InverseSquareRootWithWarmupScheduler, inverse_sqrt_with_warmup


def _state(batch: int, max_duration: str = '100ba', tokens: int = 0) -> SimpleNamespace:
    return SimpleNamespace(max_duration=Time.from_timestring(max_duration), timestamp=Timestamp(batch=batch, token=tokens))


def _scheduler(**kwargs: object) -> InverseSquareRootWithWarmupScheduler:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return registry.schedulers.get('inv_sqrt_with_warmup')(**{'t_warmup': '10ba', 't_scale': '5ba', 't_cooldown': '20ba', **kwargs})


@pytest.mark.parametrize(
    ('batch', 'alpha'),
    [
        (0, 0.0),
        (5, 0.5),
        (10, 1.0),
        (25, 0.5),  # (15 + 5) / 5 = 4, root 2
        (50, 1 / 3),  # (40 + 5) / 5 = 9
        (80, 15**-0.5),  # the cooldown starts at (70 + 5) / 5 = 15
        (90, 15**-0.5 / 2),
        (100, 0.0),
        (120, 0.0),
    ],
)
def test_points_by_hand(batch: int, alpha: float) -> None:
    assert _scheduler()(_state(batch)) == pytest.approx(alpha)


def test_final_values() -> None:
    scheduler = _scheduler(alpha_f_decay=0.2, alpha_f_cooldown=0.1)
    assert scheduler(_state(25)) == pytest.approx(0.2 + 0.8 / 2)
    start = 0.2 + 0.8 * 15**-0.5
    assert scheduler(_state(85)) == pytest.approx(start + (0.1 - start) / 4)
    assert scheduler(_state(100)) == pytest.approx(0.1)


@given(
    t_warmup=st.integers(0, 30), t_scale=st.integers(1, 50), t_cooldown=st.integers(0, 30), decay=st.floats(0, 1), data=st.data(),
)  # fmt: skip
def test_rises_to_one_then_falls_without_jumps(t_warmup: int, t_scale: int, t_cooldown: int, decay: float, data: st.DataObject) -> None:
    cooldown = data.draw(st.floats(0, decay))
    alphas = [inverse_sqrt_with_warmup(t, t_warmup, t_scale, t_cooldown, 100, decay, cooldown) for t in range(101)]
    assert alphas[t_warmup] == pytest.approx(1.0) and max(alphas) <= 1.0 + 1e-12
    assert all(a < b for a, b in zip(alphas[:t_warmup], alphas[1 : t_warmup + 1], strict=True))
    assert all(a >= b - 1e-12 for a, b in zip(alphas[t_warmup:], alphas[t_warmup + 1 :], strict=False))
    if t_cooldown:
        assert alphas[-1] == pytest.approx(cooldown)


def test_share_of_the_run_as_t_max_and_the_scale_ratio() -> None:
    assert _scheduler(t_max='0.5dur')(_state(50)) == pytest.approx(0.0)
    assert _scheduler(t_max='50ba')(_state(50)) == pytest.approx(0.0)
    assert _scheduler(t_max='100ba')(_state(50), ssr=0.5) == pytest.approx(0.0)


def test_tokens_as_the_unit() -> None:
    scheduler = _scheduler(t_warmup='1000tok', t_scale='500tok', t_cooldown='0tok')
    assert scheduler(_state(3, '10000tok', tokens=2500)) == pytest.approx(0.5)


@pytest.mark.parametrize('name', ['t_warmup', 't_scale', 't_cooldown'])
def test_shares_of_the_run_are_refused(name: str) -> None:
    with pytest.raises(ValueError) as error:
        _scheduler(**{name: '0.1dur'})
    assert str(error.value) == (
        f'scheduler.{name}: 0.1dur is a share of the run, but this schedule does not depend on its length before the cooldown: use the unit of max_duration'
    )


@pytest.mark.parametrize(
    ('kwargs', 'text'),
    [
        ({'t_warmup': '10tok'}, 'scheduler.t_warmup: the unit of 10tok must be that of max_duration, 100ba'),
        ({'t_max': '1ep'}, 'scheduler.t_max: the unit of 1ep must be that of max_duration, 100ba'),
        ({'t_warmup': '90ba'}, 'scheduler: t_warmup 90ba and t_cooldown 20ba together must not exceed t_max, 100ba'),
    ],
)
def test_times_that_do_not_fit_the_run(kwargs: dict, text: str) -> None:
    with pytest.raises(ValueError) as error:
        _scheduler(**kwargs)(_state(0))
    assert str(error.value) == text


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match='alpha_f_decay must be at least alpha_f_cooldown, or the cooldown would raise the learning rate: got 0.1 < 0.2'):
        _scheduler(alpha_f_decay=0.1, alpha_f_cooldown=0.2)
    with pytest.raises(ValueError, match='scheduler.t_scale must be positive, got 0ba'):
        _scheduler(t_scale='0ba')
    with pytest.raises(ValueError, match='needs max_duration, which is not set'):
        _scheduler()(SimpleNamespace(max_duration=None))


def test_it_says_that_it_is_experimental() -> None:
    with pytest.warns(ExperimentalWarning, match='InverseSquareRootWithWarmupScheduler is experimental'):
        InverseSquareRootWithWarmupScheduler('0ba', '1ba', '0ba')
