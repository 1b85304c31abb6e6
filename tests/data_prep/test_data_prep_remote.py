"""URIs in and out: fsspec's file and memory systems, and an object store that only Composer knows."""

from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from llmfoundry.command_utils.data_prep import remote
from llmfoundry.command_utils.data_prep.convert_dataset_hf import convert_dataset_hf
from llmfoundry.command_utils.data_prep.convert_dataset_json import convert_dataset_json
from llmfoundry.command_utils.data_prep.convert_text_to_mds import DONE_FILENAME, convert_text_to_mds
from llmfoundry.data import remote_files
from llmfoundry.errors import DataError
from tests.helpers.prepared_data import EOS, GPT2, digest, expected_tokens, random_texts, read_tokens, write_jsonl

TEXTS = random_texts(60, seed=8)
TOKENS = {'concat_tokens': 32, 'tokenizer': GPT2, 'eos_text': EOS, 'processes': 1}


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem('memory')
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


@pytest.fixture(autouse=True)
def staging(tmp_path, monkeypatch):
    monkeypatch.setattr(remote.tempfile, 'tempdir', str(tmp_path / 'tmp'))
    (tmp_path / 'tmp').mkdir()
    return tmp_path / 'tmp'


def _fetch_all(memory, folder, target):
    target.mkdir()
    for name in memory.ls(folder, detail=False):
        memory.get_file(name, str(target / Path(name).name))


def test_json_from_and_to_memory(memory, tmp_path, staging):
    rows = write_jsonl(tmp_path / 'rows.jsonl', TEXTS)
    memory.put_file(str(rows), '/in/a/rows.jsonl')
    convert_dataset_json('memory://in', 'memory://out/train', **TOKENS)
    _fetch_all(memory, '/out/train', tmp_path / 'got')
    convert_dataset_json(str(rows), str(tmp_path / 'local'), **TOKENS)
    assert digest(tmp_path / 'got') == digest(tmp_path / 'local')
    assert not any(p.is_file() for p in staging.rglob('*'))
    with pytest.raises(ValueError, match='contains index.json, shard.00000.mds: it must be empty'):
        convert_dataset_json('memory://in', 'memory://out/train', **TOKENS)
    with pytest.raises(ValueError, match='memory://nothing: no file that matches'):
        convert_dataset_json('memory://nothing', 'memory://x', **TOKENS)


def test_hf_from_file_uri_to_file_uri(tmp_path):
    write_jsonl(tmp_path / 'in' / 'validation.jsonl', TEXTS)
    convert_dataset_hf(f'file://{tmp_path}/in', None, ['val'], f'file://{tmp_path}/out', **TOKENS)
    assert np.array_equal(read_tokens(tmp_path / 'out' / 'val'), expected_tokens(TEXTS, 32))
    with pytest.raises(ValueError, match='already contains val'):
        convert_dataset_hf(f'file://{tmp_path}/in', None, ['val'], f'file://{tmp_path}/out', **TOKENS)


def test_text_to_memory_with_done_file(memory, tmp_path):
    memory.pipe_file('/txt/b.txt', TEXTS[1].encode())
    memory.pipe_file('/txt/a.txt', ' '.join(TEXTS).encode())
    arguments = {
        'tokenizer_name': GPT2,
        'output_folder': 'memory://mds',
        'input_folder': 'memory://txt',
        'concat_tokens': 16,
        'eos_text': EOS,
        'processes': 1,
        'args_str': 'args',
    }
    assert convert_text_to_mds(**arguments) is not None
    names = {Path(n).name for n in memory.ls('/mds', detail=False)}
    assert names == {'index.json', 'shard.00000.mds', DONE_FILENAME}
    assert convert_text_to_mds(**arguments) is None
    assert convert_text_to_mds(**{**arguments, 'reprocess': True}) is not None
    _fetch_all(memory, '/mds', tmp_path / 'got')
    assert np.array_equal(read_tokens(tmp_path / 'got'), expected_tokens([' '.join(TEXTS), TEXTS[1]], 16))


def test_index_is_uploaded_last(tmp_path, monkeypatch):
    uploaded = []
    monkeypatch.setattr(remote, 'upload_file', lambda path, uri: uploaded.append(uri))
    for name in ('shard.00000.mds', 'index.json', '.done', 'shard.00001.mds'):
        (tmp_path / name).touch()
    remote.upload_folder(tmp_path, 's3://bucket/data')
    assert uploaded[-1] == 's3://bucket/data/index.json' and len(uploaded) == 4


class _Store:
    """What Composer's object stores offer, over a local folder."""

    def __init__(self, root):
        self.root = root

    def list_objects(self, prefix):
        return sorted(
            p.relative_to(self.root).as_posix()
            for p in self.root.rglob('*')
            if p.is_file() and p.relative_to(self.root).as_posix().startswith(prefix)
        )

    def get_object_size(self, name):
        return (self.root / name).stat().st_size

    def download_object(self, name, filename, overwrite=False):
        if not (self.root / name).exists():
            raise FileNotFoundError(name)
        shutil.copyfile(self.root / name, filename)

    def upload_object(self, name, filename):
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(filename, self.root / name)


def test_object_store_without_fsspec_plugin(tmp_path, monkeypatch):
    bucket = tmp_path / 'bucket'
    write_jsonl(bucket / 'in' / 'rows.jsonl', TEXTS)
    for module in (remote, remote_files):
        monkeypatch.setattr(module, 'filesystem', lambda uri: None)
        monkeypatch.setattr(module, 'object_store', lambda uri: (_Store(bucket), uri.split('/', 3)[3]))
    convert_dataset_json('s3://bucket/in', 's3://bucket/out', **TOKENS)
    assert np.array_equal(read_tokens(bucket / 'out'), expected_tokens(TEXTS, 32))


def test_a_scheme_that_nothing_here_opens():
    with pytest.raises(ValueError, match='cannot be opened here|Unsupported|nosuch'):
        convert_dataset_json('nosuch://bucket/in', '/tmp/never', **TOKENS)


def test_an_input_that_vanishes_is_a_clear_error(memory, tmp_path, monkeypatch):
    memory.pipe_file('/in/a.jsonl', b'{"text": "a"}\n')
    monkeypatch.setattr(remote, 'list_files', lambda uri, patterns: [('memory://in/a.jsonl', 14), ('memory://in/b.jsonl', 14)])
    with pytest.raises(DataError, match='the input cannot be read any further: .*b.jsonl'):
        convert_dataset_json('memory://in', str(tmp_path / 'out'), **TOKENS)
    assert not (tmp_path / 'out' / 'index.json').exists()
