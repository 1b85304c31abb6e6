"""The callback without a Trainer: what it keeps, and what it does where there is nothing to keep."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from composer.core import Timestamp

from llmfoundry.callbacks.sample_chain import SampleChain
from llmfoundry.data.sample_chain import ChainRecord
from llmfoundry.errors import DataError


class Data:
    """Eight samples an epoch, two a step."""

    is_elastic = True

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.epoch = seed, 0

    def sample_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(8)

    def epoch_at_hand(self) -> int:
        return self.epoch

    def facts(self) -> dict[str, Any]:
        return {'shuffle_seed': self.seed}


def state_of(data: Any, step: int = 0, in_epoch: int = 0, batch: Any = None) -> Any:
    return SimpleNamespace(train_dataloader=SimpleNamespace(dataset=data), timestamp=Timestamp(batch=step, batch_in_epoch=in_epoch), batch=batch)


def train(chain: SampleChain, data: Data, first: int, stop: int) -> SampleChain:
    for step in range(first, stop):
        data.epoch, in_epoch = divmod(step, 4)
        ids = data.sample_order(data.epoch)[2 * in_epoch : 2 * in_epoch + 2]
        chain.batch_end(state_of(data, step + 1, in_epoch + 1, {'sample_ids': [[int(i)] for i in ids]}), None)  # type: ignore[arg-type]
    return chain


def resume(saved: dict[str, Any], data: Data, step: int, in_epoch: int) -> SampleChain:
    chain = SampleChain()
    chain.load_state_dict(saved)
    chain.fit_start(state_of(data, step, in_epoch), None)  # type: ignore[arg-type]
    return chain


@pytest.mark.parametrize('step', [1, 3, 4, 6, 8])
def test_a_resumed_chain_is_the_uninterrupted_one(step: int) -> None:
    whole = train(SampleChain(), Data(), 0, 9).state_dict()
    saved = train(SampleChain(), Data(), 0, step).state_dict()
    assert train(resume(saved, Data(), step, step % 4), Data(), step, 9).state_dict()['record'].partition('"facts"')[0] != saved['record'].partition('"facts"')[0]
    values = [ChainRecord.from_text(r['record']) for r in (train(resume(saved, Data(), step, step % 4), Data(), step, 9).state_dict(), whole)]
    assert values[0] is not None and values[1] is not None and values[0].value == values[1].value


def test_other_data_stop_in_mid_epoch_and_warn_between_epochs(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = train(SampleChain(), Data(), 0, 6).state_dict()
    with pytest.raises(DataError, match='the first step that differs is step 5 of the run'):
        resume(saved, Data(seed=1), 6, 2)
    with monkeypatch.context() as patch:
        patch.setenv('LLMFOUNDRY_IGNORE_SAMPLE_CHAIN', '1')
        record = resume(saved, Data(seed=1), 6, 2).record
    assert record is not None and (record.first_step, record.skipped, record.facts) == (6, None, {'shuffle_seed': 1}) and 'goes on in mid-epoch with other samples' in caplog.text
    resume(train(SampleChain(), Data(), 0, 8).state_dict(), Data(seed=1), 8, 0)
    assert 'The epoch that begins has other samples' in caplog.text


def test_another_position_is_not_compared() -> None:
    saved = train(SampleChain(), Data(), 0, 6).state_dict()
    assert resume(saved, Data(seed=1), 0, 0).record is None


def test_batches_without_ids_turn_it_off_with_one_note(caplog: pytest.LogCaptureFixture) -> None:
    chain, batch = SampleChain(), {'input_ids': [1]}
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            chain.batch_end(state_of(Data(), step, step, batch), None)  # type: ignore[arg-type]
    assert caplog.text.count('no chain of sample ids is kept') == 1
    assert chain.state_dict() == {'record': ''}
    SampleChain().load_state_dict(chain.state_dict())


def test_a_damaged_record_is_refused() -> None:
    saved = train(SampleChain(), Data(), 0, 3).state_dict()
    with pytest.raises(DataError, match='the chain of sample ids in the checkpoint is damaged'):
        SampleChain().load_state_dict({'record': saved['record'].replace('[[3, 2]]', '[[3, 1]]')})
