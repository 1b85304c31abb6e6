"""``curriculum_learning``: one data mix after another in one run, each for a number of tokens or epochs.

    callbacks:
      curriculum_learning:
        duration: 10tok               # of the first mix, the one of train_loader
        schedule:
        - {duration: 20tok, dataset: {local: ..., split: train, max_seq_len: 2048}}
        - {duration: 5tok, dataset: {streams: ...}}

A mix is an iteration in Composer's sense, so that its clock counts tokens and epochs of the mix. Every mix is opened once at the start, since data that are missing
should end a run at its first minute and not at its last mix.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any, Mapping, Sequence

from composer.core import State, Time, TimeUnit
from composer.loggers import Logger
from streaming import StreamingDataset

from llmfoundry.callbacks.train_loader_swap import release, rewind, set_train_loader
from llmfoundry.data.dataloader import build_dataloader
from llmfoundry.errors import ConfigError, ConfigProblem
from llmfoundry.interfaces.callback_with_config import CallbackWithConfig
from llmfoundry.tokenizers.build import build_tokenizer

__all__ = ['CurriculumLearning', 'CurriculumLearningState']

log = logging.getLogger(__name__)

PATH = 'callbacks.curriculum_learning'
UNITS = (TimeUnit.TOKEN, TimeUnit.EPOCH)
# Keys of a data set that say where and how it is read here, not what it holds.
_PLACE_KEYS = frozenset({'predownload', 'cache_limit', 'download_retry', 'download_timeout', 'keep_zip', 'keep_raw', 'validate_hash'})


@dataclass
class CurriculumLearningState:
    """Where a run is in its schedule, as checkpoints hold it.

    Attributes:
        schedule_index: the mix that is trained on; 0 is the first.
        finished: whether that mix is over, so that the next one follows.
        schedule: duration and data set of every mix.
    """

    schedule_index: int
    finished: bool
    schedule: list[dict[str, Any]]


class CurriculumLearning(CallbackWithConfig):
    """Changes the training data when a mix has had its duration.

    Args:
        train_config: the config of the run; its ``train_loader.dataset`` is the first mix, and every other key of the loader holds for all.
        schedule: the mixes that follow: ``{duration, dataset}`` each, ``dataset`` being a whole block as in ``train_loader``.
        duration: of the first mix. Durations are all in tokens or all in epochs, as ``max_duration`` is, and add up to it.

    Raises:
        ConfigError: (a ValueError) a schedule that breaks these rules; at start, data that is not streamed; when loading, mixes that are over, or the present one, and have changed.
    """

    def __init__(self, train_config: dict[str, Any], schedule: Sequence[Mapping[str, Any]], duration: str | int) -> None:
        super().__init__(train_config)
        self.config = train_config
        first = (train_config.get('train_loader') or {}).get('dataset')
        self.durations, problems = _read_schedule(schedule, duration, train_config.get('max_duration'))
        if problems:
            raise ConfigError(problems)
        self.datasets = [first, *(dict(mix['dataset']) for mix in schedule)]
        self.index = 0
        self._state: State | None = None
        self._shown = 0  # the mix whose loader is in the state
        self._skips = False

    # Composer's events, in their order ----------------------------------------------------------------------------------------------

    def before_load(self, state: State, logger: Logger) -> None:
        del logger
        self._state = state
        if not isinstance(getattr(state.train_dataloader, 'dataset', None), StreamingDataset):
            kind = type(getattr(state.train_dataloader, 'dataset', None)).__name__
            raise ConfigError([ConfigProblem(PATH, f'needs data that is streamed, so that a resumed run finds its place; train_loader.dataset is a {kind}. Convert it to MDS (llmfoundry data_prep).')])
        self._open_every_mix(state)
        state._iteration_length = self.durations[0]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Called between Composer's ``before_load`` and the loading of the data set's position, which so goes to the right data set."""
        saved = CurriculumLearningState(**state)
        self._check_unchanged(saved)
        self._skips = saved.finished
        self.index = saved.schedule_index + int(saved.finished)
        assert self._state is not None
        self._show_mix(self._state)

    def after_load(self, state: State, logger: Logger) -> None:
        del logger
        if self._skips:
            self._skips = False
            state.timestamp = state.timestamp.to_next_iteration()
            rewind(state.train_dataloader.dataset)

    def iteration_end(self, state: State, logger: Logger) -> None:
        del logger
        if self.index + 1 < len(self.durations):
            self.index += 1
            self._show_mix(state)
            log.info('curriculum_learning: mix %d of %d from token %d on', self.index + 1, len(self.durations), int(state.timestamp.token))

    def state_dict(self) -> dict[str, Any]:
        return asdict(CurriculumLearningState(self.index, self._is_over(), self._schedule()))

    # Mixes ----------------------------------------------------------------------------------------------------------------------------

    def _schedule(self) -> list[dict[str, Any]]:
        return [{'duration': d.to_timestring(), 'dataset': block} for d, block in zip(self.durations, self.datasets, strict=True)]

    def _is_over(self) -> bool:
        """Whether the mix has had its duration, which a checkpoint taken at its last batch has to know."""
        if self._state is None or self.index + 1 == len(self.durations):
            return False
        now, length = self._state.timestamp, self.durations[self.index]
        return (now.token_in_iteration if length.unit == TimeUnit.TOKEN else now.epoch_in_iteration) >= length

    def _build_loader(self, index: int) -> Any:
        config = self.config
        tokenizer = build_tokenizer(config['tokenizer']['name'], dict(config['tokenizer'].get('kwargs') or {}))
        loader = build_dataloader({**config['train_loader'], 'dataset': self.datasets[index]}, tokenizer, config['device_train_batch_size']).dataloader
        if not isinstance(loader.dataset, StreamingDataset):
            raise ConfigError([ConfigProblem(f'{PATH}.schedule.{index - 1}.dataset', f'needs data that is streamed, got a {type(loader.dataset).__name__}. Convert it to MDS (llmfoundry data_prep).')])
        return loader

    def _open_every_mix(self, state: State) -> None:
        release(state.train_dataloader)
        for index in range(1, len(self.datasets)):
            release(self._build_loader(index))

    def _show_mix(self, state: State) -> None:
        """Puts the loader of the present mix into the state, unless it is there."""
        state._iteration_length = self.durations[self.index]
        if self._shown == self.index:
            return
        release(state.train_dataloader)
        set_train_loader(state, self._build_loader(self.index), self.config.get('train_subset_num_batches', -1))
        self._shown = self.index

    def _check_unchanged(self, saved: CurriculumLearningState) -> None:
        problems = []
        present = self._schedule()
        for index, before in enumerate(saved.schedule[: saved.schedule_index + 1]):
            path = f'{PATH}.duration' if index == 0 else f'{PATH}.schedule.{index - 1}'
            over = index < saved.schedule_index or saved.finished
            if index >= len(present):
                problems.append(ConfigProblem(path, 'is missing, but the checkpoint has trained on this mix. Restore it; only mixes that are to come may change.'))
            elif over and Time.from_timestring(before['duration']) != self.durations[index]:
                problems.append(ConfigProblem(path, f'{self.durations[index].to_timestring()} was {before["duration"]} when the mix was trained. Restore it; only mixes that are to come may change.'))
            elif _contents(before['dataset']) != _contents(present[index]['dataset']):
                where = 'train_loader.dataset' if index == 0 else f'{path}.dataset'
                problems.append(ConfigProblem(where, 'has changed since the checkpoint, which has trained on this mix. Restore it; only mixes that are to come may change.'))
        if problems:
            raise ConfigError(problems)


