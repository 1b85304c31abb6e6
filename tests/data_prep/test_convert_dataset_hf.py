"""Splits of a data set to folders of shards: the Hub's names, local copies, truncated splits, and the command lines that documents print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llmfoundry.command_utils.data_prep import hub_source
from llmfoundry.command_utils.data_prep.convert_dataset_hf import convert_dataset_hf, convert_dataset_hf_from_args, main
from llmfoundry.errors import DataError
from tests.helpers.prepared_data import EOS, GPT2, digest, expected_tokens, random_texts, read_tokens, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
TRAIN, VAL = random_texts(150, seed=6), random_texts(120, seed=7)


@pytest.fixture
def c4(tmp_path):
    """A folder laid out as a copy of C4."""
    write_jsonl(tmp_path / 'c4' / 'en' / 'c4-train.00000-of-00002.json', TRAIN[:80])
    write_jsonl(tmp_path / 'c4' / 'en' / 'c4-train.00001-of-00002.json', TRAIN[80:])
    write_jsonl(tmp_path / 'c4' / 'en' / 'c4-validation.00000-of-00001.json', VAL)
    return tmp_path / 'c4'


def convert(dataset, out, splits, **changes):
    arguments = {'concat_tokens': 32, 'tokenizer': GPT2, 'eos_text': EOS, 'num_workers': 1, 'data_subset': 'en', **changes}
    return convert_dataset_hf(str(dataset), out_root=str(out), splits=splits, **arguments)


def test_each_split_gets_a_folder(c4, tmp_path):
    convert(c4, tmp_path / 'out', ['train', 'val', 'val_xxsmall'])
    for split, texts in (('train', TRAIN), ('val', VAL), ('val_xxsmall', VAL[:100])):
        assert np.array_equal(read_tokens(tmp_path / 'out' / split), expected_tokens(texts, 32)), split


def test_small_splits_are_cut_at_their_number_of_rows_whatever_the_blocks(c4, tmp_path, monkeypatch):
    from llmfoundry.command_utils.data_prep import readers

    monkeypatch.setitem(hub_source._C4, 'train_small', hub_source.SplitSpec('train', 90))
    monkeypatch.setattr(readers, 'BLOCK_BYTES', 1000)
    convert(c4, tmp_path / 'out', ['train_small'])
    assert np.array_equal(read_tokens(tmp_path / 'out' / 'train_small'), expected_tokens(TRAIN[:90], 32))


def test_parquet_and_plain_layouts(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / 'data').mkdir()
    pyarrow.parquet.write_table(pyarrow.table({'text': TRAIN, 'url': ['u'] * len(TRAIN)}), tmp_path / 'data' / 'train-00000-of-00001.parquet')
    write_jsonl(tmp_path / 'data' / 'validation.jsonl', VAL)
    convert(tmp_path / 'data', tmp_path / 'out', ['train', 'val'], data_subset=None)
    assert np.array_equal(read_tokens(tmp_path / 'out' / 'train'), expected_tokens(TRAIN, 32))
    assert np.array_equal(read_tokens(tmp_path / 'out' / 'val'), expected_tokens(VAL, 32))
    pyarrow.parquet.write_table(pyarrow.table({'body': TRAIN}), tmp_path / 'data' / 'odd.parquet')
    with pytest.raises(DataError, match="odd.parquet: no 'text' column; the file has 'body'. Rename the column that holds the text."):
        convert(tmp_path / 'data', tmp_path / 'out', ['odd'], data_subset=None)
    (tmp_path / 'data' / 'bad.parquet').write_bytes(b'PAR1 nonsense')
    with pytest.raises(DataError, match='bad.parquet: not a readable parquet file'):
        convert(tmp_path / 'data', tmp_path / 'out', ['bad'], data_subset=None)


class _Hub:
    """Stands for ``datasets``: a stream of rows that can skip."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []

    def load_dataset(self, *args, **kwargs):
        self.asked.append((args, kwargs))
        return self

    def skip(self, n):
        return _Hub(self.rows[n:])

    def __iter__(self):
        return iter(self.rows)


@pytest.mark.parametrize('name', ['c4', 'allenai/c4'])
def test_hub_names(tmp_path, monkeypatch, name):
    hub = _Hub([{'text': t, 'url': 'u'} for t in VAL])
    monkeypatch.setitem(sys.modules, 'datasets', hub)
    convert(name, tmp_path / 'out', ['val_xxsmall'])
    assert hub.asked == [(('allenai/c4', 'en'), {'split': 'validation', 'streaming': True})]
    assert np.array_equal(read_tokens(tmp_path / 'out' / 'val_xxsmall'), expected_tokens(VAL[:100], 32))


