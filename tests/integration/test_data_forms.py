"""Three conversations through every way in: whatever the form of the data, the same token ids and labels reach the model.

``tests/golden/finetuning_token_ids.json`` is the table of what they must be. It was made with the tokenizers alone, without any code of this package, and read by eye: ``text`` shows the pieces.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import datasets
import pytest

from llmfoundry.command_utils.data_prep.convert_finetuning_dataset import convert_finetuning_dataset
from llmfoundry.command_utils.data_prep.dataprep import dataprep
from llmfoundry.command_utils.data_prep.tokenize_data import tokenize_data
from llmfoundry.data.finetuning.dataloader import build_finetuning_dataloader
from llmfoundry.data.finetuning.tasks import dataset_constructor
from tests.helpers.tokenizers import gpt2_tokenizer, neox_tokenizer, save_tokenizer, smollm2_tokenizer

TABLE = json.loads((Path(__file__).parent.parent / 'golden' / 'finetuning_token_ids.json').read_text(encoding='utf-8'))
TOKENIZERS = {'gpt2': gpt2_tokenizer, 'gpt_neox': neox_tokenizer, 'smollm2': smollm2_tokenizer}
MAX_SEQ_LEN = 128


@dataset_constructor.register('tests/two-columns')
def _two_columns(row: dict[str, Any]) -> dict[str, str]:
    return {'prompt': row['q'], 'response': row['a']}


@dataset_constructor.register('tests/tokenizing')
def _tokenizing(row: dict[str, Any], tokenizer: Any) -> Any:
    """As document 000 writes them."""
    return tokenizer(text=row['q'], text_target=row['a'])


def import_path(row: dict[str, Any]) -> dict[str, str]:
    return {'prompt': row['q'], 'completion': row['a']}


Block = dict[str, Any]
Rows = list[dict[str, Any]]


def _jsonl(folder: Path, rows: Rows) -> str:
    path = folder / 'train.jsonl'
    path.write_text(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows), encoding='utf-8')
    return str(path)


def _json_block(folder: Path, rows: Rows, **more: Any) -> Block:
    return {'hf_name': 'json', 'hf_kwargs': {'data_files': {'train': _jsonl(folder, rows)}}, 'split': 'train', **more}


def _pairs(name: str, prompt: str = 'prompt', response: str = 'response') -> Rows:
    return [{prompt: c['prompt'], response: c['response']} for c in TABLE[name]]


def _chats(name: str) -> Rows:
    return [{'messages': c['messages']} for c in TABLE[name]]


def _convert(name: str, folder: Path, rows: Rows, tokenizer: str | None) -> Block:
    """Document 002's MDS form, by the converter."""
    convert_finetuning_dataset(
        dataset='json', data_subset=None, splits=['train'], preprocessor=None, data_files=[_jsonl(folder, rows)], skip_preprocessing=True, out_root=str(folder / 'mds'), tokenizer=tokenizer,
        max_seq_len=MAX_SEQ_LEN, num_workers=1,
    )  # fmt: skip
    return {'local': str(folder / 'mds'), 'split': 'train'}


def _arrow(name: str, folder: Path, tokenizer: str) -> Block:
    """Document 004's."""
    tokenize_data(_jsonl(folder, _pairs(name, 'prompt', 'generation')), str(folder / 'train.arrow'), tokenizer, MAX_SEQ_LEN)
    return {'hf_name': 'arrow', 'hf_kwargs': {'data_files': {'train': str(folder / 'train.arrow')}}, 'split': 'train'}


def _dataprep(name: str, folder: Path, tokenizer: str, chunksize: int = MAX_SEQ_LEN) -> Block:
    """Document 001's: its own rows, prompt and markers."""
    rows = [{'input': c['question'], 'contexts': [], 'response': c['answer']} for c in TABLE[name]]
    datasets.Dataset.from_list(rows, features=datasets.Features({'input': datasets.Value('string'), 'contexts': [datasets.Value('string')], 'response': datasets.Value('string')})).save_to_disk(str(folder / 'rows'))
    dataprep({
        'source_config': {'method': 'load_from_disk', 'kwargs': {'dataset_path': str(folder / 'rows')}}, 'dataset_writer_config': {'method': 'save_to_disk', 'kwargs': {'dataset_path': str(folder / 'packed')}},
        'base_model': tokenizer, 'chunksize': chunksize, 'prompt_config': {'method': 'Prompt'}, 'prompt_format_config': {'method': 'UserAssistantFormat'},
    })  # fmt: skip
    return {'hf_name': str(folder / 'packed'), 'split': 'train'}


