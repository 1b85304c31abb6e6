"""Objects are downloaded one at a time, when their turn comes, below the output folder."""

from __future__ import annotations

from pathlib import Path

from llmfoundry.utils import DownloadingIterable


class Store:
    def __init__(self) -> None:
        self.downloaded: list[str] = []

    def download_object(self, object_name: str, filename: str) -> None:
        self.downloaded.append(object_name)
        Path(filename).write_text(f'text of {object_name}')


def test_downloads_when_asked(tmp_path: Path) -> None:
    store = Store()
    files = iter(DownloadingIterable(['a/1.txt', 'a/2.txt'], tmp_path, store))
    first = next(files)
    assert store.downloaded == ['a/1.txt']
    assert first == str(tmp_path / 'a' / '1.txt') and Path(first).read_text() == 'text of a/1.txt'
    assert [Path(f).name for f in files] == ['2.txt']


def test_local_names_pass_through(tmp_path: Path) -> None:
    assert list(DownloadingIterable(['x.txt'], tmp_path, None)) == ['x.txt']
