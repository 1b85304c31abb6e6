"""The mesh over which experts are spread follows from the sharding degrees, and reaches the model block."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmfoundry.config.load import load_train_config
from llmfoundry.config.moe_mesh import moe_device_mesh
from tests.config.base_config import problems_of, write


@pytest.mark.parametrize(('degrees', 'mesh'), [
    ({}, [8]),
    ({'data_parallel_shard_degree': 8}, [8]),
    ({'data_parallel_shard_degree': 4}, [2, 4]),
    ({'data_parallel_replicate_degree': 4}, [4, 2]),
    ({'data_parallel_replicate_degree': 1}, [8]),
    ({'data_parallel_shard_degree': -1, 'data_parallel_replicate_degree': None}, [8]),
    ({'data_parallel_shard_degree': 2, 'data_parallel_replicate_degree': 4}, [4, 2]),
])  # fmt: skip
def test_mesh(degrees: dict[str, int], mesh: list[int]) -> None:
    assert moe_device_mesh(degrees, 8) == mesh


def test_degrees_have_to_cover_the_ranks() -> None:
    with pytest.raises(ValueError, match='data_parallel_shard_degree 3 x data_parallel_replicate_degree 2 is not the number of ranks 8'):
        moe_device_mesh({'data_parallel_shard_degree': 3, 'data_parallel_replicate_degree': 2}, 8)


MOE = ('model.ffn_config.ffn_type=mb_dmoe', 'fsdp_config.data_parallel_shard_degree=2')


def test_it_is_written_into_the_model_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('WORLD_SIZE', '4')
    assert load_train_config(write(tmp_path), MOE).model['ffn_config'] == {'ffn_type': 'mb_dmoe', 'device_mesh': [2, 2]}
    assert problems_of(tmp_path, overrides=(*MOE, 'fsdp_config.data_parallel_replicate_degree=3')) == [
        'fsdp_config (command line): data_parallel_shard_degree 2 x data_parallel_replicate_degree 3 is not the number of ranks 4',
    ]


def test_one_process_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    assert 'device_mesh' not in load_train_config(write(tmp_path), MOE).model['ffn_config']
