"""The inverse square root schedule: warm-up, a decay that needs no end, and a linear cooldown at the end.

A run can be continued past its end by restarting from the checkpoint before the cooldown, which a cosine does not allow.
"""

from __future__ import annotations

import warnings

from composer.core import State, Time, TimeUnit
from composer.optim import ComposerScheduler

from llmfoundry.experimental import ExperimentalWarning

__all__ = ['InverseSquareRootWithWarmupScheduler', 'inverse_sqrt_with_warmup']


def inverse_sqrt_with_warmup(
    current: float,
    t_warmup: float,
    t_scale: float,
    t_cooldown: float,
    t_max: float,
    alpha_f_decay: float,
    alpha_f_cooldown: float,
) -> float:
    r"""The learning-rate multiplier at time ``current``; all times in one unit.

    With ``t_c = t_max - t_cooldown``, the start of the cooldown,

        alpha(t) = t / t_warmup                                                                            for t < t_warmup
        alpha(t) = alpha_f_decay + (1 - alpha_f_decay) / sqrt((t - t_warmup + t_scale) / t_scale)           for t_warmup <= t < t_c
        alpha(t) = alpha(t_c) + (alpha_f_cooldown - alpha(t_c)) * min(1, (t - t_c) / t_cooldown)            after that

    which is the decay of "Attention is all you need" (https://arxiv.org/abs/1706.03762, section 5.3), shifted to start at 1 with its own time scale, and the cooldown
    of "Scaling Vision Transformers" (https://arxiv.org/abs/2106.04560, section 3.5).
    """
    if current < t_warmup:
        return current / t_warmup

    def decayed(t: float) -> float:
        return alpha_f_decay + (1.0 - alpha_f_decay) / ((t - t_warmup + t_scale) / t_scale) ** 0.5

    cooldown_start = t_max - t_cooldown
    if current < cooldown_start or t_cooldown == 0:
        return decayed(current)
    fraction = min(1.0, (current - cooldown_start) / t_cooldown)
    start = decayed(cooldown_start)
    return start + (alpha_f_cooldown - start) * fraction


class InverseSquareRootWithWarmupScheduler(ComposerScheduler):
    """``inverse_sqrt_with_warmup`` of the training time. Experimental.

    Args:
        t_warmup: length of the linear warm-up.
        t_scale: time scale of the decay: after ``3 * t_scale`` the multiplier has halved.
        t_cooldown: length of the linear cooldown at the end.
        t_max: length of the run; ``1dur`` is the Trainer's ``max_duration``.
        alpha_f_decay: multiplier that the decay tends to.
        alpha_f_cooldown: multiplier that the cooldown ends at.

    Raises:
        ValueError: a length in ``dur``, or ``alpha_f_decay < alpha_f_cooldown``. When called: units that differ from that of ``max_duration``, or warm-up
            and cooldown that do not fit in ``t_max``.
    """

    def __init__(
        self,
        t_warmup: str | Time,
        t_scale: str | Time,
        t_cooldown: str | Time,
        t_max: str | Time = '1dur',
        alpha_f_decay: float = 0.0,
        alpha_f_cooldown: float = 0.0,
    ) -> None:
        warnings.warn(ExperimentalWarning('InverseSquareRootWithWarmupScheduler'), stacklevel=2)
        if alpha_f_decay < alpha_f_cooldown:
            raise ValueError(f'scheduler.alpha_f_decay must be at least alpha_f_cooldown, or the cooldown would raise the learning rate: got {alpha_f_decay} < {alpha_f_cooldown}')
        self.t_warmup = self._parse('t_warmup', t_warmup)
        self.t_scale = self._parse('t_scale', t_scale)
        self.t_cooldown = self._parse('t_cooldown', t_cooldown)
        self.t_max = Time.from_input(t_max)
        self.alpha_f_decay = alpha_f_decay
        self.alpha_f_cooldown = alpha_f_cooldown
        if self.t_scale.value <= 0:
            raise ValueError(f'scheduler.t_scale must be positive, got {t_scale}')

    @staticmethod
    def _parse(name: str, value: str | Time) -> Time:
        time = Time.from_input(value)
        if time.unit == TimeUnit.DURATION:
            raise ValueError(f'scheduler.{name}: {value} is a share of the run, but this schedule does not depend on its length before the cooldown: use the unit of max_duration')
        return time

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        """The multiplier at ``state.timestamp``.

        Args:
            state: training state.
            ssr: scale schedule ratio, which scales ``t_max`` only.
        """
        if state.max_duration is None:
            raise ValueError('scheduler inv_sqrt_with_warmup needs max_duration, which is not set')
        unit = state.max_duration.unit
        for name in ('t_warmup', 't_scale', 't_cooldown', 't_max'):
            time = getattr(self, name)
            if time.unit != unit and not (name == 't_max' and time.unit == TimeUnit.DURATION):
                raise ValueError(f'scheduler.{name}: the unit of {time.to_timestring()} must be that of max_duration, {state.max_duration.to_timestring()}')
        t_max = self.t_max.value * (state.max_duration.value if self.t_max.unit == TimeUnit.DURATION else ssr)
        if self.t_warmup.value + self.t_cooldown.value > t_max:
            raise ValueError(
                f'scheduler: t_warmup {self.t_warmup.to_timestring()} and t_cooldown {self.t_cooldown.to_timestring()} together must not exceed t_max, {int(t_max)}{unit.value}',
            )
        return inverse_sqrt_with_warmup(
            state.timestamp.get(unit).value,
            self.t_warmup.value,
            self.t_scale.value,
            self.t_cooldown.value,
            t_max,
            self.alpha_f_decay,
            self.alpha_f_cooldown,
        )
