"""Rank logic that needs several processes: one rank works for its node, and what it raises reaches all."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
from torch import distributed

from llmfoundry import dist
from tests.helpers.processes import run_in_processes


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__('holds a lambda')
        self.function = lambda: None


_barrier = distributed.barrier


def _collective(*args: Any, **kwargs: Any) -> None:
    raise AssertionError('a collective, which gives up after the time limit of the process group')


def _work(seconds: float, error: type[Exception] | None) -> Any:
    for name in ('barrier', 'broadcast_object_list', 'all_gather_object'):
        setattr(distributed, name, _collective)
    called = []

    def function() -> str:
        called.append(os.environ['RANK'])
        time.sleep(seconds)
        if error is not None:
            raise error()
        return f'made by {os.environ["RANK"]}'

    try:
        return [dist.on_local_rank_zero(function) for _ in range(2)], called
    except Exception as e:  # the type is what the test asks for
        return type(e).__name__, str(e), called
    finally:
        distributed.barrier = _barrier


def _on_two_nodes(error_on: int | None) -> Any:
    rank = int(os.environ['RANK'])
    os.environ.update(LOCAL_RANK='0', LOCAL_WORLD_SIZE='1', NODE_RANK=str(rank))

    def function() -> int:
        if rank == error_on:
            raise KeyError('node')
        return rank

    try:
        return dist.on_local_rank_zero(function)
    except KeyError as e:
        return repr(e)


def test_without_a_process_group_the_function_is_called():
    assert dist.on_local_rank_zero(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        dist.on_local_rank_zero(lambda: 1 // 0)


def test_the_others_wait_outside_any_collective():
    first, second = run_in_processes(_work, 2, 0.3, None)
    assert first == (['made by 0'] * 2, ['0', '0'])
    assert second == (['made by 0'] * 2, [])


@pytest.mark.parametrize(('error', 'name', 'text'), [(KeyError, 'KeyError', ''), (Unpicklable, 'RuntimeError', 'Unpicklable: holds a lambda')])
def test_an_error_is_raised_everywhere(error, name, text):
    first, second = run_in_processes(_work, 2, 0.0, error)
    assert first == (name, text, ['0']) and second == (name, text, [])


def test_each_node_gets_its_own_result_and_errors_of_any_node():
    assert run_in_processes(_on_two_nodes, 2, None) == [0, 1]
    assert run_in_processes(_on_two_nodes, 2, 1) == ["KeyError('node')"] * 2
