"""Finetuning data to shards: what Streaming and the loader read back, every flag, remote outputs and copies, kills, and each error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import fsspec
import pytest

from llmfoundry.command_utils import convert_finetuning_dataset_from_args
from llmfoundry.command_utils.data_prep import remote, row_conversion
from llmfoundry.command_utils.data_prep.convert_finetuning_dataset import get_columns_and_format, main
from llmfoundry.command_utils.data_prep.journal import WORK_FOLDER
from llmfoundry.data.finetuning.tasks import dataset_constructor
from llmfoundry.data.finetuning.tokenization import tokenize_formatted_example
from llmfoundry.errors import DataError, InvalidDatasetError, UnknownExampleTypeError
from tests.helpers.prepared_data import GPT2, digest, random_texts
from tests.helpers.tokenizers import gpt2_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / 'scripts' / 'data_prep' / 'convert_finetuning_dataset.py'
PAIRS = [{'prompt': p or 'empty', 'response': r or 'none'} for p, r in zip(random_texts(40, 3, 30), random_texts(40, 4, 30), strict=True)]
CHATS = [
    {'messages': [{'role': 'user', 'content': f'{i} — é?'}, {'role': 'assistant', 'content': 'yes'}, {'role': 'user', 'content': 'no'}, {'role': 'assistant', 'content': str(i)}]}
    for i in range(5)
]


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp('cache')
    for name in ('HF_DATASETS_CACHE', 'LLMFOUNDRY_CACHE'):
        monkeypatch.setenv(name, str(cache))
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', cache)


@pytest.fixture
def memory(tmp_path, monkeypatch):
    (tmp_path / 'tmp').mkdir()
    monkeypatch.setattr(remote.tempfile, 'tempdir', str(tmp_path / 'tmp'))
    filesystem = fsspec.filesystem('memory')
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


def write_rows(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return path


def convert(source: Path, out: Path | str, **changes):
    arguments = {
        'dataset': 'json', 'data_subset': None, 'splits': ['train'], 'preprocessor': None, 'data_files': [str(source)], 'skip_preprocessing': True,
        'out_root': str(out), 'local': None, 'compression': None, 'num_workers': None, 'tokenizer': None, 'tokenizer_kwargs': None, 'max_seq_len': 2048,
        'target_prompts': 'none', 'target_responses': 'last', 'encoder_decoder': False, **changes,
    }  # fmt: skip
    if arguments['preprocessor'] is not None:
        arguments['skip_preprocessing'] = False
    return convert_finetuning_dataset_from_args(**arguments)


def read_mds(folder: Path) -> list[dict]:
    from streaming import StreamingDataset

    return list(StreamingDataset(local=str(folder), batch_size=1, shuffle=False))


def columns_of(folder: Path) -> dict[str, str]:
    shard = json.loads((folder / 'index.json').read_text())['shards'][0]
    return dict(zip(shard['column_names'], shard['column_encodings'], strict=True))


def test_prompt_and_response_as_text(tmp_path, capsys):
    [summary] = convert(write_rows(tmp_path / 'in.jsonl', PAIRS), tmp_path / 'out')
    assert read_mds(tmp_path / 'out' / 'train') == PAIRS
    assert columns_of(tmp_path / 'out' / 'train') == {'prompt': 'str', 'response': 'str'}
    assert (summary.rows, summary.samples, dict(summary.dropped)) == (40, 40, {})
    assert 'train: 40 of 40 rows -> columns prompt, response in 1 shards' in capsys.readouterr().out
    completions = [{'prompt': row['prompt'], 'completion': row['response']} for row in PAIRS]
    convert(write_rows(tmp_path / 'c.jsonl', completions), tmp_path / 'c')
    assert digest(tmp_path / 'c' / 'train') == digest(tmp_path / 'out' / 'train')


@pytest.mark.parametrize('rows', [PAIRS, CHATS], ids=['pairs', 'chats'])
def test_shards_are_those_of_the_streaming_writer(tmp_path, rows):
    from streaming import MDSWriter

    convert(write_rows(tmp_path / 'in.jsonl', rows), tmp_path / 'ours')
    with MDSWriter(columns=columns_of(tmp_path / 'ours' / 'train'), out=str(tmp_path / 'theirs'), hashes=['xxh3_64']) as writer:
        for row in rows:
            writer.write(row)
    assert (tmp_path / 'ours' / 'train' / 'shard.00000.mds').read_bytes() == (tmp_path / 'theirs' / 'shard.00000.mds').read_bytes()


def test_chats_as_json(tmp_path):
    convert(write_rows(tmp_path / 'in.jsonl', CHATS), tmp_path / 'out')
    assert read_mds(tmp_path / 'out' / 'train') == CHATS
    assert columns_of(tmp_path / 'out' / 'train') == {'messages': 'json'}


def test_keys_that_arrow_fills_with_nulls_are_not_written(tmp_path):
    named = {'messages': [{'role': 'user', 'content': 'a', 'name': None}, {'role': 'assistant', 'content': 'b'}]}
    convert(write_rows(tmp_path / 'in.jsonl', [*CHATS, named]), tmp_path / 'out')
    plain = {'messages': [{'role': m['role'], 'content': m['content']} for m in named['messages']]}
    assert read_mds(tmp_path / 'out' / 'train') == [*CHATS, plain]


@pytest.mark.parametrize(('rows', 'compression'), [(PAIRS, None), (CHATS, 'zstd:7')], ids=['pairs', 'chats'])
def test_tokenised(tmp_path, rows, compression, capsys):
    empty = {'prompt': '', 'response': 'x'} if 'prompt' in rows[0] else None
    source = write_rows(tmp_path / 'in.jsonl', [*rows, *([empty] if empty else [])])
    [summary] = convert(source, tmp_path / 'out', tokenizer=GPT2, compression=compression)
    tokenizer = gpt2_tokenizer()
    expected = [tokenize_formatted_example(row, tokenizer) for row in rows]
    assert read_mds(tmp_path / 'out' / 'train') == expected
    assert columns_of(tmp_path / 'out' / 'train') == {'turns': 'json'}
    assert summary.tokens == sum(len(turn['input_ids']) + len(turn['labels']) for example in expected for turn in example['turns'])
    if empty:
        assert dict(summary.dropped) == {'with an empty prompt or response': 1}
        assert 'train: warning: 1 rows were left out: 1 with an empty prompt or response' in capsys.readouterr().out


def test_tokenised_examples_with_nothing_to_train_are_left_out_and_counted(tmp_path):
    rows = [{'prompt': 'a b c d', 'response': 'e'}, {'prompt': 'a', 'response': 'b'}]
    source = write_rows(tmp_path / 'in.jsonl', rows)
    [summary] = convert(source, tmp_path / 'short', tokenizer=GPT2, max_seq_len=4)
    assert dict(summary.dropped) == {'without a token to train on among the first 4': 1} and len(read_mds(tmp_path / 'short' / 'train')) == 1
    [summary] = convert(source, tmp_path / 'all', tokenizer=GPT2, max_seq_len=4, target_prompts='all')
    assert summary.samples == 2
    [summary] = convert(source, tmp_path / 'encoder', tokenizer=GPT2, max_seq_len=4, encoder_decoder=True)
    assert summary.samples == 2


def test_pairs_without_text_are_left_out_when_texts_are_kept(tmp_path):
    [summary] = convert(write_rows(tmp_path / 'in.jsonl', [{'prompt': 'a', 'response': ''}, *PAIRS]), tmp_path / 'out')
    assert dict(summary.dropped) == {'with an empty prompt or response': 1} and read_mds(tmp_path / 'out' / 'train') == PAIRS


@pytest.mark.parametrize('tokenizer', [None, GPT2])
def test_same_shards_for_any_number_of_workers(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(row_conversion, '_ROWS_PER_BLOCK', 7)
    source = write_rows(tmp_path / 'in.jsonl', PAIRS)
    for workers in (None, 2):
        convert(source, tmp_path / str(workers), num_workers=workers, tokenizer=tokenizer)
    assert digest(tmp_path / 'None' / 'train') == digest(tmp_path / '2' / 'train')


def test_many_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(row_conversion, 'SIZE_LIMIT_BYTES', 2000)
    [summary] = convert(write_rows(tmp_path / 'in.jsonl', PAIRS), tmp_path / 'out')
    assert summary.shards > 3 and read_mds(tmp_path / 'out' / 'train') == PAIRS


def test_preprocessors(tmp_path):
    rows = [{'question': f'q{i}', 'answer': f'a{i}'} for i in range(3)]
    source = write_rows(tmp_path / 'in.jsonl', rows)
    expected = [{'prompt': row['question'], 'response': row['answer']} for row in rows]
    convert(source, tmp_path / 'map', preprocessor='{"prompt": "question", "response": "answer"}')
    convert(source, tmp_path / 'path', preprocessor='tests.data_prep.test_convert_finetuning_dataset:question_answer')
    assert read_mds(tmp_path / 'map' / 'train') == read_mds(tmp_path / 'path' / 'train') == expected
    if 'test-questions' not in dataset_names():
        dataset_constructor.register('test-questions')(question_answer)
    convert(source, tmp_path / 'name', preprocessor='test-questions')
    assert read_mds(tmp_path / 'name' / 'train') == expected


def question_answer(row):
    return {'prompt': row['question'], 'response': row['answer']}


def with_tokenizer(row, tokenizer):
    return tokenizer(text=row['question'], text_target=row['answer'])


def dataset_names() -> list[str]:
    from llmfoundry.data.finetuning.preprocessing import registered_names

    return registered_names()


def test_functions_that_tokenise(tmp_path):
    """Document 000's functions, whose rows can be kept as tokens only."""
    source = write_rows(tmp_path / 'in.jsonl', [{'question': 'q', 'answer': ' a'}])
    here = 'tests.data_prep.test_convert_finetuning_dataset:with_tokenizer'
    convert(source, tmp_path / 'out', preprocessor=here, tokenizer=GPT2)
    [sample] = read_mds(tmp_path / 'out' / 'train')
    assert [(turn['input_ids'], turn['labels']) for turn in sample['turns']] == [([80], [257])]
    with pytest.raises(DataError, match='row 0: UnableToProcessPromptResponseError'):
        convert(source, tmp_path / 'text', preprocessor=here)


