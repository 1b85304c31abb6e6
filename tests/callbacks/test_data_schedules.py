"""curriculum_learning and dataset_swap in real runs: which data are trained when, across resumes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
from composer import Callback

from llmfoundry import registry
from llmfoundry.callbacks.curriculum_learning_callback import CurriculumLearning
from llmfoundry.callbacks.dataset_swap_callback import DatasetSwap
from llmfoundry.errors import ConfigError
from tests.helpers.mds import write_token_mds
from tests.helpers.train_runs import SEQ_LEN, run_config, tiny_config, train_losses

pytestmark = pytest.mark.filterwarnings('ignore::llmfoundry.experimental.ExperimentalWarning')
BATCH_TOKENS = 8 * SEQ_LEN
SOURCES = {'a': 0, 'b': 1000, 'c': 2000}


class _Spy(Callback):
    """Notes the first ids of each batch; a source can be told from its ids."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def batch_start(self, state: Any, logger: Any) -> None:
        self.batches.append(state.batch['input_ids'][:, 0].tolist())


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp('mixes')
    rng = np.random.default_rng(0)
    for name, low in SOURCES.items():
        write_token_mds(folder / name / 'train', rng.integers(low + 1, low + 40, size=(24, SEQ_LEN)))
    with registry.save_registry():
        registry.callbacks.register('spy', func=_Spy)
        yield folder


def _dataset(folder: Path, name: str) -> dict[str, Any]:
    return {'local': str(folder / name), 'shuffle': True, 'max_seq_len': SEQ_LEN, 'split': 'train'}


def _curriculum(folder: Path, unit: str, lengths: tuple[int, int, int]) -> dict[str, Any]:
    a, b, c = (f'{n}{unit}' for n in lengths)
    return {'duration': a, 'schedule': [{'duration': b, 'dataset': _dataset(folder, 'b')}, {'duration': c, 'dataset': _dataset(folder, 'c')}]}


def _config(folder: Path, max_duration: str, callbacks: dict[str, Any], **changes: Any) -> dict[str, Any]:
    config = tiny_config(folder / 'a', max_duration=max_duration, callbacks={**callbacks, 'spy': {}}, **changes)
    config['train_loader']['dataset'] = _dataset(folder, 'a')
    config['scheduler']['t_warmup'] = '0tok' if max_duration.endswith('tok') else '0ep' if max_duration.endswith('ep') else '0ba'
    return config


def _run(config: dict[str, Any]) -> tuple[list[float], list[list[int]]]:
    trainer = run_config(json.loads(json.dumps(config)))
    return train_losses(trainer), next(c for c in trainer.state.callbacks if isinstance(c, _Spy)).batches