FORMS: dict[str, Callable[[str, Path, str], Block]] = {
    'prompt/response jsonl': lambda name, folder, tok: _json_block(folder, _pairs(name)),
    'prompt/completion jsonl': lambda name, folder, tok: _json_block(folder, _pairs(name, response='completion')),
    'column map': lambda name, folder, tok: _json_block(folder, _pairs(name, 'q', 'a'), preprocessing_fn={'prompt': 'q', 'response': 'a'}),
    'registered function': lambda name, folder, tok: _json_block(folder, _pairs(name, 'q', 'a'), preprocessing_fn='tests/two-columns'),
    'module:function': lambda name, folder, tok: _json_block(folder, _pairs(name, 'q', 'a'), preprocessing_fn='tests.integration.test_data_forms:import_path'),
    'data_dir folder': lambda name, folder, tok: {'hf_name': 'json', 'hf_kwargs': {'data_dir': str(Path(_jsonl(folder, _pairs(name))).parent)}, 'split': 'train'},
    'document 000, tokenising function': lambda name, folder, tok: {'name': 'tests/tokenizing', 'kwargs': {'data_files': {'train': _jsonl(folder, _pairs(name, 'q', 'a'))}}, 'split': 'train'},
    'document 000, function of dicts': lambda name, folder, tok: {'name': 'tests/two-columns', 'kwargs': {'data_files': {'train': _jsonl(folder, _pairs(name, 'q', 'a'))}}, 'split': 'train'},
    'MDS, raw': lambda name, folder, tok: _convert(name, folder, _pairs(name), None),
    'MDS, tokenised': lambda name, folder, tok: _convert(name, folder, _pairs(name), tok),
    'document 004, Arrow': _arrow,
}
CHAT_FORMS: dict[str, Callable[[str, Path, str], Block]] = {
    'messages jsonl': lambda name, folder, tok: _json_block(folder, _chats(name)),
    'MDS, raw messages': lambda name, folder, tok: _convert(name, folder, _chats(name), None),
    'MDS, tokenised messages': lambda name, folder, tok: _convert(name, folder, _chats(name), tok),
}
CASES = [(name, form) for name in TOKENIZERS for form in FORMS] + [('smollm2', form) for form in CHAT_FORMS] + [(name, 'document 001, dataprep') for name in ('gpt2', 'gpt_neox')]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('LLMFOUNDRY_CACHE', str(tmp_path / 'cache'))


def _documents(block: Block, tokenizer: Any, **more: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of every document that the loader yields, in their order."""
    dataset = {**block, 'max_seq_len': MAX_SEQ_LEN, 'decoder_only_format': True, 'shuffle': False, **more}
    found = []
    for batch in build_finetuning_dataloader(tokenizer, 1, dataset, num_workers=0, pin_memory=False).dataloader:
        for ids, labels, documents in zip(batch['input_ids'], batch['labels'], batch['sequence_id'], strict=True):
            found += [(ids[documents == d].tolist(), labels[documents == d].tolist()) for d in range(int(documents.max()) + 1)]
    return found


def _expected(name: str) -> list[tuple[list[int], list[int]]]:
    return [(c['input_ids'], c['labels']) for c in TABLE[name]]


@pytest.mark.parametrize(('name', 'form'), CASES, ids=lambda value: str(value).replace(' ', '-'))
def test_every_form_gives_the_ids_of_the_table(name: str, form: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[name]()
    folder = save_tokenizer(tokenizer, tmp_path / 'tokenizer')
    (tmp_path / 'data').mkdir()
    make = {**FORMS, **CHAT_FORMS, 'document 001, dataprep': _dataprep}[form]
    assert _documents(make(name, tmp_path / 'data', folder), tokenizer) == _expected(name)


@pytest.mark.parametrize('form', ['prompt/response jsonl', 'MDS, tokenised', 'document 004, Arrow'])
def test_packing_changes_no_document(form: str, tmp_path: Path) -> None:
    """Only the label of a document's first token, which nothing could predict; prompts are not trained, so there is none here."""
    tokenizer = gpt2_tokenizer()
    folder = save_tokenizer(tokenizer, tmp_path / 'tokenizer')
    (tmp_path / 'data').mkdir()
    found = _documents(FORMS[form]('gpt2', tmp_path / 'data', folder), tokenizer, packing=True)
    assert sorted(found) == sorted(_expected('gpt2'))


def test_the_table_is_what_the_tokenizers_say() -> None:
    """Reads the table with the tokenizers alone: the ids spell prompt and response, and the labels are the response with one end token."""
    for name, build in TOKENIZERS.items():
        tokenizer = build()
        assert len(TABLE[name]) == 3
        for row in TABLE[name]:
            trained = [i for i in row['labels'] if i != -100]
            assert len(row['labels']) == len(row['input_ids']) and row['input_ids'][-len(trained) :] == trained
            assert tokenizer.decode(row['input_ids'][: -len(trained)]) == row['prompt']
            assert tokenizer.decode(trained) == row['response'] + ('' if name == 'smollm2' else tokenizer.eos_token)
            assert trained.count(tokenizer.eos_token_id) == 1
            if name == 'smollm2':
                assert tokenizer.apply_chat_template(row['messages'], tokenize=True, return_dict=False) == row['input_ids']