def test_the_documented_command(tmp_path):
    """Document 002: --preprocessor of a module in the working folder, and a folder as data set."""
    (tmp_path / 'my_data').mkdir()
    (tmp_path / 'my_data' / 'formatting.py').write_text("def prep(row):\n    return {'prompt': row['q'] + '?', 'response': row['a']}\n")
    write_rows(tmp_path / 'facts' / 'train.jsonl', [{'q': 'dogs', 'a': 'bark'}])
    write_rows(tmp_path / 'facts' / 'validation.jsonl', [{'q': 'cats', 'a': 'purr'}])
    command = [sys.executable, str(SCRIPT), '--dataset', 'facts', '--preprocessor', 'my_data.formatting:prep', '--out_root', 'out']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [read_mds(tmp_path / 'out' / split) for split in ('train', 'validation')] == [
        [{'prompt': 'dogs?', 'response': 'bark'}],
        [{'prompt': 'cats?', 'response': 'purr'}],
    ]


def test_one_file_per_split(tmp_path):
    files = [str(write_rows(tmp_path / f'{name}.jsonl', rows)) for name, rows in (('a', PAIRS[:3]), ('b', PAIRS[3:]))]
    convert(tmp_path, tmp_path / 'out', splits='train, test', data_files=','.join(files))
    assert (read_mds(tmp_path / 'out' / 'train'), read_mds(tmp_path / 'out' / 'test')) == (PAIRS[:3], PAIRS[3:])


