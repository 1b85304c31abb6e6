"""Every place from which finetuning rows can come gives the same rows, and what is not there or not allowed is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pytest

from llmfoundry.data import remote_files
from llmfoundry.data.finetuning import downloads, safe_load
from llmfoundry.data.finetuning.sources import describe_source, fingerprint, load_rows
from llmfoundry.errors import (
    FinetuningFileNotFoundError,
    InvalidFileExtensionError,
    MisconfiguredHfDatasetError,
    MissingHuggingFaceURLSplitError,
)

ROWS = [{'prompt': f'Question {i}?', 'response': f'Answer {i}.'} for i in range(12)]
OTHER = [{'prompt': 'other', 'response': 'rows'}]


def write_rows(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Rows as csv, json, jsonl or parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.jsonl':
        path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    elif path.suffix == '.json':
        path.write_text(json.dumps(rows))
    else:
        data = datasets.Dataset.from_list(rows)
        data.to_csv(str(path)) if path.suffix == '.csv' else data.to_parquet(str(path))
    return path


def rows_of(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    return load_rows(*args, **kwargs).to_list()


def test_no_split():
    for split in (None, ''):
        with pytest.raises(MissingHuggingFaceURLSplitError, match='you must set the `split` key'):
            load_rows('json', split)


@pytest.mark.parametrize('extension', ['csv', 'json', 'jsonl', 'parquet'])
def test_files_of_each_kind_in_each_form(tmp_path, extension):
    path = write_rows(tmp_path / 'data' / f'train.{extension}')
    write_rows(tmp_path / 'data' / f'test.{extension}', OTHER)
    builder = 'json' if extension == 'jsonl' else extension
    assert rows_of(str(path), 'train') == ROWS
    assert rows_of(str(tmp_path / 'data'), 'train') == ROWS
    assert rows_of(str(tmp_path / 'data'), 'test') == OTHER
    assert rows_of(builder, 'train', {'data_files': str(path)}) == ROWS
    assert rows_of(builder, 'train', {'data_files': [str(path)]}) == ROWS
    assert rows_of(builder, 'train', {'data_files': {'train': str(path)}}) == ROWS
    assert rows_of(builder, 'train', {'data_dir': str(tmp_path / 'data')}) == ROWS
    assert rows_of(f'file://{path}', 'train') == ROWS
    assert rows_of(f'file://{tmp_path}/data', 'train') == ROWS
    assert rows_of(builder, 'train', {'data_dir': f'file://{tmp_path}/data'}) == ROWS


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write_rows(tmp_path / 'data' / 'train.jsonl')
    assert rows_of('~/data', 'train') == rows_of('~/data/train.jsonl', 'train') == ROWS


def test_slices_and_sums_of_splits(tmp_path):
    write_rows(tmp_path / 'train.jsonl')
    write_rows(tmp_path / 'test.jsonl', OTHER)
    assert rows_of(str(tmp_path), 'train[:3]+test') == ROWS[:3] + OTHER
    assert rows_of(str(tmp_path), 'train[-2:]') == ROWS[-2:]


def test_a_split_with_dashes_and_a_split_called_data(tmp_path):
    write_rows(tmp_path / 'train-small.jsonl')
    write_rows(tmp_path / 'data.jsonl', OTHER)
    write_rows(tmp_path / 'train.jsonl', ROWS[:1])
    assert rows_of(str(tmp_path), 'train-small') == ROWS
    assert rows_of(str(tmp_path), 'train-small[-3:]') == ROWS[-3:]
    assert rows_of(str(tmp_path), 'data') == OTHER
    assert rows_of('json', 'train-small', {'data_files': {'train-small': str(tmp_path / 'train-small.jsonl')}}) == ROWS


def test_unknown_split_names_those_there_are(tmp_path):
    write_rows(tmp_path / 'train.jsonl')
    with pytest.raises(ValueError, match=r'Unknown split "val". Should be one of \[\'train\'\]'):
        load_rows(str(tmp_path), 'val')


@pytest.mark.parametrize('key', ['split', 'path'])
def test_keys_that_are_ours(key):
    with pytest.raises(ValueError, match=rf"hf_kwargs.{key}: 'x' cannot be given here; use `{'hf_name' if key == 'path' else 'split'}`"):
        load_rows('json', 'train', {key: 'x'})
    with pytest.raises(ValueError, match='hf_kwargs.streaming: True cannot be given here; for streaming use `remote` and `local`'):
        load_rows('json', 'train', {'streaming': True})


class TestSavedToDisk:
    def test_one_split(self, tmp_path):
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / 'saved')
        assert rows_of(str(tmp_path / 'saved'), 'train') == ROWS
        assert rows_of(str(tmp_path / 'saved'), 'anything[2:4]') == ROWS[2:4]

    def test_several_splits(self, tmp_path):
        datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(OTHER)).save_to_disk(tmp_path / 'saved')
        assert rows_of(str(tmp_path / 'saved'), 'train[:50%]+test') == ROWS[:6] + OTHER
        with pytest.raises(ValueError, match="saved: no split 'val'; it has test, train"):
            load_rows(str(tmp_path / 'saved'), 'val')


class TestArrowFiles:
    """Files of pre-tokenised rows, mapped and not copied."""

    ROWS = [{'input_ids': [1, 2, 3], 'labels': [-100, 2, 3]}, {'input_ids': [4], 'labels': [4]}]

    def write(self, path: Path, new: Any = pa.ipc.new_file) -> Path:
        table = pa.Table.from_pylist(self.ROWS)
        with pa.OSFile(str(path), 'wb') as f, new(f, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        return path

    @pytest.mark.parametrize('new', [pa.ipc.new_file, pa.ipc.new_stream])
    def test_both_formats(self, tmp_path, new):
        path = self.write(tmp_path / 'train.pythia.arrow', new)
        assert rows_of(str(path), 'train') == self.ROWS
        assert rows_of(str(path), 'eval[1:]') == self.ROWS[1:]
        assert rows_of('arrow', 'train', {'data_files': str(path)}) == self.ROWS

    def test_the_fingerprint_follows_the_file(self, tmp_path):
        path = self.write(tmp_path / 'a.arrow')
        before = fingerprint(load_rows(str(path), 'train'))
        assert before == fingerprint(load_rows(str(path), 'train')) != fingerprint(load_rows(str(path), 'train[:1]'))
        os.utime(path, ns=(1, 1))
        assert before != fingerprint(load_rows(str(path), 'train'))

    def test_a_file_that_was_cut_off(self, tmp_path):
        path = self.write(tmp_path / 'a.arrow')
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(MisconfiguredHfDatasetError, match=r'a.arrow is no Arrow file of record batches, or was cut off'):
            load_rows(str(path), 'train')


class TestWhatIsNotThere:
    @pytest.mark.parametrize('name', ['/no/such/folder', './no/such', 'no/such/folder', 'nothing.jsonl', 'data/nothing.arrow'])
    def test_a_path(self, name):
        with pytest.raises(FinetuningFileNotFoundError, match=f'Could not find a finetuning file. Looked for: {name}'):
            load_rows(name, 'train')

    def test_a_data_file(self, tmp_path):
        with pytest.raises(FinetuningFileNotFoundError, match=f"Looked for: .*{tmp_path}/gone.jsonl"):
            load_rows('json', 'train', {'data_files': f'{tmp_path}/gone.jsonl'})

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(FinetuningFileNotFoundError, match=str(tmp_path)):
            load_rows('json', 'train', {'data_dir': str(tmp_path)})

    def test_a_name_while_the_hub_cannot_be_asked(self):
        with pytest.raises(ConnectionError, match='hf_name nobody/nothing: no file or folder of that name here, and the Hub cannot be asked'):
            load_rows('nobody/nothing', 'train')


class TestBrokenFiles:
    def test_the_reason_names_the_file(self, tmp_path):
        write_rows(tmp_path / 'good.jsonl')
        (tmp_path / 'bad.jsonl').write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
        with pytest.raises(MisconfiguredHfDatasetError, match=rf'Your dataset \(name=json, split=train\) is misconfigured.* Reason: .*{tmp_path}/bad.jsonl'):
            load_rows('json', 'train', {'data_files': [str(tmp_path / 'good.jsonl'), str(tmp_path / 'bad.jsonl')]})

    def test_columns_that_do_not_agree(self, tmp_path):
        write_rows(tmp_path / 'a.parquet')
        write_rows(tmp_path / 'b.parquet', [{'question': 'x'}])
        with pytest.raises(MisconfiguredHfDatasetError, match='Reason: '):
            load_rows('parquet', 'train', {'data_files': [str(tmp_path / 'a.parquet'), str(tmp_path / 'b.parquet')]})


@pytest.fixture
def memory(monkeypatch):
    """fsspec's memory file system, empty; counts the downloads."""
    fs = fsspec.filesystem('memory')
    fs.store.clear()
    fs.pseudo_dirs[:] = ['']
    fetched: list[str] = []
    fetch = remote_files.fetch
    monkeypatch.setattr(downloads, 'fetch', lambda uri, path: (fetched.append(uri), fetch(uri, path)))
    fs.fetched = fetched
    yield fs
    fs.store.clear()


