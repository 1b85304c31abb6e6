"""dataprep from its YAML: every source and writer, URIs, code of one's own, and all mistakes of a config at once."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
import yaml

from llmfoundry.command_utils.data_prep.dataprep import dataprep, load_dataprep_config, writers
from llmfoundry.command_utils.data_prep.dataprep import run as run_module
from llmfoundry.command_utils.data_prep.dataprep.config import base_of
from llmfoundry.errors import ConfigError, DataError, InvalidDatasetError, OutputFolderNotEmptyError
from tests.helpers.workspace import ROOT, run_command

ROWS = [{'input': f'What is {i} plus {i}?', 'response': f'It is {2 * i}.', 'contexts': ['Sums.', 'Of numbers.'] if i % 2 else []} for i in range(30)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / 'rows'))
    return tmp_path / 'rows'


def _config(source: Any, target: Any, **changes: Any) -> dict[str, Any]:
    return {
        'source_config': {'method': 'load_from_disk', 'kwargs': {'dataset_path': str(source)}},
        'dataset_writer_config': {'method': 'save_to_disk', 'kwargs': {'dataset_path': str(target)}},
        'base_model': 'llmfoundry://gpt2',
        'chunksize': 64,
        **changes,
    }


@pytest.mark.parametrize('script', ['llm/training/dataprep.py', 'scripts/data_prep/dataprep.py'])
def test_the_documented_command(script: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / 'config.yaml').write_text(yaml.safe_dump(_config('rows', 'out', num_proc=2)))
    result = run_command([sys.executable, str(ROOT / script), 'config.yaml'], tmp_path)
    assert result.returncode == 0, result.stderr
    assert 'dataprep: 30 rows read, 30 kept, 0 dropped' in result.stdout
    packed = datasets.load_from_disk(str(tmp_path / 'out'))
    assert packed.column_names == ['input_ids', 'labels', 'attention_mask', 'sequence_id', 'full_text']
    assert sum(max(row['sequence_id']) + 1 for row in packed) == 30
    assert packed[0]['full_text'].startswith('Input: What is 0 plus 0?\nResponse: It is 0.\nContext: Sums.\nContext: Of numbers.\nInput: What is 1')


def test_the_result_does_not_depend_on_the_number_of_processes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, 'ROWS_PER_BLOCK', 4)
    for processes in (1, 2):
        dataprep(_config(source, tmp_path / f'out{processes}', num_proc=processes))
    one, two = (datasets.load_from_disk(str(tmp_path / f'out{n}')).to_list() for n in (1, 2))
    assert one == two and len(one) > 3


@pytest.mark.parametrize(('method', 'key', 'name', 'reader'), [
    ('to_json', 'path_or_buf', 'packed.jsonl', 'json'), ('to_parquet', 'path_or_buf', 'packed.parquet', 'parquet'), ('to_csv', 'path_or_buf', 'packed.csv', 'csv'),
])  # fmt: skip
def test_file_writers(method: str, key: str, name: str, reader: str, source: Path, tmp_path: Path) -> None:
    # More than 1000 ids, which pandas would abbreviate.
    dataprep(_config(source, tmp_path / 'folder', chunksize=1100))
    dataprep(_config(source, '', chunksize=1100, dataset_writer_config={'method': method, 'kwargs': {key: str(tmp_path / 'new' / name)}}))
    written = datasets.load_dataset(reader, data_files=str(tmp_path / 'new' / name), split='train', cache_dir=str(tmp_path / 'cache')).to_list()
    expected = datasets.load_from_disk(str(tmp_path / 'folder')).to_list()
    if method == 'to_csv':
        written = [{k: v if k == 'full_text' else json.loads(v) for k, v in row.items()} for row in written]
    assert written == expected
    assert [p.name for p in (tmp_path / 'new').iterdir()] == [name], 'nothing else is left'


def test_load_dataset_is_the_default_source(tmp_path: Path) -> None:
    (tmp_path / 'rows.jsonl').write_text('\n'.join(json.dumps(row) for row in ROWS))
    block = {'kwargs': {'path': 'json', 'data_files': str(tmp_path / 'rows.jsonl'), 'cache_dir': str(tmp_path / 'cache'), 'split': 'train'}}
    summary = dataprep(_config('', tmp_path / 'out', source_config=block))
    assert (summary.counts.rows, summary.packed_rows) == (30, len(datasets.load_from_disk(str(tmp_path / 'out'))))
    del block['kwargs']['split']
    assert dataprep(_config('', tmp_path / 'out2', source_config=block)).counts.rows == 30, 'one split needs no name'


def test_memory_in_and_out(source: Path) -> None:
    memory = fsspec.filesystem('memory')
    memory.store.clear()
    try:
        for file in source.iterdir():
            memory.put_file(str(file), f'/rows/{file.name}')
        dataprep(_config('memory://rows', 'memory://out/packed'))
        dataprep(_config('memory://rows', '', dataset_writer_config={'method': 'to_json', 'kwargs': {'path_or_buf': 'memory://out/packed.jsonl'}}))
        assert datasets.load_from_disk('memory://out/packed').to_list() == [json.loads(line) for line in memory.cat('/out/packed.jsonl').splitlines()]
        with pytest.raises(OutputFolderNotEmptyError, match='memory://out/packed is not empty'):
            dataprep(_config('memory://rows', 'memory://out/packed'))
    finally:
        memory.store.clear()


def test_s3_without_its_fsspec_plugin(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Composer's object stores take over, one file at a time, and the file without which nothing loads goes up last."""
    from llmfoundry.command_utils.data_prep.dataprep import sources

    bucket, order = tmp_path / 'bucket', []
    shutil.copytree(source, bucket / 'rows')

    def local(uri: str) -> Path:
        return bucket / uri.removeprefix('s3://bucket/')

    def upload(path: Path, uri: str) -> None:
        order.append(uri)
        local(uri).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, local(uri))

    def listing(uri: str, patterns: Any) -> list[tuple[str, int]]:
        return sorted((f's3://bucket/{p.relative_to(bucket).as_posix()}', p.stat().st_size) for p in local(uri).rglob('*') if p.is_file())

    monkeypatch.setattr(sources, '_has_filesystem', lambda uri: False)
    monkeypatch.setattr(sources.remote, 'list_files', listing)
    monkeypatch.setattr(sources.remote, 'fetch', lambda uri, path: shutil.copyfile(local(uri), path))
    monkeypatch.setattr(writers.remote, 'upload_file', upload)
    dataprep(_config('s3://bucket/rows', 's3://bucket/out', dataset_writer_config={'method': 'save_to_disk', 'kwargs': {'dataset_path': 's3://bucket/out', 'num_shards': 2}}))
    assert order[-1] == 's3://bucket/out/state.json' and len(order) == 4
    assert len(datasets.load_from_disk(str(bucket / 'out'))) > 3
    shutil.copyfile(ROOT / 'LICENSE', bucket / 'rows.jsonl')
    assert Path(sources._fetch_files({'train': ['s3://bucket/rows.jsonl']})['train'][0]).name == 'rows.jsonl'


