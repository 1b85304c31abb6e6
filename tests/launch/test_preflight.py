"""Pre-flight: what two real processes say of each other, what stops a run, and what an operator reads."""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import Any, Callable

import pytest

from llmfoundry import dist
from llmfoundry.command_utils import preflight
from llmfoundry.command_utils import preflight_facts as facts
from llmfoundry.errors import ConfigError, PreflightError
from tests.helpers.processes import run_in_processes
from tests.helpers.train_runs import ROOT, make_data, tiny_config
from tests.helpers.workspace import run_command

GIB = 1024**3


def _report(rank: int, **changes: Any) -> dict[str, Any]:
    """A rank of two nodes with two ranks each, all in agreement."""
    node = rank // 2
    report = {
        'rank': rank, 'local_rank': rank % 2, 'node_rank': node, 'world_size': 4, 'local_world_size': 2, 'host': f'node-{"ab"[node]}',
        'device': {'kind': 'cuda', 'name': 'H100', 'memory_bytes': 80 * GIB, 'count': 2, 'id': f'gpu-{rank}'}, 'disk': {'folder': '/ckpt', 'free_bytes': 500 * GIB},
        'versions': {'python': '3.11.7', 'torch': '2.7.0', 'composer': '0.32.1'}, 'config': 'c0', 'indexes': {'/data/train/index.json': 'd0'}, 'address': f'10.0.0.{node + 1}', 'clock': 1000.0,
    }
    return {**report, **copy.deepcopy(changes)}


def _compare(**changed: dict[int, dict[str, Any]]) -> tuple[list[str], list[str]]:
    return facts.compare([_report(rank, **changed.get(f'rank{rank}', {})) for rank in range(4)])


def test_ranks_that_agree_go() -> None:
    assert _compare() == ([], [])


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('versions', {'python': '3.11.7', 'torch': '2.6.0', 'composer': '0.32.1'}, 'version of torch: 2.7.0 on ranks 0-1 (node-a), rank 3 (node-b); 2.6.0 on rank 2 (node-b). Install the same'),
        ('indexes', {'/data/train/index.json': 'd1'}, 'data index /data/train/index.json: d0 on ranks 0-1 (node-a), rank 3 (node-b); d1 on rank 2 (node-b). The nodes would train on different data'),
        ('indexes', {'/data/train/index.json': 'missing'}, 'missing on rank 2 (node-b)'),
        ('config', 'c1', 'resolved config: hash c0 on ranks 0-1 (node-a), rank 3 (node-b); hash c1 on rank 2 (node-b). Start every node with the same YAML'),
        ('world_size', 8, 'WORLD_SIZE: 4 on ranks 0-1 (node-a), rank 3 (node-b); 8 on rank 2 (node-b).'),
        ('disk', {'folder': '/ckpt', 'free_bytes': 0}, "disk: save_folder '/ckpt' has 0 bytes free on rank 2 (node-b)."),
        ('device', {'kind': 'cpu', 'name': '8 cores', 'memory_bytes': GIB, 'count': 8, 'id': None}, 'kind of device: cuda on ranks 0-1 (node-a), rank 3 (node-b); cpu on rank 2 (node-b)'),
        ('device', {'kind': 'cuda', 'name': 'none', 'memory_bytes': 0, 'count': 0, 'id': None}, 'rank 2 (node-b) is local rank 0 but sees 0 GPU(s)'),
        ('device', {'kind': 'cuda', 'name': 'H100', 'memory_bytes': 80 * GIB, 'count': 2, 'id': 'gpu-3'}, 'ranks 2-3 (node-b) use the same GPU gpu-3'),
    ],
)
def test_what_stops_a_run(field: str, value: Any, message: str) -> None:
    problems, _ = _compare(rank2={field: value})
    assert len(problems) == 1
    assert message in problems[0]


def test_a_cache_that_is_still_empty_on_one_node_is_no_disagreement() -> None:
    assert _compare(rank2={'indexes': {}}, rank3={'indexes': {}}) == ([], [])


def test_what_only_warns() -> None:
    small = {'kind': 'cuda', 'name': 'A100', 'memory_bytes': 40 * GIB, 'count': 2, 'id': 'gpu-2'}
    problems, warnings = _compare(rank2={'device': small, 'clock': 1007.5, 'disk': {'folder': '/ckpt', 'free_bytes': GIB}})
    assert problems == []
    assert [w.partition(':')[0] for w in warnings] == ['device', 'disk', 'clock']
    assert 'rank 2 (node-b) up to 7.5 s ahead of the others (bound 5 s)' in warnings[2]
    assert 'H100 (80.0 GiB) on ranks 0-1 (node-a), rank 3 (node-b); A100 (40.0 GiB) on rank 2 (node-b)' in warnings[0]


