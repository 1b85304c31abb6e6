"""Preprocessing functions: the presets, the three ways to name one, and what happens when one fails."""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path
from typing import Any, Iterator

import pytest

from llmfoundry.data.finetuning import preprocessing
from llmfoundry.data.finetuning.preprocessing import apply, function_name, register, registered_names, resolve_preprocessing_fn, takes_tokenizer
from llmfoundry.errors import InvalidPromptResponseKeysError, UnableToProcessPromptResponseError

DOLLY = 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Response:\n'

# Rows and what the public release makes of them.
PRESETS = [
    ('tatsu-lab/alpaca', {'text': 'A\n\n### Response:\nB'}, {'prompt': 'A\n\n### Response:', 'response': '\nB'}),
    ('HuggingFaceH4/databricks_dolly_15k', {'instruction': 'I', 'input': 'X', 'output': 'O'}, {'prompt': DOLLY.format('I\nX'), 'response': 'O'}),
    ('HuggingFaceH4/databricks_dolly_15k', {'instruction': 'I', 'input': '', 'output': 'O', 'category': 'c'}, {'prompt': DOLLY.format('I'), 'response': 'O'}),
    ('bigscience/P3', {'inputs': 'a', 'targets': 'b'}, {'prompt': 'a:', 'response': 'b'}),
    ('Muennighoff/P3', {'inputs': 'a', 'targets': 'b'}, {'prompt': 'a', 'response': ' b'}),
    ('Muennighoff/P3', {'inputs': 'a ', 'targets': 'b'}, {'prompt': 'a ', 'response': 'b'}),
    ('Muennighoff/P3', {'inputs': 'a', 'targets': ' b'}, {'prompt': 'a', 'response': ' b'}),
    ('Muennighoff/flan', {'inputs': 'a\n', 'targets': 'b', 'task': 't'}, {'prompt': 'a\n', 'response': 'b'}),
    ('Muennighoff/flan', {'inputs': '', 'targets': 'b'}, {'prompt': '', 'response': ' b'}),
    # The public release makes a target of one space here; left empty, the row is dropped and counted.
    ('Muennighoff/flan', {'inputs': 'a', 'targets': ''}, {'prompt': 'a', 'response': ''}),
    (
        'teknium/OpenHermes-2.5',
        {'conversations': [{'from': 'system', 'value': 's'}, {'from': 'human', 'value': 'h'}, {'from': 'gpt', 'value': 'g', 'weight': 1}, {'from': 'tool', 'value': 't'}]},
        {'messages': [{'role': r, 'content': c} for r, c in (('system', 's'), ('user', 'h'), ('assistant', 'g'), ('tool', 't'))]},
    ),
    ('math-ai/StackMathQA', {'Q': 'q', 'A': 'a', 'meta': {}}, {'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'a'}]}),
    ('AI-MO/NuminaMath-CoT', {'messages': [{'role': 'user', 'content': 'x'}], 'source': 's'}, {'messages': [{'role': 'user', 'content': 'x'}]}),
    ('sam-mosaic/full-hh-rlhf-chatml', {'prompt': 'p', 'response': 'r', 'source': 's'}, {'prompt': 'p', 'response': 'r'}),
]
UNREADABLE = [
    ('tatsu-lab/alpaca', {'text': 'no header'}),
    ('tatsu-lab/alpaca', {'text': 'a ### Response: b ### Response: c'}),
    ('tatsu-lab/alpaca', {'text': None}),
    ('HuggingFaceH4/databricks_dolly_15k', {'instruction': 'I', 'output': 'O'}),
    ('HuggingFaceH4/databricks_dolly_15k', {'instruction': 'I', 'input': 'X'}),
    ('Muennighoff/P3', {'x': 1}),
    ('Muennighoff/flan', {'inputs': None, 'targets': 'b'}),
    ('teknium/OpenHermes-2.5', {'x': 1}),
    ('teknium/OpenHermes-2.5', {'conversations': [{'from': 'human'}]}),
    ('math-ai/StackMathQA', {'Q': 'q'}),
    ('AI-MO/NuminaMath-CoT', {'x': 1}),
    ('sam-mosaic/vicuna_alpaca_hc3_chatml', {'prompt': 'p'}),
]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(preprocessing, '_REGISTERED', dict(preprocessing._REGISTERED))
    yield


@pytest.mark.parametrize(('name', 'row', 'example'), PRESETS, ids=[f'{i}-{p[0]}' for i, p in enumerate(PRESETS)])
def test_presets(name: str, row: dict[str, Any], example: dict[str, Any]) -> None:
    result = apply(resolve_preprocessing_fn(name, None), row, None)
    assert result == example and list(result) == list(example)


@pytest.mark.parametrize(('name', 'row'), UNREADABLE, ids=[f'{i}-{u[0]}' for i, u in enumerate(UNREADABLE)])
def test_rows_that_a_preset_cannot_read(name: str, row: dict[str, Any]) -> None:
    with pytest.raises(UnableToProcessPromptResponseError) as e:
        resolve_preprocessing_fn(name, None)(row)
    assert str(e.value) == f'Unable to extract prompt/response from {row}'


def test_p3_raises_a_key_error_itself_and_the_common_one_in_the_pipeline() -> None:
    fn = resolve_preprocessing_fn('bigscience/P3', None)
    with pytest.raises(KeyError):
        fn({'x': 1})
    with pytest.raises(UnableToProcessPromptResponseError) as e:
        apply(fn, {'x': 1}, None)
    assert str(e.value) == "Unable to extract prompt/response from {'x': 1}: llmfoundry.data.finetuning.preprocessing:p3_preprocessing_function raised KeyError: 'inputs'"


def test_a_huge_row_is_not_printed_whole() -> None:
    with pytest.raises(UnableToProcessPromptResponseError) as e:
        resolve_preprocessing_fn('tatsu-lab/alpaca', None)({'text': 'x' * 10**6})
    assert len(str(e.value)) < 2100 and str(e.value).endswith('... (1000012 characters)')


def test_registering() -> None:
    @register('one', 'two')
    def fn(row: dict) -> dict:
        return {'prompt': row['a'], 'response': row['b']}

    assert {'one', 'two'} <= set(registered_names())
    assert registered_names() == sorted(registered_names())
    assert resolve_preprocessing_fn('two', None) is fn
    for names in (('two',), ('three', 'one'), ('four', 'four')):
        with pytest.raises(ValueError, match=f"A tokenization function has already been registered with name='{names[-1]}'."):
            register(*names)(fn)
    assert 'three' not in registered_names(), 'all names or none'


def test_a_data_set_brings_its_function_unless_another_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger='llmfoundry'):
        assert resolve_preprocessing_fn(None, 'math-ai/StackMathQA') is resolve_preprocessing_fn('math-ai/StackMathQA', 'json')
    assert 'Using the one registered for math-ai/StackMathQA' in caplog.text
    assert resolve_preprocessing_fn('tatsu-lab/alpaca', 'math-ai/StackMathQA').__name__ == 'alpaca_preprocessing_function'
    assert resolve_preprocessing_fn(None, 'json') is None
    assert resolve_preprocessing_fn(None, None) is None


def test_import_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'my_h1_formatting.py').write_text('class Kind:\n    @staticmethod\n    def fn(row):\n        return row\n\nnumber = 3\n')
    (tmp_path / 'my_h1_broken.py').write_text('import not_there_either\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [p for p in sys.path if p not in ('', str(tmp_path))])
    assert resolve_preprocessing_fn('os.path:join', None)('a', 'b') == 'a/b'
    assert resolve_preprocessing_fn('my_h1_formatting:Kind.fn', None)({'a': 1}) == {'a': 1}, 'found in the working folder'

    start, end = 'Failed to import preprocessing function from string = ', f'. Folders searched: the installed packages and {tmp_path}'
    for name, cause in {
        'my_h1_nothing:f': f"ModuleNotFoundError: No module named 'my_h1_nothing'{end}",
        'os:nope': f"AttributeError: module 'os' has no attribute 'nope'{end}",
        'a:b:c': f"ModuleNotFoundError: No module named 'a'{end}",
        'my_h1_broken:f': f"ModuleNotFoundError: No module named 'not_there_either'{end}",
        'my_h1_formatting:number': "'number' is a int, not a function",
    }.items():
        with pytest.raises(ValueError) as e:
            resolve_preprocessing_fn(name, 'json')
        assert str(e.value) == f'{start}{name}. {cause}'


def test_the_working_folder_is_searched_only_where_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'code').mkdir()
    (tmp_path / 'code' / 'my_h1_fails.py').write_text('import not_there_either\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [str(tmp_path / 'code'), *(p for p in sys.path if p not in ('', str(tmp_path)))])
    for name in ('my_h1_fails:f', 'my_h1_nowhere:f'):
        with pytest.raises(ValueError, match='Failed to import'):
            resolve_preprocessing_fn(name, None)
        assert str(tmp_path) not in sys.path


def test_an_error_of_ours_passes_through() -> None:
    fn = resolve_preprocessing_fn({'prompt': 'a'}, None)
    with pytest.raises(InvalidPromptResponseKeysError):
        apply(fn, {'a': 1}, None)


def test_a_name_that_is_neither_registered_nor_a_path() -> None:
    with pytest.raises(ValueError) as e:
        resolve_preprocessing_fn('tatsu-lab/alpacca', None)
    assert str(e.value).startswith("Failed to import preprocessing function from string = tatsu-lab/alpacca. Did you mean 'tatsu-lab/alpaca'? It is not registered, and an import path has the form package.module:function. Registered: AI-MO/")
    for name in (':f', 'module:', ''):
        with pytest.raises(ValueError, match='It is not registered'):
            resolve_preprocessing_fn(name, None)
    with pytest.raises(ValueError, match='must be a registered name'):
        resolve_preprocessing_fn(3, None)


def test_column_map() -> None:
    fn = resolve_preprocessing_fn({'prompt': 'question', 'response': 'answer'}, 'tatsu-lab/alpaca')
    assert fn({'question': 'q', 'answer': 'a', 'id': 3}) == {'prompt': 'q', 'response': 'a'}
    with pytest.raises(UnableToProcessPromptResponseError) as e:
        fn({'question': 'q', 'id': 3})
    assert str(e.value) == "Unable to extract prompt/response from {'question': 'q', 'id': 3}: preprocessing_fn names the column 'answer', but the columns are ['id', 'question']"


@pytest.mark.parametrize('mapping', [{'response': 'b', 'prompt': 'a'}, {'prompt': 'a'}, {'prompt': 'a', 'completion': 'b'}, {'prompt': 'a', 'response': 'b', 'x': 'c'}, {}], ids=str)
def test_a_column_map_has_two_keys_in_order(mapping: dict[str, str]) -> None:
    fn = resolve_preprocessing_fn(mapping, None)
    with pytest.raises(InvalidPromptResponseKeysError) as e:
        fn({'a': '1', 'b': '2'})
    assert str(e.value) == f'Expected {mapping=} to have keys "prompt" and "response", in this order, for example={{\'a\': \'1\', \'b\': \'2\'}}.'


def tokenisation_function(example: dict, tokenizer: Any) -> Any:
    return tokenizer(text=example['input_text'], text_target=example['output_text'])


class CallableObject:
    __hash__ = None  # type: ignore[assignment]

    def __call__(self, row: dict, tokenizer: Any) -> dict:
        return {'tokenizer': tokenizer}


def test_functions_of_two_arguments_get_the_tokenizer() -> None:
    def fake(text: str, text_target: str) -> dict[str, list[int]]:
        return {'input_ids': [len(text)], 'labels': [len(text_target)]}

    assert apply(tokenisation_function, {'input_text': 'ab', 'output_text': 'c'}, fake) == {'input_ids': [2], 'labels': [1]}
    assert apply(CallableObject(), {}, fake) == {'tokenizer': fake}
    assert apply(lambda row, tokenizer=None: {'tokenizer': tokenizer}, {}, fake) == {'tokenizer': fake}
    assert apply(lambda row, upper=False: {'upper': upper}, {}, fake) == {'upper': False}
    assert apply(functools.partial(lambda extra, row: {'row': row}, 1), {'a': 1}, fake) == {'row': {'a': 1}}
    assert not takes_tokenizer(dict)


def test_a_function_that_fails_is_named() -> None:
    def fails(row: dict) -> dict:
        return {'prompt': 1 / row['a']}

    with pytest.raises(UnableToProcessPromptResponseError) as e:
        apply(fails, {'a': 0}, None)
    assert str(e.value) == f"Unable to extract prompt/response from {{'a': 0}}: {__name__}:{fails.__qualname__} raised ZeroDivisionError: division by zero"
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    assert function_name(CallableObject()) == f'{__name__}:CallableObject'
