"""Faults of an object store: the data stream from a real S3 server and checkpoints go to it, through a proxy that misbehaves."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

from tests.faults.jobs import SAVE_EVERY, STEPS, Job, base_config
from tests.faults.kinds import Campaign, Failed, Fault, Outcome, cause_of, check_final, kill, resume
from tests.helpers.s3_server import FaultyProxy, Rule, S3Server, faulty_proxy, s3_server

__all__ = ['OBJECT_STORE_KINDS']

# Rank 0 tries again for longer than the other kinds let a collective last; the other rank waits for it.
DIST_TIMEOUT_S = 120


class Store(NamedTuple):
    """The server, the proxy before it, and a job that uses both."""

    server: S3Server
    proxy: FaultyProxy
    job: Job


@contextlib.contextmanager
def _store(campaign: Campaign, folder: Path) -> Iterator[Store]:
    """A server that holds the data, and a run that streams from it and saves to it."""
    with s3_server() as server, faulty_proxy(server) as proxy:
        for path in sorted((campaign.data / 'train').iterdir()):
            server.client().upload_file(str(path), server.bucket, f'data/train/{path.name}')
        config = base_config(campaign.data, save_folder=f's3://{server.bucket}/ckpt', dist_timeout=DIST_TIMEOUT_S)
        config['train_loader']['dataset'] |= {'remote': f's3://{server.bucket}/data', 'local': str(folder / 'cache')}
        yield Store(server, proxy, campaign.job(folder, config, environment=proxy.environment))


def _check(campaign: Campaign, store: Store, folder: Path) -> None:
    """Downloads the final checkpoint past the proxy and compares it; nothing half-uploaded may be left."""
    server, final = store.server, folder / 'final'
    final.mkdir()
    keys = [key for key in server.keys('ckpt/') if f'-ba{STEPS}-' in key]
    if len(keys) != 1:
        raise Failed(f'{len(keys)} final checkpoints in the bucket: {server.keys("ckpt/")}')
    (final / keys[0].rpartition('/')[2]).write_bytes(server.read(keys[0]))
    check_final(campaign, store.job, folder=final)


def killed_in_upload(campaign: Campaign, folder: Path) -> Outcome:
    """All processes, while the proxy holds a request that uploads a checkpoint."""
    with _store(campaign, folder) as store:
        step = SAVE_EVERY * campaign.rng.randint(1, STEPS // SAVE_EVERY - 2)
        outcome = Outcome('kill -9 of all processes during an upload', f'step {step}')
        store.proxy.add(Rule('PUT|POST', rf'ckpt/.*ba{step}-', hold=True))
        store.job.start()
        store.job.wait_until(store.proxy.held.is_set, 'the upload')
        kill(store.job, outcome)
        store.proxy.rules.clear()
        store.proxy.release()
        resume(store.job, outcome)
        _check(campaign, store, folder)
    return outcome


def survived(name: str, *rules: Rule) -> Callable[[Campaign, Path], Outcome]:
    """Faults that pass by themselves: the run must not even end."""

    def produce(campaign: Campaign, folder: Path) -> Outcome:
        with _store(campaign, folder) as store:
            fresh = [Rule(**{**_fields(rule), 'times': campaign.rng.randint(1, rule.times)}) for rule in rules]
            outcome = Outcome(name, f'{sum(r.times for r in fresh)} requests')
            store.proxy.add(*fresh)
            store.job.start()
            outcome.exit_code = store.job.wait()
            if outcome.exit_code != 0:
                raise Failed(f'the run ended with {outcome.exit_code}: {cause_of(store.job.output)} {store.job.output[-600:]}')
            if not all(rule.seen for rule in fresh):
                raise Failed('the proxy met none of the requests that it should have failed')
            outcome.result = 'bit-identical'
            _check(campaign, store, folder)
        return outcome

    return produce


def gone(campaign: Campaign, folder: Path) -> Outcome:
    """The store answers 503 for good from some checkpoint on; later it is back."""
    with _store(campaign, folder) as store:
        step = SAVE_EVERY * campaign.rng.randint(2, STEPS // SAVE_EVERY - 2)
        outcome = Outcome('object store gone for good', f'from the upload of step {step}')
        store.proxy.add(Rule('PUT|POST', rf'ckpt/.*ba{step}-', times=10**6, status=503))
        store.job.start()
        outcome.exit_code = store.job.wait()
        if outcome.exit_code == 0:
            raise Failed('the run ended with 0 although a checkpoint could not be uploaded')
        outcome.cause = cause_of(store.job.output)
        store.proxy.rules.clear()
        resume(store.job, outcome)
        _check(campaign, store, folder)
    return outcome


def _fields(rule: Rule) -> dict[str, Any]:
    return {name: getattr(rule, name) for name in ('method', 'path', 'times', 'status', 'cut_after', 'delay_s', 'hold')}


OBJECT_STORE_KINDS: list[Fault] = [
    Fault('kill in an upload', killed_in_upload, 2),
    Fault('S3 errors', survived('S3 answers 500 and 503, to reads and writes', Rule('PUT|POST', 'ckpt/', 3, status=500), Rule('GET', r'data/.*shard', 2, status=503))),
    Fault('S3 cuts', survived('S3 connections cut in mid-body', Rule('PUT|POST', 'ckpt/', 2, cut_after=1 << 14), Rule('GET', r'data/.*shard', 2, cut_after=200))),
    Fault('S3 is slow', survived('S3 answers after 3 s', Rule('PUT|POST', 'ckpt/', 3, delay_s=3.0), Rule('GET', r'data/.*shard', 2, delay_s=3.0))),
    Fault('S3 is gone', gone),
]