OWN_CODE = """
import datasets
from llmfoundry.data.prompts import Prompt, PromptFormat
class Loud(Prompt):
    def render_instruction(self, input, *args):
        return super().render_instruction(input.upper(), *args)
def load(rows, prefix='q'):
    return datasets.Dataset.from_list([{'input': f'{prefix}{i}', 'response': 'r'} for i in range(rows)])
def write(dataset, name):
    open(name, 'w').write(dataset[0]['full_text'])
VALUE = 3
"""


def test_code_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'own_dataprep_code').mkdir()
    (tmp_path / 'own_dataprep_code' / 'parts.py').write_text(OWN_CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', list(sys.path))
    config = {
        'source_config': {'method': 'own_dataprep_code.parts::load', 'kwargs': {'rows': 2}},
        'dataset_writer_config': {'method': 'own_dataprep_code.parts::write', 'kwargs': {'name': 'out.txt'}},
        'prompt_config': {'method': 'own_dataprep_code.parts::Loud'},
        'prompt_format_config': {'method': 'UserAssistant', 'kwargs': {'input': {'prefix': '> '}}},
        'base_model': 'llmfoundry://gpt2',
    }
    dataprep(config)
    assert (tmp_path / 'out.txt').read_text() == '> Q0\nAssistant: r\n> Q1\nAssistant: r'
    for method, message in {
        'own_dataprep_code.parts::lod': r"source_config.method: 'own_dataprep_code.parts::lod' cannot be imported: AttributeError: module .* has no attribute 'lod'",
        'own_dataprep_code.part::load': r"cannot be imported: ModuleNotFoundError: No module named 'own_dataprep_code.part'",
        'own_dataprep_code.parts::VALUE': r'is a int; a function or class is needed',
    }.items():
        with pytest.raises(ConfigError, match=message):
            dataprep({**config, 'source_config': {'method': method}})
    config['source_config'] = {'method': 'builtins::list'}
    with pytest.raises(DataError, match='source_config.method returned a list; a datasets.Dataset is needed'):
        dataprep(config)


def test_all_problems_of_a_config_at_once(tmp_path: Path) -> None:
    path = tmp_path / 'bad.yaml'
    path.write_text(
        'source_config:\n  method: load_from_disc\n  kwargs: {}\n'
        'dataset_writer_config:\n  method: save_to_disk\n  kwargs: {max_shards: 3}\n'
        'chunk_size: 100\nchunksize: 1\nnum_proc: none\nignore_index: 3\n'
        'prompt_config:\n  method: DefaultPrompt\n  kwargs: {input_template: "no place", sytem_message: x}\n'
        'prompt_format_config:\n  method: Lama2\n'
    )
    with pytest.raises(ConfigError) as e:
        load_dataprep_config(path)
    lines = [line.strip().replace(str(path), 'bad.yaml') for line in str(e.value).splitlines()[1:]]
    assert lines == [
        "source_config.method (bad.yaml:2): 'load_from_disc' is not known (did you mean 'load_from_disk'?); your own code is named package.module::attribute",
        "dataset_writer_config.kwargs.max_shards (bad.yaml:6): unknown key (did you mean 'max_shard_size'?)",
        'dataset_writer_config.kwargs.dataset_path (bad.yaml:6): missing: this key is mandatory (a string)',
        "chunk_size (bad.yaml:7): unknown key (did you mean 'chunksize'?)",
        'chunksize (bad.yaml:8): 1: must be at least 2 tokens',
        "num_proc (bad.yaml:9): expected an integer, got 'none'",
        'ignore_index (bad.yaml:10): 3: must be negative, since ids from 0 on are tokens; leave it out for -100',
        "prompt_config.kwargs.sytem_message (bad.yaml:13): unknown key (did you mean 'system_message'?)",
        "prompt_format_config.method (bad.yaml:15): 'Lama2' is not known (did you mean 'Llama2'?); your own code is named package.module::attribute",
        'base_model: missing: this key is mandatory (a string)',
    ]


@pytest.mark.parametrize(('changes', 'message'), [
    ({'prompt_config': {'method': 'Prompt', 'kwargs': {'input_template': 'x'}}}, "prompt_config.kwargs: input_template='x' has no place for the text"),
    ({'prompt_config': {'method': 'Prompt', 'kwargs': {'format': 'ChatML'}}}, 'prompt_config.kwargs.format: belongs in the block prompt_format_config'),
    ({'prompt_config': {'kwargs': {}}}, 'prompt_config.method: missing'),
    ({'source_config': 'rows'}, "source_config: expected a mapping, got 'rows'"),
    ({'source_config': {'method': 'load_from_disk', 'kwargs': {'path': 'x'}}}, r"source_config.kwargs.path: unknown key \(did you mean 'dataset_path'\?\)"),
    ({'dataset_writer_config': {'method': 'save_to_disk', 'kwargs': {'dataset_path': 'SOURCE'}}}, r"dataset_writer_config.kwargs.dataset_path: 'SOURCE' is also the source"),
    ({'prompt_format_config': {'method': 'PromptFormat', 'kwargs': {'input': 3}}}, 'prompt_format_config.kwargs: a role is a mapping with prefix'),
])  # fmt: skip
def test_single_problems(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_dataprep_config(_config('SOURCE', 'out', **changes))


def test_nothing_half_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, path: str, **kwargs: Any) -> None:
        Path(path).mkdir()
        (Path(path) / 'data-00000-of-00001.arrow').write_text('half')
        raise OSError('disk full')

    monkeypatch.setattr(datasets.Dataset, 'save_to_disk', fails)
    (tmp_path / 'runs').mkdir()
    with pytest.raises(OSError, match='disk full'):
        dataprep(_config(source, tmp_path / 'runs' / 'out'))
    assert list((tmp_path / 'runs').iterdir()) == []


def test_an_existing_result_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / 'empty').mkdir()
    dataprep(_config(source, tmp_path / 'empty'))
    with pytest.raises(OutputFolderNotEmptyError, match='empty is not empty. Please remove or empty it and retry'):
        dataprep(_config('a source that is never read', tmp_path / 'empty'))
    (tmp_path / 'f.csv').write_text('mine')
    with pytest.raises(OutputFolderNotEmptyError):
        dataprep(_config(source, '', dataset_writer_config={'method': 'to_csv', 'kwargs': {'path_or_buf': str(tmp_path / 'f.csv')}}))


