"""Batch arithmetic as properties: nothing is lost between the global batch and the microbatches."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfoundry.config.batch_size import batch_size_summary, calculate_batch_size_info, update_batch_size_info

ranks = st.integers(1, 64)
per_device = st.integers(1, 512)


@given(world=ranks, device=per_device, micro=st.integers(1, 1024))
def test_microbatches_add_up_to_the_global_batch(world: int, device: int, micro: int) -> None:
    device_batch, microbatch, steps = calculate_batch_size_info(world * device, micro, world_size=world)
    assert (device_batch, microbatch) == (device, min(micro, device))
    assert isinstance(device_batch, int) and isinstance(steps, int)
    last = device_batch - (steps - 1) * microbatch
    assert 0 < last <= microbatch


@given(world=ranks, device=per_device)
def test_auto_stays_auto(world: int, device: int) -> None:
    assert calculate_batch_size_info(world * device, 'auto', world_size=world) == (device, 'auto', 'auto')


@given(world=ranks, batch=st.integers(1, 2000))
def test_indivisible_batches_are_refused_and_the_named_ones_work(world: int, batch: int) -> None:
    if batch % world == 0:
        calculate_batch_size_info(batch, 'auto', world_size=world)
        return
    with pytest.raises(ValueError, match='is not divisible by') as e:
        calculate_batch_size_info(batch, 'auto', world_size=world)
    for suggestion in str(e.value).rpartition('use ')[2].split(' or '):
        calculate_batch_size_info(int(suggestion), 'auto', world_size=world)


@given(replication=st.integers(1, 8), groups=st.integers(1, 8), per_group=st.integers(1, 32), micro=st.integers(1, 64))
def test_replicated_ranks_share_samples(replication: int, groups: int, per_group: int, micro: int) -> None:
    world = replication * groups
    device, microbatch, steps = calculate_batch_size_info(groups * per_group, micro, replication, world)
    assert math.isclose(device * replication, per_group)
    assert microbatch <= device and steps == math.ceil(device / microbatch)


def test_ranks_have_to_divide_by_the_replication_degree() -> None:
    with pytest.raises(ValueError, match='world size 6 is not divisible by the data replication degree 4'):
        calculate_batch_size_info(8, 1, 4, world_size=6)


@pytest.mark.parametrize('microbatch', ['large', 0, -1, True])
def test_microbatch_is_a_positive_number_or_auto(microbatch: object) -> None:
    with pytest.raises(ValueError, match="must be a positive number or 'auto'"):
        calculate_batch_size_info(8, microbatch, world_size=1)  # type: ignore[arg-type]


def test_update_fills_every_key_and_changes_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('WORLD_SIZE', '4')
    given_config = {'global_train_batch_size': 96, 'device_train_microbatch_size': 7, 'seed': 1}
    frozen = dict(given_config)
    updated = update_batch_size_info(given_config)
    assert given_config == frozen
    assert updated == {**frozen, 'n_gpus': 4, 'device_train_batch_size': 24, 'device_train_microbatch_size': 7, 'device_train_grad_accum': 4, 'device_eval_batch_size': 7}
    assert batch_size_summary(updated) == 'batch: global 96 samples = 4 processes x device 24; device 24 = 4 x microbatch 7 (the last has 3); evaluation 7 per device'


@pytest.mark.parametrize(('given_config', 'expected'), [({}, 1), ({'device_train_microbatch_size': 4}, 4), ({'device_train_microbatch_size': 4, 'device_eval_batch_size': 9}, 9)])
def test_evaluation_batch(given_config: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    assert update_batch_size_info({'global_train_batch_size': 8, **given_config})['device_eval_batch_size'] == expected


def test_missing_global_batch_is_named() -> None:
    with pytest.raises(ValueError, match='global_train_batch_size is missing'):
        update_batch_size_info({'device_train_microbatch_size': 4})


@given(world=ranks, device=per_device, micro=st.one_of(st.just('auto'), st.integers(1, 600)))
def test_summary_is_one_line_with_all_sizes(world: int, device: int, micro: int | str) -> None:
    device_batch, microbatch, steps = calculate_batch_size_info(world * device, micro, world_size=world)  # type: ignore[arg-type]
    line = batch_size_summary({
        'global_train_batch_size': world * device, 'n_gpus': world, 'device_train_batch_size': device_batch, 'device_train_microbatch_size': microbatch,
        'device_train_grad_accum': steps, 'device_eval_batch_size': 1,
    })  # fmt: skip
    assert '\n' not in line and f'global {world * device} samples' in line and f'device {device_batch}' in line and str(microbatch) in line
