"""``dataset_constructor`` as documents 000 and 002 use it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, Iterator

import pytest

from llmfoundry.data.finetuning import preprocessing, tasks
from llmfoundry.data.finetuning.tasks import dataset_constructor
from llmfoundry.data.finetuning.tokenization import tokenize_formatted_example
from tests.helpers.tokenizers import gpt2_tokenizer

NAMES = [
    'AI-MO/NuminaMath-CoT', 'HuggingFaceH4/databricks_dolly_15k', 'Muennighoff/P3', 'Muennighoff/flan', 'bigscience/P3', 'math-ai/StackMathQA',
    'sam-mosaic/full-hh-rlhf-chatml', 'sam-mosaic/vicuna_alpaca_hc3_chatml', 'tatsu-lab/alpaca', 'teknium/OpenHermes-2.5',
]


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(preprocessing, '_REGISTERED', dict(preprocessing._REGISTERED))
    yield


def test_the_documented_one_liner_prints_and_loads_little() -> None:
    code = 'from llmfoundry.data.finetuning.tasks import dataset_constructor; dataset_constructor.print_registered_tasks()'
    also = '; import sys; print(sorted({"torch", "composer", "streaming", "transformers"} & set(sys.modules)), file=sys.stderr)'
    done = subprocess.run([sys.executable, '-c', code + also], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines() == NAMES
    assert done.stderr.splitlines()[-1] == '[]'


def test_both_kinds_of_functions_give_the_same_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    @dataset_constructor.register('my-finetuning-task', 'another-name')
    def my_tokenization_function(example: dict, tokenizer: Any) -> Any:
        return tokenizer(text=example['input_text'], text_target=example['output_text'])

    @dataset_constructor.register('my-formatting-task')
    def my_formatting_function(example: dict) -> dict[str, str]:
        return {'prompt': example['input_text'], 'response': example['output_text']}

    row, tokenizer = {'input_text': 'Tell me about dogs.', 'output_text': ' Dogs are great pets.'}, gpt2_tokenizer()
    results = []
    for name in ('my-finetuning-task', 'my-formatting-task'):
        fn = dataset_constructor.get_preprocessing_fn_from_str(name)
        results.append(tokenize_formatted_example(preprocessing.apply(fn, row, tokenizer), tokenizer))
    assert results[0] == results[1]
    assert tokenizer.decode(results[0]['turns'][0]['labels']) == row['output_text']

    dataset_constructor.print_registered_tasks()
    # Other tests of the same process may have registered functions of their own.
    printed = capsys.readouterr().out.splitlines()
    assert printed == sorted(printed) and {*NAMES, 'my-finetuning-task', 'my-formatting-task', 'another-name'} <= set(printed)


def test_functions_by_name_and_by_columns() -> None:
    assert dataset_constructor.get_preprocessing_fn_from_str(None, 'tatsu-lab/alpaca') is dataset_constructor.get_preprocessing_fn_from_str('tatsu-lab/alpaca')
    assert dataset_constructor.get_preprocessing_fn_from_str(None, 'json') is None
    assert dataset_constructor.get_preprocessing_fn_from_dict({'prompt': 'a', 'response': 'b'})({'a': '1', 'b': '2'}) == {'prompt': '1', 'response': '2'}
    with pytest.raises(ValueError, match="already been registered with name='tatsu-lab/alpaca'"):
        dataset_constructor.register('tatsu-lab/alpaca')(lambda row: row)


def test_public_names() -> None:
    assert tasks.SUPPORTED_EXTENSIONS == ['.csv', '.json', '.jsonl', '.parquet']
    assert {'.lock', '.metadata'} <= set(tasks.HUGGINGFACE_FOLDER_EXTENSIONS)
    assert tasks.QA_format_preprocessor({'Q': 'q', 'A': 'a'})['messages'][1] == {'role': 'assistant', 'content': 'a'}
    assert tasks.messages_format_preprocessor({'messages': []}) == {'messages': []}
    assert set(tasks.__all__) >= {'StreamingFinetuningDataset', 'is_valid_ift_example', 'tokenize_formatted_example', 'dataset_constructor'}
