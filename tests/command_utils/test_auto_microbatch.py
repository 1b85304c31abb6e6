"""The search for ``device_train_microbatch_size: auto``: right, and without a trace in the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmfoundry.command_utils import auto_microbatch, memory
from llmfoundry.command_utils.auto_microbatch import find_microbatch_size, largest_fitting, predict_peak, probe_batch
from llmfoundry.errors import ConfigError
from tests.helpers.train_runs import SEQ_LEN, make_data, run_config, tiny_config, train_losses


@given(limit=st.integers(1, 300), largest=st.integers(0, 400))
def test_search_finds_the_largest_size_and_never_tries_more_than_twice_the_last_good_one(limit: int, largest: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        good = max([t for t in tried if t <= largest], default=0)
        assert size <= max(2 * good, 1)
        tried.append(size)
        return size <= largest

    assert largest_fitting(limit, fits) == min(limit, largest)
    assert len(tried) == len(set(tried)) and max(tried) <= limit
    assert len(tried) <= 2 * limit.bit_length() + 1


@given(fixed=st.integers(0, 10**9), per_sample=st.integers(1, 10**8), sizes=st.lists(st.integers(1, 64), min_size=2, max_size=4, unique=True), size=st.integers(65, 500))
def test_prediction_is_exact_for_linear_memory(fixed: int, per_sample: int, sizes: list[int], size: int) -> None:
    measured = {s: fixed + per_sample * s for s in sizes}
    assert abs(predict_peak(measured, size) - (fixed + per_sample * size)) <= 1e-6 * (fixed + per_sample * size) + 1


def test_prediction_without_and_with_one_measurement() -> None:
    assert predict_peak({}, 8) == 0
    assert predict_peak({2: 100}, 8) == 400
    assert predict_peak({2: 100}, 2) == 100
    assert predict_peak({2: 100}, 8, fixed=60) == 60 + 160
    assert predict_peak({2: 100}, 8, fixed=1000) == 100


class _Loader:
    def __init__(self, dataset: object) -> None:
        self.dataset = dataset
        self.dataloader = self
        self.collate_fn = lambda samples: {'input_ids': torch.stack(samples), 'sequence_id': torch.zeros(len(samples), len(samples[0]))}


def test_probe_batch_is_stretched_to_the_worst_case_and_survives_datasets_without_an_index() -> None:
    batch = probe_batch(_Loader([torch.arange(5)]), size=3, seq_len=8)
    assert batch['input_ids'].tolist() == [[0, 1, 2, 3, 4, 4, 4, 4]] * 3
    assert batch['sequence_id'].shape == (3, 8)
    assert probe_batch(_Loader(iter([])), size=2, seq_len=4)['labels'].shape == (2, 4)


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp('auto'))


def test_auto_trains_exactly_as_the_size_that_it_found(data: Path) -> None:
    """Dropout makes the losses depend on the random state, the shuffled loader on its position, Adam on every earlier step."""
    auto = run_config(tiny_config(data, device_train_microbatch_size='auto'))
    size = auto.state.device_train_microbatch_size
    fixed = run_config(tiny_config(data, device_train_microbatch_size=size))
    assert size == 8
    assert train_losses(auto) == train_losses(fixed)
    assert len(train_losses(auto)) == 6


def test_less_memory_gives_a_smaller_size(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the weights for Adam; what is left holds the gradients and the activations of 5 samples but not of 6."""
    config = tiny_config(data, device_train_microbatch_size='auto')
    trainer = run_config({**config, 'max_duration': '1ba'})
    monkeypatch.setattr(auto_microbatch.MicrobatchProbe, '_run', lambda self, size: weights + 100 * size)
    weights = sum(p.numel() * 4 for p in trainer.state.model.parameters())
    for o in trainer.state.optimizers:
        o.state.clear()
    monkeypatch.setattr(memory, 'available_cpu_bytes', lambda: int((3 * weights + 550) / 0.8) + 1)
    assert find_microbatch_size(trainer, 8, SEQ_LEN) == 5
    monkeypatch.setattr(memory, 'available_cpu_bytes', lambda: 0)
    with pytest.raises(ConfigError, match='device_train_microbatch_size: auto found no size that fits'):
        find_microbatch_size(trainer, 8, SEQ_LEN)


def test_nothing_is_left_behind(data: Path) -> None:
    trainer = run_config(tiny_config(data, max_duration='1ba'))
    model, optimizer = trainer.state.model, trainer.state.optimizers[0]
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    moments = [s['exp_avg'].clone() for s in optimizer.state.values()]
    rng, dataset_state = torch.get_rng_state(), trainer.state.dataloader.state_dict()
    model.eval()
    find_microbatch_size(trainer, 8, SEQ_LEN)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b['exp_avg']) for a, b in zip(moments, optimizer.state.values(), strict=True))
    assert torch.equal(rng, torch.get_rng_state())
    assert trainer.state.dataloader.state_dict() == dataset_state
    assert not model.training


def test_cpu_memory_is_measured() -> None:
    meter = memory.PeakMeter('cpu')
    meter.reset()
    block = torch.ones(64 << 18)  # 64 MiB
    del block
    assert 50 << 20 < meter.peak() < 120 << 20
    assert memory.available_cpu_bytes() > 0