def test_to_an_object_store_with_a_local_copy(tmp_path, memory):
    source = write_rows(tmp_path / 'in.jsonl', PAIRS)
    convert(source, tmp_path / 'whole')
    convert(source, 'memory://out', local=str(tmp_path / 'kept'))
    convert(source, 'memory://again')
    for folder in ('/out/train', '/again/train'):
        target = tmp_path / folder.split('/')[1]
        target.mkdir()
        for name in memory.ls(folder, detail=False):
            memory.get_file(name, str(target / Path(name).name))
        assert digest(target) == digest(tmp_path / 'whole' / 'train')
    assert digest(tmp_path / 'kept' / 'train') == digest(tmp_path / 'whole' / 'train')
    assert [p.name for p in (tmp_path / 'kept').iterdir()] == ['train']
    assert not any(p.is_file() for p in (tmp_path / 'tmp').rglob('*'))
    with pytest.raises(ValueError, match='--out_root=memory://out already contains train'):
        convert(source, 'memory://out')
    with pytest.raises(ValueError, match=f'--local={tmp_path}/kept already contains train'):
        convert(source, 'memory://third', local=str(tmp_path / 'kept'))


def test_to_a_folder_with_a_local_copy(tmp_path):
    convert(write_rows(tmp_path / 'in.jsonl', PAIRS), tmp_path / 'out', local=str(tmp_path / 'kept'))
    assert digest(tmp_path / 'out' / 'train') == digest(tmp_path / 'kept' / 'train') and read_mds(tmp_path / 'out' / 'train') == PAIRS


