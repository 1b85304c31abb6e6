"""Text files to shards: the done file, the errors of each folder state, chunks of large files, flags as documented."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llmfoundry.command_utils.data_prep import readers
from llmfoundry.command_utils.data_prep.convert_text_to_mds import (
    DONE_FILENAME,
    convert_text_to_mds,
    convert_text_to_mds_from_args,
    default_processes,
    download_and_convert,
    is_already_processed,
    main,
    merge_shard_groups,
    write_done_file,
)
from llmfoundry.errors import (
    CannotUnicodeDecodeFile,
    DatasetTooSmallError,
    InputFolderMissingDataError,
    InputFolderNotFound,
    OutputFolderNotEmptyError,
)
from tests.helpers.prepared_data import EOS, GPT2, digest, expected_tokens, random_texts, read_tokens

TEXTS = random_texts(12, seed=4, words=300)


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / 'in'
    for i, text in enumerate(TEXTS):
        path = folder / ('sub' if i % 2 else '.') / f'{i:02}.txt'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')
    (folder / 'notes.md').write_text('not text to convert')
    return folder


ORDERED = [*TEXTS[0::2], *TEXTS[1::2]]


def convert(texts, out, **changes):
    return convert_text_to_mds(
        **{
            'tokenizer_name': GPT2,
            'output_folder': str(out),
            'input_folder': str(texts),
            'concat_tokens': 32,
            'eos_text': EOS,
            'processes': 1,
            'args_str': 'a',
            **changes,
        }
    )


def test_one_separator_pair_per_file_in_the_order_of_names(texts, tmp_path):
    convert(texts, tmp_path / 'out', bos_text=EOS)
    assert np.array_equal(read_tokens(tmp_path / 'out'), expected_tokens(ORDERED, 32, bos=(50256,)))


@pytest.mark.parametrize('processes', [1, 3])
def test_large_files_are_cut_between_words(texts, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(readers, 'BLOCK_BYTES', 300)
    monkeypatch.setattr(readers, '_SAFE_CUT_BYTES', 200)
    convert(texts, tmp_path / 'out', processes=processes)
    assert np.array_equal(read_tokens(tmp_path / 'out'), expected_tokens(ORDERED, 32))


@pytest.mark.parametrize('use_tiktoken', [True, False])
def test_a_tokenizer_that_adds_bos_and_eos_adds_them_once_per_file(texts, tmp_path, monkeypatch, use_tiktoken):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    from tests.helpers.prepared_data import gpt2_tokenizer

    backend = gpt2_tokenizer()
    backend.post_processor = TemplateProcessing(single=f'{EOS} $A {EOS} {EOS}', special_tokens=[(EOS, 50256)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, bos_token=EOS)
    monkeypatch.setattr(readers, 'BLOCK_BYTES', 300)
    monkeypatch.setattr(readers, '_SAFE_CUT_BYTES', 200)
    convert(texts, tmp_path / 'out', tokenizer_name=tokenizer, eos_text='', use_tiktoken=use_tiktoken)
    assert np.array_equal(read_tokens(tmp_path / 'out'), expected_tokens(ORDERED, 32, bos=(50256,), eos=(50256, 50256)))


def test_text_without_spaces_is_cut_between_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, 'BLOCK_BYTES', 300)
    monkeypatch.setattr(readers, '_SAFE_CUT_BYTES', 64)
    (tmp_path / 'in').mkdir()
    text = 'é日😀' * 400
    (tmp_path / 'in' / 'a.txt').write_text(text, encoding='utf-8')
    convert(tmp_path / 'in', tmp_path / 'out', concat_tokens=1)
    from tests.helpers.prepared_data import gpt2_tokenizer

    assert gpt2_tokenizer().decode(read_tokens(tmp_path / 'out').ravel().tolist()) == text


def test_done_file_skips_unchanged_input(texts, tmp_path, capsys):
    out = tmp_path / 'out'
    assert convert(texts, out) is not None
    before = digest(out)
    assert sorted(before) == [DONE_FILENAME, 'index.json', 'shard.00000.mds']
    assert convert(texts, out) is None
    assert 'nothing to do (--reprocess converts again)' in capsys.readouterr().out
    assert digest(out) == before
    with pytest.raises(OutputFolderNotEmptyError):
        convert(texts, out, args_str='other')
    with pytest.raises(OutputFolderNotEmptyError):
        convert(texts, out, reprocess=True)
    (texts / 'new.txt').write_text('more')
    with pytest.raises(OutputFolderNotEmptyError) as e:
        convert(texts, out)
    assert str(e.value) == f'{out} is not empty. Please remove or empty it and retry.'
    assert digest(out) == before


def test_done_file_functions(tmp_path):
    assert not is_already_processed(str(tmp_path), 'a b', ['x', 'y'])
    write_done_file(str(tmp_path), 'a b', ['x', 'y'])
    assert (tmp_path / DONE_FILENAME).exists()
    assert is_already_processed(str(tmp_path), 'a b', ['x', 'y'])
    assert not is_already_processed(str(tmp_path), 'a c', ['x', 'y'])
    assert not is_already_processed(str(tmp_path), 'a b', ['x'])


def test_folder_errors(texts, tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(InputFolderMissingDataError, match=f'No text files were found at {tmp_path}/empty.'):
        convert(tmp_path / 'empty', tmp_path / 'out')
    with pytest.raises(InputFolderNotFound, match=f'{tmp_path}/none not found.'):
        convert(tmp_path / 'none', tmp_path / 'out')
    with pytest.raises(DatasetTooSmallError):
        convert(texts, tmp_path / 'out', concat_tokens=10**6)
    assert not (tmp_path / 'out').exists()
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'x').touch()
    with pytest.raises(OutputFolderNotEmptyError):
        convert(texts, tmp_path / 'full')


def test_a_file_that_is_not_utf8(texts, tmp_path, capsys):
    bad = texts / '05b.txt'
    bad.write_bytes(b'caf\xe9')
    with pytest.raises(CannotUnicodeDecodeFile) as e:
        convert(texts, tmp_path / 'out')
    assert str(e.value) == f'Text file {bad} does not contain valid UTF-8. Please re-encode it.'
    assert not (tmp_path / 'out').exists()
    summary = convert(texts, tmp_path / 'out', on_bad_row='skip')
    assert summary.bad_rows == 1
    assert np.array_equal(read_tokens(tmp_path / 'out'), expected_tokens(ORDERED, 32))
    assert f'skipped {bad}: not UTF-8 (byte 0xe9, 3 bytes into the file)' in capsys.readouterr().out


def _flags(texts, out, *extra):
    return ['--input_folder', str(texts), '--output_folder', str(out), '--concat_tokens', '32', '--tokenizer', GPT2, '--processes', '1', *extra]


def test_a_skipped_piece_of_a_file_does_not_take_its_separator_along(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, 'BLOCK_BYTES', 300)
    monkeypatch.setattr(readers, '_SAFE_CUT_BYTES', 100)
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in' / 'a.txt').write_bytes(b'word ' * 100 + b'\xff')
    (tmp_path / 'in' / 'b.txt').write_text('other', encoding='utf-8')
    convert(tmp_path / 'in', tmp_path / 'out', concat_tokens=1, bos_text='X', on_bad_row='skip')
    tokens = read_tokens(tmp_path / 'out').ravel().tolist()
    assert tokens.count(50256) == 2 and tokens[-4:-2] == [50256, 55]
    assert tokens.count(55) == 2 and tokens[0] == 55


def test_command_line(texts, tmp_path, capsys):
    out = tmp_path / 'out'
    main(_flags(texts, out, '--use_tokenizer_eos'))
    assert (out / 'shard.00000.mds.zstd').exists()
    # `--reprocess False` must not reprocess; a bare or true flag must.
    for words in ([], ['--reprocess', 'False'], ['--reprocess', 'no']):
        main(_flags(texts, out, '--use_tokenizer_eos', *words))
        assert 'nothing to do' in capsys.readouterr().out
    for words in (['--reprocess'], ['--reprocess', 'True']):
        with pytest.raises(SystemExit, match='is not empty'):
            main(_flags(texts, out, '--use_tokenizer_eos', *words))
    with pytest.raises(SystemExit) as e:
        main(_flags(texts, out, '--reprocess', 'perhaps'))
    assert e.value.code == 2 and "expected true or false, got 'perhaps'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match='error: Cannot set --eos_text .* with --use_tokenizer_eos'):
        main(_flags(texts, tmp_path / 'b', '--use_tokenizer_eos', '--eos_text', EOS))


def test_eos_text_and_tokenizer_eos_give_the_same(texts, tmp_path):
    for name, flags in (('a', {'use_tokenizer_eos': True}), ('b', {'eos_text': EOS})):
        convert_text_to_mds_from_args(str(tmp_path / name), str(texts), 32, GPT2, compression='', processes=1, **flags)
    assert np.array_equal(read_tokens(tmp_path / 'a'), read_tokens(tmp_path / 'b'))
    assert 1 <= default_processes() <= 32


def test_groups_are_converted_apart_and_merged(texts, tmp_path):
    names = sorted(p.relative_to(texts).as_posix() for p in texts.rglob('*.txt'))
    root = tmp_path / 'root'
    for group, part in (('0', names[:5]), ('1', names[5:])):
        download_and_convert(part, str(root / group), str(texts), GPT2, 32, EOS, '', False, None, False)
    first, second = read_tokens(root / '0'), read_tokens(root / '1')
    merge_shard_groups(str(root))
    assert np.array_equal(read_tokens(root), np.concatenate([first, second]))
    assert sorted(p.name for p in root.iterdir()) == ['index.json', 'shard.00000.mds', 'shard.00001.mds']
    assert [s['raw_data']['basename'] for s in json.loads((root / 'index.json').read_text())['shards']] == ['shard.00000.mds', 'shard.00001.mds']
    with pytest.raises(FileNotFoundError, match='no file nothing.txt'):
        download_and_convert(['nothing.txt'], str(root / '3'), str(texts), GPT2, 32, EOS, '', False, None)