def put(fs: Any, tmp_path: Path, name: str, rows: list[dict[str, Any]] = ROWS) -> None:
    fs.put_file(str(write_rows(tmp_path / 'upload' / Path(name).name, rows)), f'/{name}')


class TestRemote:
    def test_the_first_extension_that_exists(self, memory, tmp_path):
        for extension in ('parquet', 'jsonl', 'json', 'csv'):
            put(memory, tmp_path, f'bucket/train.{extension}', [{'prompt': extension, 'response': 'x'}])
            assert rows_of('memory://bucket', 'train') == [{'prompt': extension, 'response': 'x'}]
            assert memory.fetched[-1] == f'memory://bucket/train.{extension}'

    def test_nothing_found_lists_what_was_tried(self, memory):
        with pytest.raises(FinetuningFileNotFoundError) as e:
            load_rows('memory://bucket/x/', 'train')
        tried = [f'memory://bucket/x/train.{extension}' for extension in ('csv', 'json', 'jsonl', 'parquet')]
        assert str(e.value) == f'Could not find a finetuning file. Looked for: {", ".join(tried)}.'

    @pytest.mark.parametrize('split', ['data', 'train-small', 'val_x'])
    def test_any_name_of_a_split(self, memory, tmp_path, split):
        put(memory, tmp_path, f'bucket/{split}.jsonl')
        assert rows_of('memory://bucket', split) == ROWS
        assert rows_of('memory://bucket', f'{split}[:2]') == ROWS[:2]

    def test_dashes_as_underscores_in_the_file_name(self, memory, tmp_path):
        put(memory, tmp_path, 'bucket/train_small.jsonl')
        assert rows_of('memory://bucket', 'train-small') == ROWS

    def test_downloaded_once_until_it_changes(self, memory, tmp_path):
        put(memory, tmp_path, 'bucket/train.jsonl')
        first = load_rows('memory://bucket', 'train')
        second = load_rows('memory://bucket', 'train')
        assert len(memory.fetched) == 1 and fingerprint(first) == fingerprint(second)
        put(memory, tmp_path, 'bucket/train.jsonl', OTHER)
        assert rows_of('memory://bucket', 'train') == OTHER
        assert len(memory.fetched) == 2

    def test_a_file_a_pattern_and_a_folder(self, memory, tmp_path):
        put(memory, tmp_path, 'bucket/train.jsonl')
        put(memory, tmp_path, 'bucket/more/train-1.jsonl', OTHER)
        put(memory, tmp_path, 'bucket/more/notes.csv', OTHER)
        assert rows_of('memory://bucket/train.jsonl', 'train') == ROWS
        assert rows_of('json', 'train', {'data_files': {'train': ['memory://bucket/train.jsonl', 'memory://bucket/more/*.jsonl']}}) == ROWS + OTHER
        assert rows_of('json', 'train', {'data_dir': 'memory://bucket/more'}) == OTHER
        for kwargs in ({'data_files': 'memory://bucket/none.jsonl'}, {'data_files': 'memory://bucket/*.csv'}, {'data_dir': 'memory://elsewhere'}):
            with pytest.raises(FinetuningFileNotFoundError, match='memory://'):
                load_rows('json', 'train', kwargs)

    def test_an_interrupted_download_is_not_taken_for_the_file(self, memory, tmp_path, monkeypatch):
        put(memory, tmp_path, 'bucket/train.jsonl')

        def broken(uri: str, path: str) -> None:
            Path(path).write_text('{"prompt": "half')
            raise OSError('connection lost')

        with monkeypatch.context() as patched, pytest.raises(OSError, match='connection lost'):
            patched.setattr(downloads, 'fetch', broken)
            load_rows('memory://bucket', 'train')
        assert rows_of('memory://bucket', 'train') == ROWS

    def test_an_object_store_that_fsspec_does_not_know(self, tmp_path, monkeypatch):
        bucket = tmp_path / 'bucket'
        write_rows(bucket / 'x' / 'train.jsonl')
        calls = []

        class Store:
            def get_object_size(self, key: str) -> int:
                return (bucket / key).stat().st_size

            def download_object(self, key: str, path: str, overwrite: bool) -> None:
                calls.append(key)
                Path(path).write_bytes((bucket / key).read_bytes())

        for module in (remote_files, downloads):
            monkeypatch.setattr(module, 'filesystem', lambda uri: None)
            monkeypatch.setattr(module, 'object_store', lambda uri: (Store(), uri.split('/', 3)[3]))
        first = load_rows('oci://bucket/x', 'train')
        assert first.to_list() == ROWS
        # Such stores know no versions: fetched again, and found to be the same.
        assert fingerprint(load_rows('oci://bucket/x', 'train')) == fingerprint(first)
        assert calls == ['x/train.jsonl'] * 2
        write_rows(bucket / 'x' / 'train.jsonl', OTHER)
        assert rows_of('oci://bucket/x', 'train') == OTHER


