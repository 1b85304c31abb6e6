"""Two nodes, each a network namespace with its own address, host name and /dev/shm: the documented commands, a cable that is cut in mid-run, and the restart."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Iterator

import pytest

from tests.helpers.namespaces import Node, two_nodes
from tests.helpers.train_runs import ROOT, losses_in, make_data, run_config, tiny_config, train_losses
from tests.helpers.warm_launcher import shared_launcher

TRAIN = str(ROOT / 'scripts/train/train.py')
STEPS = 10
TIMEOUT_S = 20  # dist_timeout of the run that loses its cable
# A step of this model takes a few milliseconds; the cable has to be cut between two of them.
SLOW = """
import time
from composer import Callback
from llmfoundry.registry import callbacks

@callbacks.register_class('slow')
class Slow(Callback):
    def batch_end(self, state, logger):
        time.sleep(0.7)
"""


def _config(folder: Path, **changes: Any) -> dict[str, Any]:
    config = tiny_config(folder / 'data', max_duration=f'{STEPS}ba', **changes)
    config['model']['resid_pdrop'] = 0.0
    return config


def _start(nodes: tuple[Node, Node], folder: Path, config: dict[str, Any], form: str) -> list[Any]:
    """Starts both nodes as document 002 prints it, by flags or by environment; 'forked' is the latter without the time to import torch. Without GPUs composer starts one process per node."""
    folder.mkdir(exist_ok=True)
    path = folder / 'config.yaml'
    path.write_text(json.dumps({**config, 'loggers': {'jsonl': {'path': str(folder / 'metrics.jsonl')}}}))
    running = []
    for rank, node in enumerate(nodes):
        own = folder / f'node{rank}'
        (own / 'tmp').mkdir(parents=True, exist_ok=True)
        settings = {'world_size': '2', 'node_rank': str(rank), 'master_addr': nodes[0].address, 'master_port': '7501'}
        if form == 'flags':
            flags = [part for name, value in settings.items() for part in (f'--{name}', value)]
            running.append(node.start(['composer', *flags, TRAIN, str(path)], own, TMPDIR=str(own / 'tmp')))
            continue
        environment = {'TMPDIR': str(own / 'tmp'), **{name.upper(): value for name, value in settings.items()}}
        if form == 'environment':
            running.append(node.start(['composer', TRAIN, str(path)], own, **environment))
        else:
            running.append(shared_launcher().start(own, [str(path)], ranks=1, node=node, **environment))
    return running


def _outputs(folder: Path) -> list[str]:
    return [(folder / f'node{rank}' / 'out.txt').read_text(errors='replace') for rank in range(2)]


def _wait(running: list[Any], folder: Path, timeout: float = 900) -> list[int]:
    try:
        return [p.wait(timeout) for p in running]
    except (subprocess.TimeoutExpired, TimeoutError):
        for p in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(p.pid, signal.SIGKILL)
        raise AssertionError('\n\n'.join(text[-3000:] for text in _outputs(folder))) from None


@pytest.fixture(scope='module')
def nodes() -> Iterator[tuple[Node, Node]]:
    with two_nodes() as pair:
        yield pair


@pytest.fixture(scope='module')
def folder(nodes: tuple[Node, Node], tmp_path_factory: pytest.TempPathFactory) -> Path:
    del nodes  # no data where they cannot be made
    folder = tmp_path_factory.mktemp('nodes')
    make_data(folder / 'data', num_train=8 * STEPS)
    (folder / 'slow.py').write_text(SLOW)
    return folder


@pytest.fixture(scope='module')
def expected(folder: Path) -> list[float]:
    """The losses of one process."""
    return train_losses(run_config(_config(folder)))


def test_two_nodes_by_flags_train_as_one_process(nodes: tuple[Node, Node], folder: Path, expected: list[float]) -> None:
    """Host names here resolve nowhere, so gloo would tell the other node to connect to 127.0.0.1 if it were not given the interface that leads to MASTER_ADDR."""
    run = folder / 'flags'
    codes = _wait(_start(nodes, run, _config(folder), 'flags'), run)
    assert codes == [0, 0], '\n\n'.join(text[-3000:] for text in _outputs(run))
    assert list(losses_in(run).values()) == pytest.approx(expected, abs=1e-5)
    first, second = _outputs(run)
    assert 'pre-flight: 2 ranks on 2 node(s) agree' in first
    assert all(f'node {rank} ({node.name}): rank {rank}: cpu' in first for rank, node in enumerate(nodes))
    assert 'pre-flight' not in second


def test_a_cut_cable_is_named_and_a_restart_continues_the_curve(nodes: tuple[Node, Node], folder: Path, expected: list[float]) -> None:
    run = folder / 'cut'
    saving = {'run_name': 'cut', 'save_folder': str(folder / 'checkpoints'), 'save_interval': '2ba', 'autoresume': True, 'code_paths': [str(folder / 'slow.py')]}
    running = _start(nodes, run, _config(folder, callbacks={'slow': {}}, dist_timeout=TIMEOUT_S, **saving), 'environment')
    _await(lambda: len(losses_in(run)) >= 5 or any(p.poll() is not None for p in running), 900)
    nodes[1].set_link('down')
    cut = time.monotonic()
    codes = _wait(running, run, 4 * TIMEOUT_S + 120)
    seconds = time.monotonic() - cut
    seen = losses_in(run)
    first, second = _outputs(run)
    assert 5 <= len(seen) < STEPS
    assert all(code not in (0, None) for code in codes), codes
    assert 'class:   node lost' in first, first[-4000:]
    assert f'rank 1 of 2 on {nodes[1].name}' in first, first[-4000:]
    assert 'class:   node lost' in second, second[-4000:]
    assert seconds < 2 * TIMEOUT_S + 10
    assert [node.processes() for node in nodes] == [[], []]

    nodes[1].set_link('up')
    codes = _wait(_start(nodes, run, _config(folder, **saving), 'forked'), run)
    assert codes == [0, 0], '\n\n'.join(text[-3000:] for text in _outputs(run))
    steps = [row['step'] for row in map(json.loads, (run / 'metrics.jsonl').read_text().splitlines()) if 'loss/train/total' in row]
    assert steps[len(seen)] >= 2 and steps[-1] == STEPS - 1  # it continued from a checkpoint
    assert list(losses_in(run).values()) == pytest.approx(expected, abs=1e-5)


def test_nothing_is_left_on_the_nodes(nodes: tuple[Node, Node]) -> None:
    assert [node.processes() for node in nodes] == [[], []]


def _await(condition: Any, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f'not within {timeout} s'
        time.sleep(0.05)


def test_a_save_folder_of_its_own_on_each_node(nodes: tuple[Node, Node], folder: Path, expected: list[float]) -> None:
    """Rank 0 writes the checkpoint on its node. A restart cannot load it on the other: it is refused before training, and goes on when the newest checkpoint has been copied there."""
    run = folder / 'unshared'
    saving = {'run_name': 'unshared', 'save_folder': 'ckpt', 'save_interval': '2ba', 'autoresume': True}  # relative to the working folder, of which each node has its own
    assert _wait(_start(nodes, run, {**_config(folder, **saving), 'max_duration': '4ba'}, 'forked'), run) == [0, 0], _outputs(run)
    ours, theirs = (run / f'node{rank}/ckpt' for rank in range(2))
    assert (ours / 'ep0-ba4-rank0.pt').is_file() and not list(theirs.glob('*.pt'))
    assert _wait(_start(nodes, run, _config(folder, **saving), 'forked'), run) == [1, 1]
    said = _outputs(run)[0]
    assert 'is another folder on each node, and none of the 2 checkpoints in them' in said and 'copy the newest checkpoint to every node' in said, said[-3000:]
    theirs.mkdir(exist_ok=True)
    shutil.copy(ours / 'ep0-ba4-rank0.pt', theirs)
    assert _wait(_start(nodes, run, _config(folder, **saving), 'forked'), run) == [0, 0], _outputs(run)
    assert 'save_folder is not shared by the 2 nodes; of 2 checkpoints 1 are on all of them' in _outputs(run)[0]
    assert list(losses_in(run).values()) == pytest.approx(expected, abs=1e-5)
