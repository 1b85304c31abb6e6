"""Global batches of streamed data: dealt to ranks and workers, the same for any number of them down to the last sample of an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streaming.base.batching import generate_work
from streaming.base.world import World

from llmfoundry.data.elastic_streaming import Seat, share_of_worker
from llmfoundry.data.text_data import StreamingTextDataset, build_text_dataloader
from tests.helpers.mds import numbered_samples, write_token_mds


def steps_of(order: np.ndarray, global_batch: int, drop_last: bool, ranks: int, workers: int) -> list[list[list[int]]]:
    """What each rank draws in each step, taking batches from its workers in turn; idle samples are -1."""
    width, steps = -(-global_batch // ranks), []
    for rank in range(ranks):
        queues = []
        for worker in range(workers):
            ids, idle = share_of_worker(order, global_batch, drop_last, Seat(rank, ranks, worker, workers))
            shown = np.where(idle, -1, ids).tolist()
            queues.append([shown[i : i + width] for i in range(0, len(shown), width)])
        mine = []
        while any(queues):
            mine += [queue.pop(0) for queue in queues if queue]
        steps.append(mine)
    return [list(step) for step in zip(*steps, strict=True)]


@given(samples=st.integers(0, 60), global_batch=st.integers(1, 12), ranks=st.integers(1, 5), workers=st.integers(1, 4), drop_last=st.booleans())
def test_every_step_holds_the_next_samples_for_any_number_of_ranks_and_workers(samples: int, global_batch: int, ranks: int, workers: int, drop_last: bool) -> None:
    order = np.arange(100, 100 + samples)
    steps = steps_of(order, global_batch, drop_last, ranks, workers)
    expected = [order[i : i + global_batch].tolist() for i in range(0, samples, global_batch)]
    if drop_last and expected and len(expected[-1]) < global_batch:
        expected.pop()
    assert [sorted(n for rank in step for n in rank if n >= 0) for step in steps] == expected
    # As many rows for each rank, since it waits for the others.
    assert all(len({len(rank) for rank in step}) == 1 for step in steps)
    assert all(len(step[0]) == -(-len(batch) // ranks) for step, batch in zip(steps, expected, strict=True))


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_token_mds(tmp_path_factory.mktemp('elastic') / 'train', numbered_samples(103))


def dataset_of(gpt2: Any, data: Path, **settings: Any) -> StreamingTextDataset:
    return StreamingTextDataset(gpt2, 16, local=str(data), batch_size=8, **settings)


@pytest.mark.parametrize('settings', [
    {'shuffle': False}, {'shuffle': True}, {'shuffle': True, 'shuffle_algo': 'py1s', 'num_canonical_nodes': 8}, {'shuffle': True, 'num_canonical_nodes': 4, 'shuffle_block_size': 16},
])  # fmt: skip
def test_the_order_is_streamings_own(gpt2: Any, data: Path, settings: dict[str, Any]) -> None:
    """Checkpoints that were saved before, and by other loaders over Streaming, go on in it."""
    dataset = dataset_of(gpt2, data, **settings)
    for epoch in (0, 3):
        theirs = generate_work('random', dataset, World(1, 1, 1, 0), epoch, 0).reshape(-1)
        theirs = theirs[theirs >= 0]
        ours = dataset.sample_order(epoch)
        assert sorted(ours.tolist()) == list(range(103))
        assert ours[:96].tolist() == theirs[:96].tolist()


def test_streams_that_repeat_their_samples_are_dealt_whole(gpt2: Any, tmp_path: Path) -> None:
    write_token_mds(tmp_path / 'a', numbered_samples(10))
    loader = build_text_dataloader(gpt2, 4, {'streams': {'a': {'local': str(tmp_path / 'a'), 'repeat': 2.5}}, 'max_seq_len': 16, 'shuffle': True}, drop_last=False, num_workers=0, pin_memory=False).dataloader
    seen = [number for batch in loader for row in batch['sample_ids'] for number in row]
    assert len(seen) == 25 and set(seen) == set(range(10)) and len(loader) == 7


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize(('drop_last', 'steps'), [(True, 12), (False, 13)])
def test_batches_name_their_samples(gpt2: Any, data: Path, num_workers: int, drop_last: bool, steps: int) -> None:
    block = {'local': str(data.parent), 'split': 'train', 'max_seq_len': 16, 'shuffle': True}
    spec = build_text_dataloader(gpt2, 8, block, drop_last=drop_last, num_workers=num_workers, pin_memory=False)
    batches = list(spec.dataloader)
    assert len(batches) == len(spec.dataloader) == steps
    order = spec.dataloader.dataset.sample_order(0)
    for number, batch in enumerate(batches):
        assert batch['sample_ids'] == [[i] for i in order[8 * number : 8 * number + 8].tolist()]
        assert batch['input_ids'][:, 0].tolist() == [100 * i for (i,) in batch['sample_ids']]
        # The model does not see them.
        assert set(batch) - set(spec.microbatch_transforms(batch)) == {'sample_ids'}


def test_an_idle_row_counts_for_nothing(gpt2: Any, data: Path) -> None:
    spec = build_text_dataloader(gpt2, 2, {'local': str(data.parent), 'split': 'train', 'max_seq_len': 16, 'eos_token_id': 50256}, drop_last=False, num_workers=0, pin_memory=False)
    dataset = spec.dataloader.dataset
    batch = spec.dataloader.collate_fn([dataset[3], dataset.idle_sample()])
    assert batch['sample_ids'] == [[3], []] and batch['total_tokens'] == [16, 0] and batch['loss_generating_tokens'] == [15, 0]
    assert (batch['labels'][1] == -100).all() and batch['attention_mask'][1].sum() == 1
    assert spec.get_num_tokens_in_batch(batch) == 16