class TestSafeLoad:
    """Only csv, json, jsonl and parquet."""

    @pytest.mark.parametrize('extra', ['train.lock', 'x.metadata', '.gitignore', '.cache/huggingface/a.lock'])
    def test_what_a_download_leaves_is_allowed(self, tmp_path, extra):
        write_rows(tmp_path / 'train.jsonl')
        (tmp_path / extra).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / extra).write_text('')
        assert rows_of(str(tmp_path), 'train', safe_load=True) == ROWS

    @pytest.mark.parametrize('extra', ['script.py', 'weights.pkl', 'a/b/data.arrow', 'README.md', 'notes.txt'])
    def test_anything_else_is_refused(self, tmp_path, extra):
        write_rows(tmp_path / 'train.jsonl')
        (tmp_path / extra).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / extra).write_text('')
        with pytest.raises(InvalidFileExtensionError) as e:
            load_rows(str(tmp_path), 'train', safe_load=True)
        assert str(e.value) == (
            "safe_load is set to True. No data files with safe extensions ['.csv', '.json', '.jsonl', '.parquet'] found for dataset at local path " f'{tmp_path}.'
        )
        assert Path(extra).name in str(e.value.__cause__)

    def test_files_of_a_builder(self, tmp_path):
        path = write_rows(tmp_path / 'train.jsonl')
        assert rows_of('json', 'train', {'data_files': {'train': str(path)}}, safe_load=True) == ROWS
        assert rows_of(str(path), 'train', safe_load=True) == ROWS
        path.rename(tmp_path / 'train.txt')
        with pytest.raises(InvalidFileExtensionError):
            load_rows('json', 'train', {'data_files': str(tmp_path / 'train.txt')}, safe_load=True)

    def test_arrow_and_saved_folders(self, tmp_path):
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / 'saved')
        for name, kwargs in ((str(tmp_path / 'saved'), {}), ('arrow', {'data_dir': str(tmp_path / 'saved')}), (str(next((tmp_path / 'saved').glob('*.arrow'))), {})):
            with pytest.raises(InvalidFileExtensionError):
                load_rows(name, 'train', kwargs, safe_load=True)

    def test_remote(self, memory, tmp_path):
        put(memory, tmp_path, 'bucket/train.jsonl')
        assert rows_of('memory://bucket', 'train', safe_load=True) == ROWS

    def test_hub_downloads_safe_files_only(self, tmp_path, monkeypatch):
        asked = {}

        def snapshot(name: str, **kwargs: Any) -> str:
            asked.update(kwargs, name=name)
            write_rows(tmp_path / 'hub' / 'data' / 'train.jsonl')
            # What an earlier download without safe_load has left.
            for other in ('README.md', 'script.py', 'train.arrow'):
                (tmp_path / 'hub' / other).write_text('x')
            return str(tmp_path / 'hub')

        monkeypatch.setattr(safe_load, 'snapshot_download', snapshot)
        assert rows_of('org/set', 'train', {'token': 'secret', 'revision': 'v1'}, safe_load=True) == ROWS
        assert asked == {
            'name': 'org/set', 'repo_type': 'dataset', 'token': 'secret', 'revision': 'v1', 'allow_patterns': ['*.csv', '*.json', '*.jsonl', '*.parquet'],
        }
        monkeypatch.setattr(safe_load, 'snapshot_download', lambda *args, **kwargs: str(tmp_path / 'empty'))
        with pytest.raises(InvalidFileExtensionError, match='org/empty'):
            load_rows('org/empty', 'train', safe_load=True)


