"""A folder on a real S3 server over HTTP, in memory and on disk: the same calls, whole or absent, faults outlived, refusals named."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path
from typing import Iterator

import pytest

from llmfoundry.checkpoint.remote_store import INCOMPLETE_PREFIX, RemoteStore, shown_uri
from llmfoundry.data import network_faults
from llmfoundry.data.network_faults import is_transient, with_retries
from llmfoundry.errors import RemoteStoreError
from tests.helpers.s3_server import FaultyProxy, Rule, S3Server, faulty_proxy, s3_server


@pytest.fixture(scope='module')
def server() -> Iterator[S3Server]:
    with s3_server() as started:
        yield started


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with faulty_proxy(server) as started:
        for name, value in started.environment.items():
            monkeypatch.setenv(name, value)
        yield started


def _store(uri: str, attempts: int = 4) -> RemoteStore:
    return RemoteStore(uri, attempts=attempts, first_pause_s=0.01)


@pytest.mark.parametrize('kind', ['s3', 'memory', 'file', 'path'])
def test_the_same_calls_on_every_kind_of_place(proxy: FaultyProxy, tmp_path: Path, kind: str) -> None:
    place = uuid.uuid4().hex
    store = _store({'s3': f's3://runs/{place}/a', 'memory': f'memory://{place}/a', 'file': f'file://{tmp_path}/out/a', 'path': str(tmp_path / 'out/a')}[kind])
    assert store.list() == [] and not store.exists('x.bin')
    local = tmp_path / 'x.bin'
    local.write_bytes(os.urandom(100_000))
    store.upload(local, 'ep0-ba2/x.bin')
    store.write_text('latest.symlink', 'ep0-ba2')
    store.write_text('ep0-ba20/y', 'y')
    assert store.list() == ['ep0-ba2/x.bin', 'ep0-ba20/y', 'latest.symlink']
    assert store.list('ep0-ba2/') == ['ep0-ba2/x.bin'] and store.exists('ep0-ba2/x.bin') and not store.exists('ep0-ba2/x')
    store.write_text('latest.symlink', 'ep0-ba3')
    assert store.read_text('latest.symlink') == 'ep0-ba3'
    store.download('ep0-ba2/x.bin', tmp_path / 'back' / 'x.bin')
    assert (tmp_path / 'back' / 'x.bin').read_bytes() == local.read_bytes() and os.listdir(tmp_path / 'back') == ['x.bin']
    store.delete('ep0-ba2/x.bin')
    store.delete('ep0-ba2/x.bin')
    assert store.list() == ['ep0-ba20/y', 'latest.symlink']
    with pytest.raises(FileNotFoundError, match=r'ep0-ba2/x\.bin: there is no such object'):
        store.download('ep0-ba2/x.bin', tmp_path / 'gone')
    store.check_writable()
    assert store.list() == ['ep0-ba20/y', 'latest.symlink']
    assert not (tmp_path / 'gone').exists() and not list(tmp_path.rglob(f'{INCOMPLETE_PREFIX}*'))


@pytest.mark.parametrize(
    'rules',
    [
        [Rule('PUT', 'x.bin', times=3, status=503)],
        [Rule('PUT', 'x.bin', times=2, status=500), Rule('GET|HEAD', 'x.bin', times=3, status=500)],
        [Rule('PUT', 'x.bin', times=3, cut_after=5000), Rule('GET', 'x.bin', times=6, cut_after=70_000)],
        [Rule('PUT|GET|HEAD', 'x.bin', times=3, delay_s=0.3)],
    ],
    ids=['slow down', 'out of order', 'cut in mid-body', 'slow'],
)
def test_faults_of_the_network_are_outlived(proxy: FaultyProxy, tmp_path: Path, rules: list[Rule]) -> None:
    store = _store(f's3://runs/{uuid.uuid4().hex}')
    local = tmp_path / 'x.bin'
    local.write_bytes(os.urandom(200_000))
    proxy.add(*rules)
    store.upload(local, 'x.bin')
    store.download('x.bin', tmp_path / 'back.bin')
    assert (tmp_path / 'back.bin').read_bytes() == local.read_bytes()
    assert all(rule.seen == rule.times for rule in rules)


def test_attempts_end_with_one_error_that_names_the_place(proxy: FaultyProxy, tmp_path: Path) -> None:
    store = _store('s3://runs/folder', attempts=2)
    proxy.add(Rule('PUT', 'x.bin', times=1000, status=503))
    (tmp_path / 'x.bin').write_bytes(b'x')
    with pytest.raises(RemoteStoreError, match=r'save_folder: uploading s3://runs/folder/x\.bin failed: .*given up after 2 attempts.*S3_ENDPOINT_URL'):
        store.upload(tmp_path / 'x.bin', 'x.bin')
    assert store.list() == []


def test_refusals_are_not_tried_again(proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_faults.time, 'sleep', lambda s: pytest.fail('a refusal was tried again'))
    with pytest.raises(RemoteStoreError, match=r"bucket 'nosuch' does not exist at this address.*S3_ENDPOINT_URL"):
        _store('s3://nosuch/folder').list()
    store = _store('s3://runs/refused')
    (tmp_path / 'x').write_bytes(b'x')
    proxy.add(Rule('PUT|GET|HEAD|DELETE', 'refused', times=1000, status=403))
    for call in (lambda: store.upload(tmp_path / 'x', 'x'), lambda: store.download('x', tmp_path / 'y'), lambda: store.list(), lambda: store.delete('x')):
        with pytest.raises(RemoteStoreError, match=r"access is refused \(.*403|AccessDenied.*bucket 'runs'.*AWS_SECRET_ACCESS_KEY") as error:
            call()
        assert 'test' not in str(error.value), 'no credentials in messages'


def test_what_has_no_library_is_said(tmp_path: Path) -> None:
    with pytest.raises(RemoteStoreError, match='save_folder: opening nosuchscheme://a/b failed: no library here opens nosuchscheme://'):
        _store('nosuchscheme://a/b')


def test_unfinished_uploads_of_a_killed_run_are_removed(server: S3Server, proxy: FaultyProxy) -> None:
    for key in ('killed/ep0-ba2-rank0.pt', 'killed/other-run/ep0-ba2-rank0.pt'):
        server.client().create_multipart_upload(Bucket='runs', Key=key)
    assert _store('s3://runs/killed').remove_unfinished_uploads(lambda name: '/' not in name) == 1
    assert server.unfinished_uploads() == ['killed/other-run/ep0-ba2-rank0.pt']


def test_what_counts_as_a_fault_of_the_network(tmp_path: Path) -> None:
    assert is_transient(ConnectionResetError()) and is_transient(OSError(errno.ENETUNREACH, 'x')) and is_transient(TimeoutError())
    assert not is_transient(OSError(errno.ENOSPC, 'full')) and not is_transient(FileNotFoundError()) and not is_transient(ValueError('x')) and not is_transient(PermissionError())
    wrapped = ValueError('Time out when uploading')
    wrapped.__cause__ = ConnectionAbortedError()
    assert is_transient(wrapped)


def test_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(network_faults.time, 'sleep', pauses.append)
    with pytest.raises(ConnectionResetError):
        with_retries(lambda: (_ for _ in ()).throw(ConnectionResetError()), 'x', attempts=6, first_pause_s=1.0, longest_pause_s=5.0)
    assert len(pauses) == 5 and all(low <= pause <= high for pause, low, high in zip(pauses, (0.5, 1, 2, 2.5, 2.5), (1, 2, 4, 5, 5), strict=True)) and len(set(pauses)) == 5


def test_no_password_is_shown() -> None:
    assert shown_uri('sftp://me:secret@host/a') == 'sftp://me:***@host/a' and shown_uri('s3://bucket/a:b@c') == 's3://bucket/a:b@c'
