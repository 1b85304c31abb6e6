"""JSON rows to shards: same bytes for any number of processes, readable by Streaming, each bad row named, each rule of the command line kept."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import numpy as np
import pytest
import zstandard

from llmfoundry.command_utils.data_prep import readers
from llmfoundry.command_utils.data_prep.convert_dataset_json import convert_dataset_json, convert_dataset_json_from_args, main
from llmfoundry.errors import DataError, DatasetTooSmallError
from tests.helpers.prepared_data import EOS, GPT2, digest, expected_tokens, random_texts, read_tokens, write_jsonl

TEXTS = random_texts(300)


def convert(path, out, **changes):
    arguments = {'concat_tokens': 64, 'tokenizer': GPT2, 'eos_text': EOS, 'processes': 1, **changes}
    return convert_dataset_json(str(path), str(out), **arguments)


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp('rows') / 'rows.jsonl', TEXTS)


@pytest.fixture(scope='module')
def whole(rows, tmp_path_factory):
    out = tmp_path_factory.mktemp('whole') / 'out'
    convert(rows, out)
    return out


def test_tokens_are_those_of_the_tokenizer_in_order(whole):
    assert np.array_equal(read_tokens(whole), expected_tokens(TEXTS, 64))
    index = json.loads((whole / 'index.json').read_text())
    assert index['shards'][0]['column_encodings'] == ['ndarray:int32:64']
    assert index['shards'][0]['column_names'] == ['tokens']
    assert sorted(p.name for p in whole.iterdir()) == ['index.json', 'shard.00000.mds']


@pytest.mark.parametrize('processes', [2, 3])
def test_same_shards_for_any_number_of_processes(rows, whole, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(readers, 'BLOCK_BYTES', 4096)
    convert(rows, tmp_path / 'out', processes=processes)
    assert digest(tmp_path / 'out') == digest(whole)


def test_tokenizers_library_gives_the_same_shards(rows, whole, tmp_path, capsys):
    assert convert(rows, tmp_path / 'out', use_tiktoken=False).engine == 'tokenizers'
    assert digest(tmp_path / 'out') == digest(whole)


@pytest.mark.parametrize(
    'pack',
    [
        ('rows.jsonl.gz', gzip.compress),
        ('rows.json.zst', lambda d: zstandard.compress(d[:9000]) + zstandard.compress(d[9000:])),
        ('rows.jsonl.xz', lzma.compress),
        ('rows.jsonl.bz2', bz2.compress),
        ('rows.jsonl', lambda d: b'\xef\xbb\xbf' + d.replace(b'\n', b'\r\n\r\n')),
        ('array.json', lambda d: ('[' + ',\n '.join(d.decode().splitlines()) + ']').encode()),
    ],
    ids=lambda p: p[0],
)
def test_every_form_of_input_gives_the_same_shards(rows, whole, tmp_path, monkeypatch, pack):
    monkeypatch.setattr(readers, 'BLOCK_BYTES', 4096)
    name, function = pack
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / name).write_bytes(function(rows.read_bytes()))
    (tmp_path / 'in' / 'notes.txt').write_text('not a data file')
    convert(tmp_path / 'in', tmp_path / 'out')
    assert digest(tmp_path / 'out') == digest(whole)


def test_folders_are_read_in_the_order_of_names_and_splits_pick_files(tmp_path):
    for name, part in (('b/train-1.jsonl', TEXTS[100:200]), ('a/train-0.jsonl', TEXTS[:100]), ('val.jsonl', TEXTS[200:])):
        write_jsonl(tmp_path / 'in' / name, part)
    convert(tmp_path / 'in', tmp_path / 'train')
    assert np.array_equal(read_tokens(tmp_path / 'train'), expected_tokens(TEXTS[:200], 64))
    convert(tmp_path / 'in', tmp_path / 'val', split='val')
    assert np.array_equal(read_tokens(tmp_path / 'val'), expected_tokens(TEXTS[200:], 64))
    with pytest.raises(ValueError, match='--split test: no file below .* carries that name'):
        convert(tmp_path / 'in', tmp_path / 'test', split='test')


@pytest.mark.parametrize('compression', ['zstd', 'zstd:7', 'gz', 'bz2', 'br:1'])
def test_streaming_reads_what_was_written(rows, whole, tmp_path, compression):
    from streaming import StreamingDataset

    convert(rows, tmp_path / 'out', compression=compression)
    assert not (tmp_path / 'out' / 'shard.00000.mds').exists()
    dataset = StreamingDataset(local=str(tmp_path / 'out'), batch_size=1)
    assert np.array_equal(np.stack([dataset[i]['tokens'] for i in range(len(dataset))]), read_tokens(whole))
    assert dataset[0]['tokens'].dtype == np.int32


def test_bytes_are_those_of_the_streaming_writer(rows, whole, tmp_path):
    from streaming import MDSWriter

    with MDSWriter(columns={'tokens': 'ndarray:int32:64'}, out=str(tmp_path / 'out'), hashes=['xxh3_64']) as writer:
        for sample in read_tokens(whole):
            writer.write({'tokens': sample})
    assert (tmp_path / 'out' / 'shard.00000.mds').read_bytes() == (whole / 'shard.00000.mds').read_bytes()
    assert json.loads((tmp_path / 'out' / 'index.json').read_text()) == json.loads((whole / 'index.json').read_text())


@pytest.mark.parametrize('compression', [None, 'zstd'])
def test_text_shards_are_those_of_the_streaming_writer_across_shards(rows, tmp_path, monkeypatch, compression):
    from streaming import MDSWriter

    from llmfoundry.command_utils.data_prep import engine

    monkeypatch.setattr(engine, 'SIZE_LIMIT_BYTES', 20_000)
    monkeypatch.setattr(readers, 'BLOCK_BYTES', 4096)
    convert(rows, tmp_path / 'ours', concat_tokens=None, tokenizer=None, compression=compression)
    with MDSWriter(columns={'text': 'str'}, out=str(tmp_path / 'theirs'), size_limit=20_000, compression=compression, hashes=['xxh3_64']) as writer:
        for text in TEXTS:
            writer.write({'text': text})
    shards = sorted(p.name for p in (tmp_path / 'theirs').iterdir())
    assert len(shards) > 4 and shards == sorted(p.name for p in (tmp_path / 'ours').iterdir())
    for name in shards[1:] if compression is None else []:
        assert (tmp_path / 'ours' / name).read_bytes() == (tmp_path / 'theirs' / name).read_bytes()
    ours, theirs = (json.loads((tmp_path / f / 'index.json').read_text()) for f in ('ours', 'theirs'))
    for a, b in zip(ours['shards'], theirs['shards'], strict=True):
        assert a['raw_data'] == b['raw_data'] and a['samples'] == b['samples'] and a['size_limit'] == b['size_limit']


def test_bos_text_and_no_wrap(tmp_path):
    texts = ['one two three four five six seven', 'a b', 'c', 'x ' * 20]
    write_jsonl(tmp_path / 'in.jsonl', texts)
    convert(tmp_path / 'in.jsonl', tmp_path / 'bos', bos_text=EOS, eos_text='', concat_tokens=8)
    assert np.array_equal(read_tokens(tmp_path / 'bos'), expected_tokens(texts, 8, bos=(50256,), eos=()))
    convert(tmp_path / 'in.jsonl', tmp_path / 'cut', no_wrap=True, concat_tokens=8)
    found = read_tokens(tmp_path / 'cut')
    assert found[0].tolist() == expected_tokens(texts[:1], 8)[0].tolist()
    assert found[1].tolist() == expected_tokens(texts[1:], 8)[0].tolist()
    assert len(found) == 2


BAD_ROWS = [
    (b'{"text": "a"', 'not JSON (Expecting \',\' delimiter at column 13): {"text": "a"'),
    (b'plain words', 'not JSON (Expecting value at column 1): plain words'),
    (b'{"txt": "a", "id": 3}', "no 'text' field; the row has 'id', 'txt'"),
    (b'{}', "no 'text' field; the row has no fields"),
    (b'{"text": 5}', "'text' must be a string, got a number"),
    (b'{"text": null}', "'text' must be a string, got null"),
    (b'{"text": ["a"]}', "'text' must be a string, got an array"),
    (b'["a"]', "a row must be a JSON object with a 'text' field, got an array"),
    (b'{"text": "caf\xe9"}', 'not UTF-8 (byte 0xe9 at byte 13 of the line)'),
    (b'{"text": "\\ud800 x"}', "'text' holds half of a surrogate pair (\\ud800 at character 0), which is no Unicode text"),
]


@pytest.mark.parametrize(('row', 'message'), BAD_ROWS, ids=[m[:30] for _, m in BAD_ROWS])
def test_a_bad_row_stops_the_run_with_file_and_line(tmp_path, row, message):
    path = tmp_path / 'rows.jsonl'
    path.write_bytes(b'{"text": "fine"}\n\n' + row + b'\n{"text": "fine, too"}\n')
    with pytest.raises(DataError) as e:
        convert(path, tmp_path / 'out', concat_tokens=None, tokenizer=None)
    assert str(e.value) == f'{path}:3: {message}. Repair the row, or pass --on_bad_row skip to leave such rows out.'
    assert not (tmp_path / 'out').exists()


def test_skipped_rows_are_counted_and_listed(tmp_path, capsys):
    lines = [b'{"text": "good"}', *(row for row, _ in BAD_ROWS), b'{"text": "good again"}']
    path = tmp_path / 'rows.jsonl'
    path.write_bytes(b'\n'.join(lines))
    summary = convert(path, tmp_path / 'out', concat_tokens=None, tokenizer=None, on_bad_row='skip')
    assert (summary.samples, summary.bad_rows) == (2, len(BAD_ROWS))
    listed = [json.loads(line) for line in (tmp_path / 'out' / 'bad_rows.jsonl').read_text().splitlines()]
    assert [(r['line'], r['message']) for r in listed] == [(i + 2, m) for i, (_, m) in enumerate(BAD_ROWS)]
    printed = capsys.readouterr().out
    assert f'{len(BAD_ROWS)} bad rows were left out; they are listed in {tmp_path}/out/bad_rows.jsonl' in printed
    assert f"skipped {path}:6: 'text' must be a string, got a number" in printed


@pytest.mark.parametrize(('name', 'pack'), [('a.jsonl.gz', gzip.compress), ('a.jsonl.zst', zstandard.compress), ('a.jsonl.xz', lzma.compress)])
def test_a_cut_compressed_file_is_an_error_even_when_skipping(rows, tmp_path, name, pack):
    data = pack(rows.read_bytes())
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=f'{name}: the compressed file is damaged or cut short .* Copy or download it again.'):
        convert(tmp_path / name, tmp_path / 'out', on_bad_row='skip')
    assert not (tmp_path / 'out' / 'index.json').exists()


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (
            '[{"text": "a"},\n {"text": "b"}',
            'rows.json:2: the JSON array is not closed, or is not JSON from here on. Repair the file, or write one object per line.',
        ),
        (
            '[{"text": "a"},\n 7]',
            "rows.json:2: a row must be a JSON object with a 'text' field, got a number. Repair the row, or pass --on_bad_row skip to leave such rows out.",
        ),
    ],
)
def test_bad_arrays(tmp_path, content, message):
    (tmp_path / 'rows.json').write_text(content)
    with pytest.raises(DataError) as e:
        convert(tmp_path / 'rows.json', tmp_path / 'out', concat_tokens=None, tokenizer=None)
    assert str(e.value) == f'{tmp_path}/{message}'


def test_wrong_arguments(rows, tmp_path):
    with pytest.raises(ValueError, match=r'When setting --concat_tokens \(here 64\), you must specify a --tokenizer'):
        convert(rows, tmp_path / 'out', tokenizer=None)
    with pytest.raises(ValueError, match="compression 'lzo' is not known: use one of br, bz2, gz, snappy, zstd"):
        convert(rows, tmp_path / 'out', compression='lzo')
    with pytest.raises(ValueError, match='compression .zstd:99.: the level of zstd must be an integer from 1 to 22'):
        convert(rows, tmp_path / 'out', compression='zstd:99')
    with pytest.raises(ValueError, match='concat_tokens must be a positive number of tokens, got 0'):
        convert(rows, tmp_path / 'out', concat_tokens=0)
    with pytest.raises(ValueError, match='number of processes must be at least 1, got 0'):
        convert(rows, tmp_path / 'out', processes=0)
    with pytest.raises(ValueError, match="on_bad_row must be 'stop' or 'skip', got 'ignore'"):
        convert(rows, tmp_path / 'out', on_bad_row='ignore')
    with pytest.raises(TypeError, match='unexpected keyword argument'):
        convert(rows, tmp_path / 'out', eos_txt=EOS)
    with pytest.raises(FileNotFoundError, match='missing.jsonl: no such file or folder'):
        convert(tmp_path / 'missing.jsonl', tmp_path / 'out')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match=r'empty: no file that matches \*.json, \*.jsonl, \*.ndjson'):
        convert(tmp_path / 'empty', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_output_that_is_not_empty_is_refused_and_left_alone(rows, whole, tmp_path):
    before = digest(whole)
    with pytest.raises(
        ValueError, match='contains index.json, shard.00000.mds: it must be empty, so that the shards of the split .train. overlap with nothing'
    ):
        convert(rows, whole)
    assert digest(whole) == before


def test_too_little_text(tmp_path):
    write_jsonl(tmp_path / 'in.jsonl', ['a', 'b'])
    with pytest.raises(DatasetTooSmallError, match=r'2 documents \(4 tokens, one sample needs 64\) make no sample, so nothing was written'):
        convert(tmp_path / 'in.jsonl', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_a_difference_between_engines_starts_over_with_the_tokenizer(rows, whole, tmp_path, monkeypatch, capsys):
    from llmfoundry.command_utils.data_prep import engine

    take, calls = engine._Conversion._take, []

    def differing(self, encoded):
        calls.append(self.plan.use_tiktoken)
        return take(self, encoded._replace(differs='odd text') if self.plan.use_tiktoken and len(calls) == 3 else encoded)

    monkeypatch.setattr(engine._Conversion, '_take', differing)
    monkeypatch.setattr(readers, 'BLOCK_BYTES', 4096)
    assert convert(rows, tmp_path / 'out').engine == 'tokenizers'
    assert digest(tmp_path / 'out') == digest(whole)
    assert "tiktoken and the tokenizer differ on 'odd text'; starting over with the tokenizers library" in capsys.readouterr().out


def test_a_tokenizer_object_and_a_folder_will_do(rows, whole, tmp_path):
    from pathlib import Path

    from transformers import AutoTokenizer

    import llmfoundry

    folder = Path(llmfoundry.__file__).parent / 'assets' / 'gpt2'
    convert(rows, tmp_path / 'a', tokenizer=AutoTokenizer.from_pretrained(folder))
    convert(rows, tmp_path / 'b', tokenizer=str(folder))
    assert digest(tmp_path / 'a') == digest(tmp_path / 'b') == digest(whole)


def test_command_line(rows, whole, tmp_path, capsys):
    flags = ['--path', str(rows), '--out_root', str(tmp_path / 'out'), '--concat_tokens', '64', '--tokenizer', GPT2, '--eos_text', EOS]
    main(flags)
    assert digest(tmp_path / 'out') == digest(whole)
    with pytest.raises(SystemExit) as e:
        main(flags)
    assert str(e.value.code).startswith(f'error: --out_root={tmp_path}/out contains index.json')
    convert_dataset_json_from_args(str(rows), str(tmp_path / 'text'), None, None, 'train', None, bos_text=None, eos_text=None)
    assert (tmp_path / 'text' / 'index.json').exists()