def test_the_fingerprint_follows_the_files(tmp_path):
    path = write_rows(tmp_path / 'train.jsonl')
    first = fingerprint(load_rows(str(path), 'train'))
    assert first == fingerprint(load_rows(str(path), 'train'))
    assert first != fingerprint(load_rows(str(path), 'train[:5]'))
    # Of the same size, so that only the time tells.
    path.write_text(path.read_text().replace('Question 3', 'Question X'))
    os.utime(path, ns=(10**18, 10**18))
    assert first != fingerprint(load_rows(str(path), 'train'))


def test_the_fingerprint_outlives_the_cache_of_datasets(tmp_path, monkeypatch):
    path = write_rows(tmp_path / 'train.jsonl')
    first = fingerprint(load_rows(str(path), 'train'))
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'another_cache')
    assert fingerprint(load_rows(str(path), 'train')) == first


def test_the_fingerprint_follows_a_saved_folder(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / 'saved')
    first = fingerprint(load_rows(str(tmp_path / 'saved'), 'train'))
    assert first == fingerprint(load_rows(str(tmp_path / 'saved'), 'train'))
    os.utime(next((tmp_path / 'saved').glob('*.arrow')), ns=(1, 1))
    assert first != fingerprint(load_rows(str(tmp_path / 'saved'), 'train'))


@pytest.mark.parametrize(
    ('hf_name', 'kwargs', 'expected'),
    [
        ('org/set', None, 'org/set [train]'),
        ('json', {'data_files': '/a.jsonl'}, '/a.jsonl [train]'),
        ('json', {'data_files': {'train': '/a.jsonl', 'test': '/b.jsonl'}}, '/a.jsonl [train]'),
        ('json', {'data_files': ['/a.jsonl', '/b.jsonl', '/c.jsonl']}, '/a.jsonl and 2 more files [train]'),
        ('json', {'data_dir': '/data'}, '/data [train]'),
    ],
)
def test_how_messages_name_a_source(hf_name, kwargs, expected):
    assert describe_source(hf_name, 'train', kwargs) == expected