@pytest.mark.parametrize('local', [False, True])
def test_an_upload_that_breaks_off_looks_unfinished_and_is_made_good(tmp_path, memory, monkeypatch, local):
    source, upload = write_rows(tmp_path / 'in.jsonl', PAIRS), remote.upload_file
    monkeypatch.setattr(row_conversion, 'SIZE_LIMIT_BYTES', 2000)
    kept = str(tmp_path / 'kept') if local else None

    def breaks_off(path, uri):
        if path.name == 'shard.00002.mds':
            raise KeyboardInterrupt
        upload(path, uri)

    monkeypatch.setattr(remote, 'upload_file', breaks_off)
    with pytest.raises(KeyboardInterrupt):
        convert(source, 'memory://out', local=kept)
    assert [Path(p).name for p in memory.ls('/out/train', detail=False)] == ['shard.00000.mds', 'shard.00001.mds']
    assert not (tmp_path / 'kept' / 'train').exists()
    monkeypatch.setattr(remote, 'upload_file', upload)
    convert(source, 'memory://out', local=kept)
    assert memory.exists('/out/train/index.json') and (tmp_path / 'kept' / 'train').exists() == local


KILLED = """
import sys, time
from llmfoundry.command_utils.data_prep import row_conversion
row_conversion._ROWS_PER_BLOCK, row_conversion.SIZE_LIMIT_BYTES, row_conversion.CHECKPOINT_SECONDS = 2, 2000, 0.0
from llmfoundry.command_utils.data_prep.convert_finetuning_dataset import main
encode, brake = row_conversion.RowEncoder.encode, float(sys.argv[1])
def slow(self, number, block):
    time.sleep(brake)
    return encode(self, number, block)
row_conversion.RowEncoder.encode = slow
main(sys.argv[2:])
"""


