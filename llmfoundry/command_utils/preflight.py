"""Pre-flight: before the first collective, the processes of a run tell one another what they are, and a run that could only hang or compute nonsense stops with the reason.

A collective between ranks that disagree (another torch, another config, a missing node) hangs until a timeout that names nothing. So the exchange goes through the key-value store of the
run, in which rank 0 can see who has spoken and who has not: each rank writes its facts, rank 0 compares them once all are there, and writes the verdict. Two round trips, no collective.

``LLMFOUNDRY_PREFLIGHT=warn`` prints disagreements and goes on; ``off`` skips all of it (the same on every rank).
"""

from __future__ import annotations

import datetime
import itertools
import os
import time
from typing import Any, Sequence

from llmfoundry.command_utils import preflight_facts as facts
from llmfoundry.command_utils.train_setup import say
from llmfoundry.config.train import TrainConfig
from llmfoundry.errors import ConfigError, ConfigProblem, PreflightError

__all__ = ['VARIABLE', 'check', 'exchange']

VARIABLE = 'LLMFOUNDRY_PREFLIGHT'
MODES = ('stop', 'warn', 'off')
NOTICE_S = 30.0  # between two lines about ranks that are still missing
LEAVE_S = 5.0  # how long rank 0 waits for the others to read that the run is to stop
_calls = itertools.count()


def check(cfg: TrainConfig, store: Any | None) -> None:
    """Compares this process with the others of the run and prints what they are, once.

    Args:
        cfg: the resolved config.
        store: the key-value store that all ranks share; None in a run of one process, which looks at its disk only.

    Raises:
        PreflightError: ranks disagree, or some did not report within ``dist_timeout``. The list is the message on every rank; the training command prints it once per node.
    """
    mode = os.environ.get(VARIABLE) or 'stop'
    if mode not in MODES:
        raise ConfigError([ConfigProblem(VARIABLE, f'is {mode!r}; must be one of {", ".join(MODES)}')], source='the environment')
    if mode == 'off':
        return
    own = facts.gather_facts(cfg)
    if store is None:
        problems, warnings = facts.compare([{**own, 'clock': 0.0}])
        lines: list[str] = []
    else:
        problems, warnings, lines = exchange(store, own, facts.config_values(cfg), float(cfg.dist_timeout), may_stop=mode == 'stop')
    if not problems:
        say(lines)
    say(f'pre-flight warning: {text}' for text in (warnings if mode == 'stop' else [*problems, *warnings]))
    if problems and mode == 'stop':
        raise PreflightError(_list(problems, own))


def exchange(store: Any, own: facts.Facts, config: dict[str, str], timeout_s: float, may_stop: bool = True) -> tuple[list[str], list[str], list[str]]:
    """Reports to the others and returns problems, warnings and the description of the run, the same on every rank.

    Args:
        store: key-value store of the run.
        own: facts of this rank.
        config: flattened config, asked for only where hashes differ.
        timeout_s: seconds within which every rank has to report.
        may_stop: whether the processes end if there is a problem.
    """
    from torch.distributed import PrefixStore

    store = PrefixStore(f'preflight/{next(_calls)}', store)
    rank = own['rank']
    store.set(f'config/{rank}', facts.pack(config))
    store.set(f'facts/{rank}', facts.pack(own))
    claims = store.add(f'claims/{rank}', 1)
    store.set(f'claim/{rank}/{claims}', own['host'])
    if claims > 1:
        store.set('twice', str(rank))
    if rank == 0 and claims == 1:
        verdict = _judge(store, own, timeout_s)
        store.set('verdict', facts.pack(verdict))
        store.set('go', b'1')
    else:
        verdict = _await_verdict(store, own, timeout_s)
    if verdict[0] and may_stop:
        _wait_for_readers(store, own)
    return tuple(verdict)