def test_hub_rows_go_on_after_those_that_are_done(monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', _Hub([{'text': t} for t in VAL]))
    monkeypatch.setattr(hub_source, 'BLOCK_BYTES', 2000)
    source = hub_source.split_source('allenai/c4', 'en', 'val_xxsmall')
    blocks = list(source.blocks({}))
    assert len(blocks) > 3
    rest = list(source.blocks(vars(blocks[1].after)))
    assert [b.segments for b in rest] == [b.segments for b in blocks[2:]]
    assert [t for b in blocks for t in b.segments[0].data] == VAL[:100]


def test_wrong_arguments(c4, tmp_path):
    out = tmp_path / 'out'
    with pytest.raises(
        ValueError, match='--dataset bookcorpus is not supported: use one of allenai/c4, the_pile, c4, or the path or URI of a folder'
    ):
        convert('bookcorpus', out, ['train'])
    with pytest.raises(KeyError, match="unknown split 'test' of allenai/c4: it has train, train_small, val"):
        convert('c4', out, ['test'])
    with pytest.raises(KeyError, match="unknown split 'val_xxsmall' of the_pile"):
        convert('the_pile', out, ['val_xxsmall'])
    with pytest.raises(KeyError, match="unknown split 'test': no json or parquet file below"):
        convert(c4, out, ['test'])
    with pytest.raises(ValueError, match='you must specify a --tokenizer'):
        convert(c4, out, ['val'], tokenizer=None)
    with pytest.raises(ValueError, match='the tokenizer adds neither a BOS nor an EOS token, and bos_text and eos_text are both empty'):
        convert(c4, out, ['val'], eos_text='')
    with pytest.raises(ValueError, match="--tokenizer_kwargs must be JSON, got 'x'"):
        convert_dataset_hf_from_args(str(c4), 'en', ['val'], str(out), None, 32, GPT2, 'x')
    assert not out.exists() or not list(out.iterdir())


def test_a_split_that_is_there_is_refused_before_any_work(c4, tmp_path):
    convert(c4, tmp_path / 'out', ['val'])
    before = digest(tmp_path / 'out' / 'val')
    with pytest.raises(ValueError, match='already contains val, which cannot overlap with the requested splits train, val'):
        convert(c4, tmp_path / 'out', ['train', 'val'])
    assert digest(tmp_path / 'out' / 'val') == before
    assert not (tmp_path / 'out' / 'train').exists()


def test_command_line_of_document_002(c4, tmp_path):
    """The printed command, with a local copy for the Hub and the shipped tokenizer for the one that is on the Hub."""
    script = ROOT / 'scripts' / 'data_prep' / 'convert_dataset_hf.py'
    flags = [
        '--dataset',
        c4,
        '--data_subset',
        'en',
        '--out_root',
        './my-copy-c4',
        '--splits',
        'train_small',
        'val_small',
        '--concat_tokens',
        '32',
        '--tokenizer',
        GPT2,
        '--eos_text',
        EOS,
    ]
    result = subprocess.run([sys.executable, script, *map(str, flags)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in (tmp_path / 'my-copy-c4').iterdir()) == ['train_small', 'val_small']
    assert np.array_equal(read_tokens(tmp_path / 'my-copy-c4' / 'val_small'), expected_tokens(VAL, 32))
    again = subprocess.run([sys.executable, script, *map(str, flags)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert again.stderr.startswith('error: --out_root=./my-copy-c4 already contains train_small, val_small')


@pytest.mark.parametrize('splits', [['val, val_xxsmall'], ['val', 'val_xxsmall'], ['val,', 'val_xxsmall']])
def test_spaces_around_commas_do_not_matter(c4, tmp_path, splits):
    main(
        [
            '--dataset',
            str(c4),
            '--data_subset',
            'en',
            '--out_root',
            str(tmp_path / 'out'),
            '--concat_tokens',
            '32',
            '--tokenizer',
            GPT2,
            '--eos_text',
            EOS,
            '--num_workers',
            '1',
            '--splits',
            *splits,
        ]
    )
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['val', 'val_xxsmall']


@pytest.mark.parametrize(
    'splits', [['--splits', 'val, val_xxsmall'], ['--splits', 'val', 'val_xxsmall'], ['--splits', 'val', '--splits', 'val_xxsmall']]
)
def test_typer_command(c4, tmp_path, splits):
    from typer.testing import CliRunner

    from llmfoundry.cli.data_prep import app

    flags = [
        '--dataset',
        c4,
        '--data-subset',
        'en',
        '--out_root',
        tmp_path / 'out',
        '--concat-tokens',
        '32',
        '--tokenizer',
        GPT2,
        '--eos-text',
        EOS,
        '--num-workers',
        '1',
    ]
    result = CliRunner().invoke(app, ['convert_dataset_hf', *splits, *map(str, flags)])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['val', 'val_xxsmall']