def _read_schedule(schedule: Any, duration: Any, max_duration: Any) -> tuple[list[Time], list[ConfigProblem]]:
    """The durations of all mixes, and what is wrong with them."""
    if not isinstance(schedule, Sequence) or isinstance(schedule, str) or not schedule:
        return [], [ConfigProblem(f'{PATH}.schedule', f'must list the mixes that follow the first, got {schedule!r}')]
    problems = []
    given: list[tuple[str, Any]] = [(f'{PATH}.duration', duration)]
    for index, mix in enumerate(schedule):
        path = f'{PATH}.schedule.{index}'
        keys = set(mix) if isinstance(mix, Mapping) else set()
        if keys != {'duration', 'dataset'}:
            problems.append(ConfigProblem(path, f'must hold duration and dataset, got {sorted(keys) if keys else mix!r}'))
        elif not isinstance(mix['dataset'], Mapping):
            problems.append(ConfigProblem(f'{path}.dataset', f'must be a block as in train_loader.dataset, got {mix["dataset"]!r}'))
        if 'duration' in keys:
            given.append((f'{path}.duration', mix['duration']))
    durations = []
    for path, value in given:
        try:
            time = Time.from_input(value, TimeUnit.EPOCH)
        except (ValueError, RuntimeError, TypeError):
            time = None
        if time is None or time.unit not in UNITS or time.value <= 0:
            problems.append(ConfigProblem(path, f'must be a positive number of tokens or epochs (100tok, 2ep), got {value!r}'))
        else:
            durations.append(time)
    if not problems:
        problems = _sum_problems(durations, Time.from_input(max_duration, TimeUnit.EPOCH))
    return durations, problems


def _sum_problems(durations: Sequence[Time], total: Time) -> list[ConfigProblem]:
    units = {d.unit.value for d in (*durations, total)}
    if len(units) > 1:
        return [ConfigProblem(f'{PATH}.schedule', f'durations and max_duration must have one unit, got {", ".join(sorted(units))}')]
    found = sum(d.value for d in durations)
    if found != total.value:
        return [ConfigProblem(f'{PATH}.schedule', f'the durations add up to {found}{total.unit.value}, but max_duration is {total.to_timestring()}. Make them equal.')]
    return []


def _contents(dataset: Any) -> Any:
    """A data set's block without what may differ from machine to machine; ``local`` counts only where it is the source."""
    if not isinstance(dataset, Mapping):
        return dataset
    dropped = _PLACE_KEYS | ({'local'} if dataset.get('remote') else set())
    return {key: _contents(value) for key, value in dataset.items() if key not in dropped and value is not None}