def _judge(store: Any, own: facts.Facts, timeout_s: float) -> tuple[list[str], list[str], list[str]]:
    """Rank 0: waits for all reports, has all clocks read at one moment, and compares."""
    world_size = own['world_size']
    missing = _await_keys(store, [f'facts/{rank}' for rank in range(world_size)], timeout_s, 'reported')
    if store.check(['twice']):
        return [_claimed_twice(store)], [], []
    present = [rank for rank in range(world_size) if f'facts/{rank}' not in missing]
    reports = [dict(facts.unpack(store.get(f'facts/{rank}'))) for rank in present]
    if missing:
        absent = [{'rank': int(key.partition('/')[2]), 'host': 'host unknown'} for key in missing]
        return [
            f'{facts.ranks_text(absent)}: no report within {timeout_s:g} s (dist_timeout); reported: {facts.ranks_text(reports)}. Look at the output of the missing nodes: not started, '
            f'failed before this point, or started with another WORLD_SIZE than {world_size}.',
        ], [], []
    store.set('go', b'1')
    reports[0]['clock'] = time.time()
    late = _await_keys(store, [f'clock/{rank}' for rank in range(1, world_size)], timeout_s, 'answered')
    for report in reports[1:]:
        key = f'clock/{report["rank"]}'
        report['clock'] = reports[0]['clock'] if key in late else float(store.get(key))
    problems, warnings = facts.compare(reports)
    return [*problems, *_config_differences(store, reports)], warnings, facts.describe(reports)


def _claimed_twice(store: Any) -> str:
    rank = int(store.get('twice'))
    hosts = [store.get(f'claim/{rank}/{claim}').decode() for claim in range(1, store.add(f'claims/{rank}', 0) + 1)]
    return f'rank {rank} is claimed by {len(hosts)} processes, on {", ".join(hosts)}. Give every node its own NODE_RANK (or --node_rank), counted from 0.'


def _await_keys(store: Any, keys: Sequence[str], timeout_s: float, verb: str) -> list[str]:
    """Waits until every key is there; returns those that are not after ``timeout_s``, or once two processes claim one rank. Says every half minute how many are missing."""
    start = said = time.monotonic()
    missing = list(keys)
    pause_s = 0.005
    while missing:
        while missing and store.check([missing[0]]):
            missing.pop(0)
        now = time.monotonic()
        if not missing or now - start > timeout_s or store.check(['twice']):
            break
        if now - said > NOTICE_S:
            said = now
            say([f'pre-flight: {len(keys) - len(missing)} of {len(keys)} ranks have {verb} after {now - start:.0f} s; waiting for rank {missing[0].partition("/")[2]} and maybe others'])
        time.sleep(pause_s)
        pause_s = min(0.5, pause_s * 1.5)
    return [key for key in missing if not store.check([key])]


def _await_verdict(store: Any, own: facts.Facts, timeout_s: float) -> Any:
    patience = datetime.timedelta(seconds=timeout_s + NOTICE_S)
    try:
        store.wait(['go'], patience)
        store.set(f'clock/{own["rank"]}', str(time.time()))
        store.wait(['verdict'], patience)
        return facts.unpack(store.get('verdict'))
    except RuntimeError as e:  # torch's DistStoreError (time is up) and DistNetworkError (rank 0 is gone)
        raise PreflightError(
            f'rank {own["rank"]} ({own["host"]}) has reported, but rank 0 at {os.environ.get("MASTER_ADDR")}:{os.environ.get("MASTER_PORT")} has ended or does not answer. '
            f'Its output tells why. ({str(e).splitlines()[0]})',
        ) from e


def _config_differences(store: Any, reports: Sequence[facts.Facts]) -> list[str]:
    """The keys in which configs differ: rank 0's against the first rank of each other hash."""
    first = facts.unpack(store.get('config/0'))
    seen = {reports[0]['config']}
    problems = []
    for report in reports:
        if report['config'] not in seen:
            seen.add(report['config'])
            lines = facts.differing_keys(first, facts.unpack(store.get(f'config/{report["rank"]}')))
            problems.append(f'resolved config, rank 0 / rank {report["rank"]}: ' + '; '.join(lines))
    return problems


def _wait_for_readers(store: Any, own: facts.Facts) -> None:
    """Rank 0, which serves the store, stays until every process has read the verdict, for ``LEAVE_S`` at most."""
    deadline = time.monotonic() + LEAVE_S
    readers = store.add('readers', 1)
    while own['rank'] == 0 and readers < own['world_size'] and time.monotonic() < deadline:
        time.sleep(0.02)
        readers = store.add('readers', 0)


def _list(problems: Sequence[str], own: facts.Facts) -> str:
    return '\n'.join([f'pre-flight: {len(problems)} problem(s) between the {own["world_size"]} rank(s) of this run:', *(f'  {p}' for p in problems)])