def test_a_node_that_knows_itself_as_loopback_is_named_on_cpus() -> None:
    cpu = {'kind': 'cpu', 'name': '2 cores', 'memory_bytes': GIB, 'count': 2, 'id': None}
    reports = [_report(rank, device=cpu, address='127.0.1.1' if rank < 2 else '10.0.0.2') for rank in range(4)]
    (problem,), _ = facts.compare(reports)
    assert 'ranks 0-1 (node-a) would tell the other nodes to connect to 127.0.1.1' in problem
    assert 'GLOO_SOCKET_IFNAME' in problem


def test_description_groups_ranks_by_node() -> None:
    assert facts.describe([_report(rank) for rank in range(4)]) == [
        'pre-flight: 4 ranks on 2 node(s) agree: python 3.11.7, torch 2.7.0, composer 0.32.1; config c0; 1 data index(es)',
        '  node 0 (node-a): ranks 0-1: cuda H100, 80.0 GiB, 500.0 GiB free for /ckpt',
        '  node 1 (node-b): ranks 2-3: cuda H100, 80.0 GiB, 500.0 GiB free for /ckpt',
    ]


def test_differing_keys_are_named_with_both_values() -> None:
    assert facts.differing_keys({'a': '1', 'b': '2'}, {'a': '1', 'b': '3', 'c': '"x"'}) == ['b: 2 / 3', 'c: not set / "x"']
    assert facts.differing_keys({str(i): '1' for i in range(10)}, {}, limit=2)[-1] == 'and 8 more keys'


def _cases(folder: str) -> list[Any]:
    """In each of two processes: agreement, then one disagreement after the other, then a rank that is claimed twice, then one that never comes."""
    from torch import distributed

    from llmfoundry.config.load import load_train_config

    rank = dist.get_global_rank()
    store = distributed.distributed_c10d._get_default_store()
    _no_collectives()
    config = load_train_config(tiny_config(Path(folder) / 'data'), [])
    os.environ.pop('LLMFOUNDRY_PREFLIGHT', None)
    found: list[Any] = []

    def attempt(cfg: Any, **changes: Any) -> None:
        own, gather = facts.gather_facts, {**facts.gather_facts(cfg), **changes}
        facts.gather_facts = lambda _: gather  # type: ignore[assignment]
        start = time.perf_counter()
        try:
            preflight.check(cfg, store)
            found.append((None, time.perf_counter() - start))
        except PreflightError as e:
            found.append((str(e), time.perf_counter() - start))
        finally:
            facts.gather_facts = own

    preflight.LEAVE_S = 0.3
    attempt(config)
    attempt(load_train_config(tiny_config(Path(folder) / ('data' if rank == 0 else 'other')), []))
    os.chdir(Path(folder) / f'cwd{rank}')
    attempt(load_train_config(tiny_config(Path('data')), []))
    attempt(config, versions={**facts.package_versions(), 'torch': f'9.{rank}'})
    os.environ['LLMFOUNDRY_PREFLIGHT'] = 'warn'
    attempt(config, versions={**facts.package_versions(), 'torch': f'9.{rank}'})
    os.environ['LLMFOUNDRY_PREFLIGHT'] = 'off'
    attempt(config, versions={**facts.package_versions(), 'torch': f'9.{rank}'})
    os.environ.pop('LLMFOUNDRY_PREFLIGHT')
    attempt(config, rank=0)
    if rank == 0:
        attempt(load_train_config(tiny_config(Path(folder) / 'data', dist_timeout=1), []))
    store.set(f'done{rank}', '1')
    store.wait(['done0', 'done1'])
    _no_collectives(restore=True)
    return found


_barrier = None


def _no_collectives(restore: bool = False) -> None:
    global _barrier
    from torch import distributed

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError('a collective')

    if restore:
        distributed.barrier = _barrier
        return
    _barrier = distributed.barrier
    for name in ('barrier', 'all_reduce', 'all_gather_object', 'broadcast_object_list', 'all_gather', 'broadcast'):
        setattr(distributed, name, refuse)


@pytest.fixture(scope='module')
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    folder = tmp_path_factory.mktemp('preflight')
    make_data(folder / 'data')
    make_data(folder / 'other')
    for rank in range(2):
        make_data(folder / f'cwd{rank}' / 'data', num_train=64 + rank)
    return run_in_processes(_cases, 2, str(folder))


