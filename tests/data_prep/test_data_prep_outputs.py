"""Disks that fill up, folders that cannot be written, memory that stays flat, and the light command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmfoundry.command_utils.data_prep.convert_dataset_json import convert_dataset_json
from llmfoundry.command_utils.data_prep.progress import Progress, human_bytes, human_time
from tests.helpers.disks import resize_disk, small_disk
from tests.helpers.prepared_data import EOS, GPT2, digest, random_texts, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / 'scripts' / 'data_prep'


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / 'disk', '1m') as folder:
        yield folder


def _flags(rows, out):
    return ['--path', rows, '--out_root', out, '--concat_tokens', '32', '--tokenizer', GPT2, '--eos_text', EOS, '--processes', '1']


def _script(*flags):
    return subprocess.run([sys.executable, SCRIPTS / 'convert_dataset_json.py', *map(str, flags)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize('inner', ['.', 'sub'], ids=['mount point itself', 'folder in it'])
def test_full_disk_then_room(tmp_path, disk, inner):
    rows = write_jsonl(tmp_path / 'rows.jsonl', random_texts(4000))
    out = disk / inner
    ballast = disk / 'ballast' if inner == 'sub' else None
    if ballast:
        ballast.write_bytes(b'x' * 600_000)
    result = _script(*_flags(rows, out))
    assert result.returncode == 1
    assert (
        f'error: {out}: cannot write the output: No space left on device. Make room or choose another folder, then run the same command again.'
        in result.stderr
    )
    assert 'Traceback' not in result.stderr
    assert not (out / 'index.json').exists()
    resize_disk(disk, '64m')
    if ballast:
        ballast.unlink()
    assert _script(*_flags(rows, out)).returncode == 0
    assert _script(*_flags(rows, tmp_path / 'whole')).returncode == 0
    assert digest(out) == digest(tmp_path / 'whole')


def test_output_that_is_a_file_or_below_one(tmp_path):
    rows = write_jsonl(tmp_path / 'rows.jsonl', random_texts(10))
    (tmp_path / 'file').write_text('mine')
    for out, reason in ((tmp_path / 'file', 'File exists'), (tmp_path / 'file' / 'sub', 'Not a directory')):
        result = _script(*_flags(rows, out))
        assert result.returncode == 1
        assert (
            result.stderr
            == f'error: {out}: cannot write the output: {reason}. Make room or choose another folder, then run the same command again.\n'
        )
    assert (tmp_path / 'file').read_text() == 'mine'


def test_unwritable_folder(tmp_path, monkeypatch):
    """Root may write anywhere, so the refusal comes from the call itself."""
    from llmfoundry.command_utils.data_prep import journal
    from llmfoundry.errors import DataError

    rows = write_jsonl(tmp_path / 'rows.jsonl', random_texts(10))

    def refused(self, *args, **kwargs):
        raise PermissionError(13, 'Permission denied', str(tmp_path / 'out' / '.data_prep'))

    monkeypatch.setattr(journal.Journal, 'start', refused)
    with pytest.raises(DataError, match='out: cannot write the output: Permission denied'):
        convert_dataset_json(str(rows), str(tmp_path / 'out'), concat_tokens=32, tokenizer=GPT2, eos_text=EOS, processes=1)
    assert not (tmp_path / 'out').exists()


def test_an_empty_output_folder_of_the_user_survives_an_error(tmp_path):
    rows = write_jsonl(tmp_path / 'rows.jsonl', ['a'])
    (tmp_path / 'out').mkdir()
    assert 'Dataset is too small' in _script(*_flags(rows, tmp_path / 'out')).stderr
    assert list((tmp_path / 'out').iterdir()) == []


def test_blocks_under_way_are_bounded():
    """Memory stays flat because the pool reads only so far ahead of what has been written."""
    from llmfoundry.command_utils.data_prep.pool import WorkerPool
    from llmfoundry.command_utils.data_prep.rows import Segment
    from llmfoundry.command_utils.data_prep.worker import EncoderSpec

    read = 0

    def blocks():
        nonlocal read
        for number in range(50):
            read += 1
            yield number, [Segment('rows', 'f', 1, [f'text {number}'])]

    with WorkerPool(EncoderSpec(None), 2) as pool:
        pool.facts()
        for taken, (number, encoded) in enumerate(pool.map(blocks())):
            assert number == taken and encoded.data == f'text {number}'.encode()
            assert read - taken <= 5
    assert read == 50


def test_workers_and_parent_load_no_torch(tmp_path):
    rows = write_jsonl(tmp_path / 'rows.jsonl', random_texts(50))
    code = (
        'import sys; from llmfoundry.command_utils.data_prep import worker, convert_dataset_json as c; c.main(sys.argv[1:]); '
        "print('HEAVY', [m for m in ('torch', 'transformers', 'streaming', 'composer', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, '-c', code, *map(str, _flags(rows, tmp_path / 'out'))], capture_output=True, text=True, check=False)
    assert 'HEAVY []' in result.stdout, result.stdout + result.stderr


def test_progress_says_share_rate_and_time_left():
    progress = Progress('train', 1_000_000_000, already_bytes=200_000_000)
    assert progress.line(600_000_000, 50_000_000, 9, 100.0) == 'train:  60% of 1.0 GB, 500,000 tokens/s, 1:40 left'
    assert progress.line(600_000_000, 0, 900, 100.0) == 'train:  60% of 1.0 GB, 9 documents/s, 1:40 left'
    assert Progress('train', None).line(5, 1000, 12345, 10.0) == 'train: 12,345 documents, 100 tokens/s, 0:10 so far'
    assert (human_time(3700), human_bytes(1_234_567), human_bytes(12)) == ('1:01:40', '1.2 MB', '12 B')


def test_scripts_are_thin_and_answer_help():
    flags = {
        'convert_dataset_hf': '--concat_tokens',
        'convert_dataset_json': '--concat_tokens',
        'convert_finetuning_dataset': '--preprocessor',
        'convert_text_to_mds': '--concat_tokens',
        'preparation/tokenize_data': '--tokenizer-path',
    }
    for name, flag in flags.items():
        assert len((SCRIPTS / f'{name}.py').read_text().splitlines()) < 20
        result = subprocess.run([sys.executable, SCRIPTS / f'{name}.py', '--help'], capture_output=True, text=True, check=False)
        assert result.returncode == 0 and flag in result.stdout


def test_typer_commands_have_the_flags_of_the_scripts():
    import re

    import typer

    from llmfoundry.cli.data_prep import app

    group = typer.main.get_command(app)
    for name in ('convert_dataset_hf', 'convert_dataset_json', 'convert_finetuning_dataset', 'convert_text_to_mds', 'tokenize_data'):
        folder = SCRIPTS / 'preparation' if name == 'tokenize_data' else SCRIPTS
        shown = subprocess.run([sys.executable, folder / f'{name}.py', '--help'], capture_output=True, text=True, check=True).stdout
        flags = set(re.findall(r'--[a-z][a-z_-]+', shown)) - {'--help'}
        have = {o for p in group.commands[name].params for o in p.opts}
        assert len(flags) > 4 and flags <= have, flags - have


def test_austen_is_prepared_once_and_its_last_chapters_are_held_out(tmp_path, capsys):
    from llmfoundry.command_utils.data_prep.austen import austen_documents, prepare_austen

    documents = austen_documents()
    assert {r['novel'] for r in documents['train']} == {r['novel'] for r in documents['val']} and len({r['novel'] for r in documents['val']}) == 6
    train, val = (sum(len(r['text']) for r in documents[s]) for s in ('train', 'val'))
    assert 0.05 < val / (train + val) < 0.08
    assert not {r['text'] for r in documents['train']} & {r['text'] for r in documents['val']}
    prepare_austen(str(tmp_path), concat_tokens=128, processes=1)
    before = digest(tmp_path / 'train'), digest(tmp_path / 'val')
    samples = json.loads((tmp_path / 'train' / 'index.json').read_text())['shards'][0]['samples']
    assert 7000 < samples < 7500
    prepare_austen(str(tmp_path), concat_tokens=128, processes=1)
    assert 'is there already' in capsys.readouterr().out
    assert before == (digest(tmp_path / 'train'), digest(tmp_path / 'val'))
    with pytest.raises(ValueError, match='holds samples of the form ndarray:int32:128, not ndarray:int32:64'):
        prepare_austen(str(tmp_path), concat_tokens=64, processes=1)