def _sources(batches: list[list[int]]) -> str:
    return ''.join('abc'[min(ids) // 1000] for ids in batches)


@pytest.fixture(scope='module')
def by_tokens(folder: Path) -> tuple[dict[str, Any], list[float], list[list[int]]]:
    """2, 2 and 3 batches, the checkpoints of every batch, and what an uninterrupted run saw."""
    lengths = (2 * BATCH_TOKENS, 2 * BATCH_TOKENS, 3 * BATCH_TOKENS)
    config = _config(folder, f'{7 * BATCH_TOKENS}tok', {'curriculum_learning': _curriculum(folder, 'tok', lengths)})
    return config, *_run({**config, 'save_folder': str(folder / 'by_tokens'), 'save_interval': '1ba', 'run_name': 'r'})


def test_mixes_follow_each_other_by_tokens(by_tokens: Any) -> None:
    assert _sources(by_tokens[2]) == 'aabbccc'


@pytest.mark.parametrize('batch', [3, 4])
def test_a_resumed_run_goes_on_where_it_was(folder: Path, by_tokens: Any, batch: int) -> None:
    """Batch 4 is the last of a mix, where the position in the old data must not reach the new."""
    config, losses, batches = by_tokens
    resumed = _run({**config, 'load_path': str(folder / 'by_tokens' / f'ep0-ba{batch}-rank0.pt')})
    assert resumed == (losses[batch:], batches[batch:])


def test_what_is_over_may_not_change(folder: Path, by_tokens: Any) -> None:
    config = json.loads(json.dumps(by_tokens[0]))
    schedule = config['callbacks']['curriculum_learning']['schedule']
    config['train_loader']['dataset']['shuffle_seed'] = 5
    schedule[0]['duration'], schedule[1]['duration'] = f'{3 * BATCH_TOKENS}tok', f'{2 * BATCH_TOKENS}tok'
    with pytest.raises(ConfigError) as e:
        _run({**config, 'load_path': str(folder / 'by_tokens' / 'ep0-ba4-rank0.pt')})
    assert [p.path for p in e.value.problems] == ['train_loader.dataset', 'callbacks.curriculum_learning.schedule.0']


@pytest.fixture(scope='module')
def by_epochs(folder: Path) -> list[list[int]]:
    return _run(_config(folder, '4ep', {'curriculum_learning': _curriculum(folder, 'ep', (1, 2, 1))}))[1]


def test_mixes_follow_each_other_by_epochs(by_epochs: list[list[int]]) -> None:
    batches = by_epochs
    assert _sources(batches) == 'aaabbbbbbccc'
    assert sorted(sum(batches[3:6], [])) == sorted(sum(batches[6:9], [])) and batches[3:6] != batches[6:9], 'the epochs of a mix hold the same rows in another order'


def test_data_of_a_later_mix_are_missed_at_the_start(folder: Path) -> None:
    config = _config(folder, '4ep', {'curriculum_learning': _curriculum(folder, 'ep', (1, 2, 1))})
    config['callbacks']['curriculum_learning']['schedule'][1]['dataset']['local'] = str(folder / 'nothing')
    with pytest.raises(ValueError, match='nothing'):
        _run(config)


@pytest.mark.parametrize(
    ('duration', 'schedule', 'maximum', 'text'),
    [
        ('1ep', [], '4ep', r'schedule: must list the mixes that follow the first, got \[\]'),
        ('1ep', [{'duration': '1ep'}], '2ep', r"schedule.0: must hold duration and dataset, got \['duration'\]"),
        ('0ep', [{'duration': '1ep', 'dataset': {}}], '1ep', r"duration: must be a positive number of tokens or epochs \(100tok, 2ep\), got '0ep'"),
        ('1ba', [{'duration': '1ba', 'dataset': {}}], '2ba', r"schedule.0.duration: must be a positive number of tokens or epochs \(100tok, 2ep\), got '1ba'"),
        ('1ep', [{'duration': '5tok', 'dataset': {}}], '2ep', 'durations and max_duration must have one unit, got ep, tok'),
        ('1ep', [{'duration': '2ep', 'dataset': {}}], '4ep', 'the durations add up to 3ep, but max_duration is 4ep'),
    ],
)
def test_schedules_that_make_no_sense(duration: str, schedule: list[Any], maximum: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        CurriculumLearning({'max_duration': maximum, 'train_loader': {'dataset': {}}}, schedule, duration)


def test_data_that_are_not_streamed_are_refused() -> None:
    callback = CurriculumLearning({'max_duration': '2ep', 'train_loader': {'dataset': {}}}, [{'duration': '1ep', 'dataset': {}}], '1ep')
    loader = type('Loader', (), {'dataset': [1, 2]})()
    with pytest.raises(ConfigError, match='needs data that is streamed, .*train_loader.dataset is a list'):
        callback.before_load(type('State', (), {'train_dataloader': loader})(), None)


def test_a_new_data_set_begins_the_epoch_anew(folder: Path, by_epochs: list[list[int]]) -> None:
    def config(source: str, index: int, **changes: Any) -> dict[str, Any]:
        made = _config(folder, '6ba', {'dataset_swap': {'dataset_index': index}}, **changes)
        made['train_loader']['dataset'] = _dataset(folder, source)
        return made

    _, before = _run(config('a', 0, save_folder=str(folder / 'swap'), save_interval='2ba', run_name='r'))
    _, after = _run(config('b', 1, load_path=str(folder / 'swap' / 'ep0-ba2-rank0.pt')))
    assert _sources(before) == 'aaaaaa' and _sources(after) == 'bbbb'
    assert after[:3] == by_epochs[3:6], 'the first three batches are the first epoch of the new data, in its order'


def test_other_data_under_the_same_index_are_refused() -> None:
    saved = DatasetSwap({'train_loader': {'dataset': {'local': 'a'}}}, 0).state_dict()
    with pytest.raises(ConfigError, match='0 is that of the checkpoint, but train_loader.dataset has changed. Set it to 1'):
        DatasetSwap({'train_loader': {'dataset': {'local': 'b'}}}, 0).load_state_dict(saved)


def test_a_lower_index_is_refused() -> None:
    saved = DatasetSwap({}, 2).state_dict()
    with pytest.raises(ConfigError, match='1 is lower than that of the checkpoint, 2'):
        DatasetSwap({}, 1).load_state_dict(saved)