def test_drops_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    datasets.Dataset.from_list([*ROWS[:3], {'input': 'long ' * 90, 'response': 'x', 'contexts': []}, {'input': 'a', 'response': '', 'contexts': []}]).save_to_disk(str(tmp_path / 'in'))
    dataprep(_config(tmp_path / 'in', tmp_path / 'out'))
    assert '5 rows read, 3 kept, 2 dropped: 1 longer than chunksize=64 tokens (the longest has 97), 1 without a response' in capsys.readouterr().out
    with pytest.raises(InvalidDatasetError, match='no row is left. dataprep: 5 rows read, 0 kept, 5 dropped'):
        dataprep(_config(tmp_path / 'in', tmp_path / 'out3', chunksize=3))
    assert not (tmp_path / 'out3').exists()


def test_wrong_sources(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'nowhere: no dataset that datasets.save_to_disk wrote'):
        dataprep(_config(tmp_path / 'nowhere', tmp_path / 'out'))
    datasets.Dataset.from_list([{'question': 'a', 'response': 'b'}]).save_to_disk(str(tmp_path / 'other'))
    with pytest.raises(DataError, match=r"other: no column 'input'; rows need input and response .* The columns are question, response: rename them first"):
        dataprep(_config(tmp_path / 'other', tmp_path / 'out'))
    both = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({'train': both, 'eval': both}).save_to_disk(str(tmp_path / 'two'))
    with pytest.raises(DataError, match='two: holds the splits train, eval; name one in source_config.kwargs.dataset_path'):
        dataprep(_config(tmp_path / 'two', tmp_path / 'out'))
    assert dataprep(_config(tmp_path / 'two' / 'eval', tmp_path / 'out')).counts.rows == 30