def test_kill_and_rerun(tmp_path):
    source = write_rows(tmp_path / 'in.jsonl', PAIRS)

    def command(out, brake):
        flags = ['--dataset', 'json', '--data_files', str(source), '--splits', 'train', '--skip-preprocessing', '--out_root', str(out)]
        return [sys.executable, '-c', KILLED, str(brake), *flags]

    subprocess.run(command(tmp_path / 'whole', 0), cwd=ROOT, capture_output=True, check=True)
    process = subprocess.Popen(command(tmp_path / 'out', 0.3), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    state_file, deadline = tmp_path / 'out' / 'train' / WORK_FOLDER / 'state.json', time.monotonic() + 60
    while not state_file.exists() or json.loads(state_file.read_text())['documents'] < 10:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert [p.name for p in (tmp_path / 'out' / 'train').iterdir()] == [WORK_FOLDER]
    done = subprocess.run(command(tmp_path / 'out', 0), cwd=ROOT, capture_output=True, text=True, check=True)
    assert 'going on with an unfinished conversion: 1' in done.stdout
    assert digest(tmp_path / 'out' / 'train') == digest(tmp_path / 'whole' / 'train')


def test_columns_and_format():
    identity = lambda row: row  # noqa: E731
    assert get_columns_and_format(PAIRS, True, identity) == ({'turns': 'json'}, 'prompt_response')
    assert get_columns_and_format(PAIRS, False, identity) == ({'prompt': 'str', 'response': 'str'}, 'prompt_response')
    assert get_columns_and_format(CHATS, True, identity) == ({'turns': 'json'}, 'chat')
    assert get_columns_and_format(datasets.Dataset.from_list(CHATS), False, identity) == ({'messages': 'json'}, 'chat')
    with pytest.raises(UnknownExampleTypeError, match=r"Found keys \['x'\] in dataset"):
        get_columns_and_format([{'x': 1}], False, identity)


WRONG = [
    (['--dataset', 'mosaicml/doge-facts'], 'no preprocessing function is registered under --dataset mosaicml/doge-facts, and --preprocessor names none. Pass --preprocessor NAME'),
    (['--preprocessor', 'nope.nothing:fn'], "Failed to import preprocessing function from string = nope.nothing:fn. ModuleNotFoundError: No module named 'nope'"),
    (['--preprocessor', 'tatsu-lab/alpaka'], "Failed to import preprocessing function from string = tatsu-lab/alpaka. Did you mean 'tatsu-lab/alpaca'?"),
    (['--preprocessor', 'json:dumps', '--skip-preprocessing'], '--preprocessor json:dumps and --skip-preprocessing contradict each other'),
    (['--preprocessor', '{"prompt": "q"'], '--preprocessor must be JSON, got \'{"prompt": "q"\''),
    (['--skip-preprocessing', '--splits', 'train', 'test'], '--data_files and --splits must have the same length, one file for each split: got 1 files'),
    (['--skip-preprocessing', '--data_files', '/no/such.jsonl'], 'Could not find a finetuning file. Looked for: '),
    (['--skip-preprocessing', '--compression', 'zip'], "compression 'zip' is not known"),
    (['--skip-preprocessing', '--max_seq_len', '0'], '--max_seq_len must be at least 1, got 0'),
    (['--skip-preprocessing', '--num_workers', '-1'], '--num_workers must be 0 or more, got -1'),
    (['--skip-preprocessing', '--local', 's3://bucket/x'], '--local s3://bucket/x: the copy that is kept must be in a local folder'),
    (['--skip-preprocessing', '--target_prompts', 'some'], 'target_prompts must be "none", "all" or "length>=N" where N is a positive integer, got \'some\''),
    (['--skip-preprocessing', '--target_responses', 'none'], 'target_responses must be "last" or "all", got \'none\''),
    (['--skip-preprocessing', '--encoder_decoder', '--target_responses', 'all'], 'When using encoder_decoder format, you must use target_prompts="none"'),
    (['--skip-preprocessing', '--tokenizer', GPT2, '--tokenizer_kwargs', '[1]'], "--tokenizer_kwargs must be a JSON object, got '[1]'"),
    (['--skip-preprocessing', '--tokenizer', 'llmfoundry://nope'], 'llmfoundry://nope'),
]


@pytest.mark.parametrize(('flags', 'message'), WRONG, ids=[m[:40] for _, m in WRONG])
def test_wrong_arguments(tmp_path, flags, message):
    source = write_rows(tmp_path / 'in.jsonl', PAIRS)
    given = ['--dataset', 'json', '--data_files', str(source), '--splits', 'train', '--out_root', str(tmp_path / 'out'), *flags]
    with pytest.raises(SystemExit) as e:
        main(given)
    assert str(e.value).startswith('error: ') and message in str(e.value)
    assert not (tmp_path / 'out').exists()


def test_what_is_there_is_not_overwritten(tmp_path):
    source = write_rows(tmp_path / 'in.jsonl', PAIRS)
    convert(source, tmp_path / 'out')
    before = digest(tmp_path / 'out' / 'train')
    with pytest.raises(ValueError, match=r'already contains train, which cannot overlap with the requested splits test, train'):
        convert(source, tmp_path / 'out', splits=['test', 'train'], data_files=[str(source)] * 2)
    assert digest(tmp_path / 'out' / 'train') == before and not (tmp_path / 'out' / 'test').exists()




@pytest.mark.parametrize('tokenizer', [None, GPT2])
def test_a_bad_row_is_named_with_its_index_and_shown(tmp_path, tokenizer):
    source = write_rows(tmp_path / 'in.jsonl', [*PAIRS[:17], {'prompt': 'a', 'response': None}, *PAIRS])
    with pytest.raises(ValueError) as e:
        convert(source, tmp_path / 'out', tokenizer=tokenizer)
    assert str(e.value) == (
        f"{source} [train]: row 17: InvalidResponseTypeError: Expected response to be a string, but found <class 'NoneType'>. "
        "The example: {'prompt': 'a', 'response': None}"
    )
    assert not (tmp_path / 'out' / 'train' / 'index.json').exists()


def test_a_preprocessor_that_raises_is_named_with_its_row(tmp_path):
    source = write_rows(tmp_path / 'in.jsonl', [{'question': 'q', 'answer': 'a'}] * 9 + [{'question': None, 'answer': 'a'}])
    with pytest.raises(DataError, match=r'row 9: UnableToProcess.*add_mark raised TypeError: unsupported operand .*The example: \{.question.: None'):
        convert(source, tmp_path / 'out', preprocessor='tests.data_prep.test_convert_finetuning_dataset:add_mark', num_workers=1)


def add_mark(row):
    return {'prompt': row['question'] + '?', 'response': row['answer']}


def test_nothing_usable_writes_nothing(tmp_path):
    with pytest.raises(InvalidDatasetError, match='of 2 rows, 2 with an empty prompt or response, so nothing was written'):
        convert(write_rows(tmp_path / 'in.jsonl', [{'prompt': 'a', 'response': ''}] * 2), tmp_path / 'out')
    assert not (tmp_path / 'out' / 'train').exists()