def test_two_processes_that_agree_lose_no_time(cases: list[list[Any]], record_property: Callable[[str, Any], None]) -> None:
    for message, seconds in (found[0] for found in cases):
        record_property('seconds', seconds)
        assert message is None
        assert seconds < 5.0  # 0.03 s on a quiet machine; a bound against waiting for a timeout, not a measurement


def test_two_processes_with_other_configs_stop_with_the_keys(cases: list[list[Any]]) -> None:
    message = cases[0][1][0]
    assert 'resolved config: hash ' in message
    assert 'resolved config, rank 0 / rank 1: train_loader.dataset.local: ' in message
    assert '/data" / ' in message
    assert cases[1][1][0] == message


def test_two_processes_with_other_data_in_a_folder_of_one_name_stop(cases: list[list[Any]]) -> None:
    message = cases[0][2][0]
    assert '1 problem(s)' in message
    assert 'data index data/train/index.json: ' in message
    assert 'The nodes would train on different data' in message


def test_two_processes_with_other_versions_stop_warn_or_go_as_told(cases: list[list[Any]]) -> None:
    assert 'version of torch: 9.0 on rank 0' in cases[0][3][0]
    assert all(found[3][0] is not None for found in cases)
    assert all(found[4][0] is None and found[5][0] is None for found in cases)


def test_a_rank_that_two_processes_claim_is_named_at_once(cases: list[list[Any]]) -> None:
    assert 'rank 0 is claimed by 2 processes' in cases[0][6][0]
    assert cases[0][6][1] < 60  # not dist_timeout, which is 600 s here


def test_a_rank_that_never_reports_is_named(cases: list[list[Any]]) -> None:
    message, seconds = cases[0][7]
    assert 'rank 1 (host unknown): no report within 1 s (dist_timeout); reported: rank 0 (' in message
    assert 1.0 <= seconds < 30


def test_a_rank_zero_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {'WORLD_SIZE': '2', 'RANK': '1', 'LOCAL_RANK': '0', 'LOCAL_WORLD_SIZE': '1', 'NODE_RANK': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '1'}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, 'is_initialized', lambda: False)
    with pytest.raises(PreflightError, match=r'rank 1 on .* got no answer from rank 0 at MASTER_ADDR=127.0.0.1, MASTER_PORT=1 within 1 s. Is node 0 started'):
        dist.open_store(1)
    monkeypatch.delenv('MASTER_PORT')
    with pytest.raises(PreflightError, match='MASTER_PORT is not set'):
        dist.open_store(1)


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as taken:
        taken.bind(('', 0))
        taken.listen()
        for name, value in {'WORLD_SIZE': '2', 'RANK': '0', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(taken.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(dist, 'is_initialized', lambda: False)
        with pytest.raises(PreflightError, match='is taken by another process'):
            dist.open_store(2)


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(preflight.VARIABLE, 'maybe')
    with pytest.raises(ConfigError, match='must be one of stop, warn, off'):
        preflight.check(None, None)  # type: ignore[arg-type]


def test_torchrun_numbers_nodes_as_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv('NODE_RANK', raising=False)
    monkeypatch.setenv('GROUP_RANK', '3')
    assert dist.get_node_rank() == 3
    monkeypatch.setenv('NODE_RANK', '')
    dist.complete_environment()
    assert os.environ['NODE_RANK'] == '3'


@pytest.mark.parametrize('address', ['127.0.0.1', '0.0.0.0', ''])
def test_gloo_chooses_for_itself_where_everything_is_one_machine(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '1', 'MASTER_ADDR': address, 'MASTER_PORT': '7501'}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv('GLOO_SOCKET_IFNAME', raising=False)
    assert dist.choose_gloo_interface() is None


def test_the_command_ends_with_one_list_and_exit_code_one(tmp_path: Path) -> None:
    """Two real ranks under composer, which fills each rank's variables into its arguments."""
    config = tiny_config(make_data(tmp_path / 'data'), metadata={'owner': 'nobody'})
    (tmp_path / 'config.yaml').write_text(json.dumps(config))
    done = run_command(['composer', '-n', '2', str(ROOT / 'scripts/train/train.py'), 'config.yaml', 'metadata.owner=$RANK'], tmp_path)
    output = done.stdout + done.stderr
    assert done.returncode == 1, output
    lines = output.splitlines()
    assert [line for line in lines if line.startswith('pre-flight: ')] == ['pre-flight: 2 problem(s) between the 2 rank(s) of this run:'], output
    assert lines.count('  resolved config, rank 0 / rank 1: metadata.owner: 0 / 1') == 1
    assert 'Traceback' not in output and 'c10::Error' not in output, output


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(preflight.VARIABLE, raising=False)