def test_markers_that_the_tokenizer_does_not_know_are_warned_of(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture) -> None:
    dataprep(_config(source, tmp_path / 'out', prompt_format_config={'method': 'VicunaFormat'}, ignore_index=-1))
    assert "prompt_format_config: BOS '<s>' is no token of the tokenizer of 'llmfoundry://gpt2'" in caplog.text
    assert 'ignore_index is -1, but losses and loaders ignore -100' in caplog.text
    assert -1 in datasets.load_from_disk(str(tmp_path / 'out'))[0]['labels']
    dataprep(_config(source, tmp_path / 'out2'))
    assert "prompt format PromptFormat, without markers: the family of 'llmfoundry://gpt2' is not known" in capsys.readouterr().out


def test_the_base_of_an_adapter_and_local_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = tmp_path / 'models' / 'me' / 'adapter'
    adapter.mkdir(parents=True)
    (adapter / 'adapter_config.json').write_text(json.dumps({'base_model_name_or_path': 'lmsys/vicuna-7b-v1.5'}))
    assert base_of(str(adapter)) == 'lmsys/vicuna-7b-v1.5'
    monkeypatch.chdir(tmp_path)
    assert base_of('me/adapter') == 'lmsys/vicuna-7b-v1.5', 'the default of LOCAL_MODELS_DIR is models'
    monkeypatch.setenv('LOCAL_MODELS_DIR', str(tmp_path / 'elsewhere'))
    assert base_of('me/adapter') == 'me/adapter'


def test_the_sub_command_of_llmfoundry(source: Path, tmp_path: Path) -> None:
    (tmp_path / 'config.yaml').write_text(yaml.safe_dump(_config('rows', 'out')))
    command = [str(Path(sys.executable).parent / 'llmfoundry'), 'data_prep', 'dataprep', 'config.yaml']
    assert run_command(command, tmp_path).returncode == 0
    again = run_command(command, tmp_path)
    assert again.returncode == 1 and 'out is not empty' in again.stderr and 'Traceback' not in again.stderr
