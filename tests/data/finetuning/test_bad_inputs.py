"""Bad inputs, each through the loader that a run builds (or the command that a user types), with the whole text of the error: where, what was seen, the rule, the remedy."""

from __future__ import annotations

import copy
import json
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmfoundry import errors
from llmfoundry.data.finetuning.dataloader import build_finetuning_dataloader
from tests.helpers.tokenizers import gpt2_tokenizer, smollm2_tokenizer

GOOD = {'prompt': 'a', 'response': ' b'}
GPT2, CHAT = gpt2_tokenizer(), smollm2_tokenizer()
SOURCE_KEYS = "valid prompt keys are ['prompt'] and the valid response keys are ['completion', 'response']. For chat finetuning, the allowed keys are ['messages']."
MISCONFIGURED = 'is misconfigured. Please check your dataset format and make sure you can load your dataset locally. Reason: '


def load(dataset: dict[str, Any], tokenizer: Any = GPT2, device_batch_size: int = 1, **arguments: Any) -> list[Any]:
    """All batches of a loader; ``...`` removes a key of the block."""
    reads_hf = 'hf_name' in dataset or 'hf_kwargs' in dataset or 'name' in dataset
    block = {'max_seq_len': 64, 'decoder_only_format': True, 'shuffle': False, **({'split': 'train'} if reads_hf else {'num_canonical_nodes': 1}), **dataset}
    block = {key: value for key, value in block.items() if value is not ...}
    arguments = {'num_workers': 0, 'prefetch_factor': None, 'persistent_workers': False, 'pin_memory': False, **arguments}
    return list(build_finetuning_dataloader(copy.deepcopy(tokenizer), device_batch_size, block, **arguments).dataloader)


def file_of(folder: Path, content: bytes, extension: str = 'jsonl') -> str:
    path = folder / f'rows.{extension}'
    path.write_bytes(content)
    return str(path)


def json_source(folder: Path, rows: list[Any]) -> tuple[dict[str, Any], str]:
    path = file_of(folder, ''.join(json.dumps(row) + '\n' for row in rows).encode())
    return {'hf_name': 'json', 'hf_kwargs': {'data_files': {'train': path}}}, path


def check(run: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error) as e:
        run()
    assert type(e.value) is error and str(e.value) == text


def config_error(*problems: str) -> tuple[type[Exception], str]:
    head = f'{len(problems)} problem{"s" if len(problems) > 1 else ""} in the config:'
    return errors.ConfigError, '\n'.join([head, *(f'  {problem}' for problem in problems)])


def user(content: Any) -> dict[str, Any]:
    return {'role': 'user', 'content': content}


def assistant(content: Any) -> dict[str, Any]:
    return {'role': 'assistant', 'content': content}


# --- The dataset block -----------------------------------------------------------------------------------------------------------------------------------------------------

BLOCKS: dict[str, tuple[dict[str, Any], tuple[type[Exception], str]]] = {
    'no split': ({'split': ...}, (errors.MissingHuggingFaceURLSplitError, 'When using a HuggingFace dataset from a URL, you must set the `split` key in the dataset config.')),
    'no source': (
        {'hf_name': ..., 'hf_kwargs': ..., 'split': ...},
        config_error('dataset: needs a source: `hf_name` (Hugging Face, local files), `local` and `remote` (MDS shards) or `streams` (several of those), got none of them'),
    ),
    'two sources': (
        {'local': '/shards'},
        config_error('dataset.hf_name: cannot be set together with `local`: the data come either from Hugging Face datasets or from MDS shards. Delete one of them'),
    ),
    'streams and hf_name': (
        {'streams': {'a': {'local': '/shards'}}},
        config_error('dataset.streams: cannot be set together with `hf_name`: the data come either from Hugging Face datasets or from MDS shards. Delete one of them'),
    ),
    'remote without local': (
        {'hf_name': ..., 'hf_kwargs': ..., 'remote': 's3://bucket/shards'},
        config_error('dataset.remote: needs `local` too: the folder where the shards of s3://bucket/shards are kept'),
    ),
    'preprocessing of shards': (
        {'hf_name': ..., 'hf_kwargs': ..., 'local': '/shards', 'preprocessing_fn': 'tatsu-lab/alpaca'},
        config_error('dataset.preprocessing_fn: belongs to Hugging Face sources and cannot be set together with `local`. Preprocess when the shards are made, or delete the key'),
    ),
    'safe_load of shards': (
        {'hf_name': ..., 'hf_kwargs': ..., 'local': '/shards', 'safe_load': True},
        config_error('dataset.safe_load: belongs to Hugging Face sources and cannot be set together with `local`. Preprocess when the shards are made, or delete the key'),
    ),
    'no decoder_only_format': (
        {'decoder_only_format': ...},
        config_error('dataset.decoder_only_format: must be true (GPT-like models) or false (encoder-decoder models such as T5), but is missing'),
    ),
    'decoder_only_format null': (
        {'decoder_only_format': None},
        config_error('dataset.decoder_only_format: must be true (GPT-like models) or false (encoder-decoder models such as T5), got None'),
    ),
    'no shuffle': ({'shuffle': ...}, config_error('dataset.shuffle: is missing: true (the usual choice for training) or false')),
    'packing_ratio below 1': ({'packing_ratio': 0.5}, config_error('dataset.packing_ratio: must be at least 1 (one example in each row, which is no packing), got 0.5')),
    'packing_ratio word': ({'packing_ratio': 'full'}, config_error("dataset.packing_ratio: must be a number of examples per row of at least 1, or 'auto', got 'full'")),
    'packing of encoder-decoder rows': (
        {'packing_ratio': 2.0, 'decoder_only_format': False},
        (NotImplementedError, 'dataset.packing_ratio: encoder-decoder models cannot be trained on packed rows. Delete the key'),
    ),
    'leftovers negative': ({'packing_ratio': 2.0, 'max_leftover_bins_to_keep': -1}, config_error('dataset.max_leftover_bins_to_keep: must be a whole number of at least 0, got -1')),
    'leftovers without packing': ({'max_leftover_bins_to_keep': 1}, config_error('dataset.max_leftover_bins_to_keep: has a meaning only with `packing_ratio`. Delete the key, or set packing_ratio')),
    'target_prompts': ({'target_prompts': 'some'}, config_error("dataset.target_prompts: must be 'none', 'all' or 'length>=N' with a positive whole number N, got 'some'")),
    'target_prompts length': ({'target_prompts': 'length>=0'}, config_error("dataset.target_prompts: must be 'none', 'all' or 'length>=N' with a positive whole number N, got 'length>=0'")),
    'target_responses': ({'target_responses': 'none'}, config_error("dataset.target_responses: must be 'last' or 'all', got 'none'")),
    'encoder-decoder targets': (
        {'decoder_only_format': False, 'target_responses': 'all'},
        config_error(
            "dataset.decoder_only_format: encoder-decoder models train the last response only: with false, target_prompts must be 'none' and target_responses 'last', got 'none' and 'all'"
        ),
    ),
    'max_seq_len': ({'max_seq_len': '2k'}, config_error("dataset.max_seq_len: must be a whole number of tokens of at least 1, got '2k'")),
    'misspelt key': ({'packing_ration': 2.0}, config_error("dataset.packing_ration: unknown key (did you mean 'packing_ratio'?)")),
    'hf_kwargs': ({'hf_kwargs': 'train.jsonl'}, config_error("dataset.hf_kwargs: expected a mapping of arguments of load_dataset such as {data_dir: ...}, got 'train.jsonl'")),
    'two mistakes at once': (
        {'max_seq_len': 0, 'target_responses': 'first'},
        config_error('dataset.max_seq_len: must be a whole number of tokens of at least 1, got 0', "dataset.target_responses: must be 'last' or 'all', got 'first'"),
    ),
    'preprocessing_fn number': ({'preprocessing_fn': 3}, config_error('dataset.preprocessing_fn: expected a registered name, module:function, or {prompt: column, response: column}, got 3')),
    'name and hf_name': ({'name': 'x'}, config_error('dataset.name: is the older spelling of `hf_name` and `preprocessing_fn` in one; with `hf_name`, use `preprocessing_fn`')),
    'sequence parallelism': ({'seq_parallel_replication': 2}, config_error('dataset.seq_parallel_replication: sequence parallelism is not supported: must be 1, got 2. Leave it out')),
}


@pytest.mark.parametrize('case', BLOCKS)
def test_blocks(case: str, tmp_path: Path) -> None:
    changes, (error, text) = BLOCKS[case]
    source, _ = json_source(tmp_path, [GOOD])
    check(lambda: load({**source, **changes}), error, text)


# --- Rows -------------------------------------------------------------------------------------------------------------------------------------------------------------------

ROWS: dict[str, tuple[list[Any], type[Exception], str]] = {
    'missing column': ([GOOD | {'response': ...}, {'prompt': 'a', 'answer': 'b'}][1:], errors.UnknownExampleTypeError, f"{{row}}: Found keys ['answer', 'prompt'] in dataset. Unknown example type. For prompt and response finetuning, the {SOURCE_KEYS}"),
    'extra column': ([GOOD | {'id': 7}], errors.UnknownExampleTypeError, f"{{row}}: Found keys ['id', 'prompt', 'response'] in dataset. Unknown example type. For prompt and response finetuning, the {SOURCE_KEYS}"),
    'response and completion': ([GOOD | {'completion': 'c'}], errors.UnknownExampleTypeError, f"{{row}}: Found keys ['completion', 'prompt', 'response'] in dataset. Unknown example type. For prompt and response finetuning, the {SOURCE_KEYS}"),
    'prompt is a number': ([{'prompt': 5, 'response': 'b'}], errors.InvalidPromptTypeError, "{row}: Expected prompt to be a string, but found <class 'int'>"),
    'response is null': ([GOOD, GOOD, {'prompt': 'a', 'response': None}], errors.InvalidResponseTypeError, "{row 2}: Expected response to be a string, but found <class 'NoneType'>"),
    'every response empty': ([{'prompt': 'a', 'response': ''}] * 3, errors.InvalidDatasetError, 'The dataset {source} cannot be used: all 3 rows were dropped: 3 with an empty response.'),
    'every prompt empty': ([{'prompt': '', 'response': 'b'}] * 2, errors.InvalidDatasetError, 'The dataset {source} cannot be used: all 2 rows were dropped: 2 with an empty prompt.'),
    'huge prompt': ([{'prompt': 'word ' * 5000, 'response': 'b'}], errors.InvalidDatasetError, 'The dataset {source} cannot be used: all 1 rows were dropped: 1 without a token to train in the first 64.'),
    'messages is text': ([{'messages': 'hi'}], errors.InvalidMessageTypeError, "{row}: Expected message to be a Mapping, but found <class 'str'>"),
    'messages are texts': ([{'messages': ['a', 'b']}], errors.InvalidMessageTypeError, "{row}: Expected message to be a Mapping, but found <class 'str'>"),
    'one message': ([{'messages': [user('a')]}], errors.NotEnoughChatDataError, '{row}: Chat example must have at least two messages'),
    'user has the last word': ([{'messages': [user('a'), assistant('b'), user('c')]}], errors.InvalidLastChatMessageRoleError, "{row}: Last message role must be one of ['assistant'], but got user"),
    'role twice': ([{'messages': [user('a'), user('b'), assistant('c')]}], errors.ConsecutiveRepeatedChatRolesError, '{row}: Conversation roles must alternate but found user repeated consecutively.'),
    'unknown role': ([{'messages': [{'role': 'human', 'content': 'a'}, assistant('b')]}], errors.InvalidRoleError, "{row}: Expected role to be one of ['assistant', 'system', 'tool', 'user'] but found: human"),
    'third key in a message': ([{'messages': [user('a') | {'name': 'z'}, assistant('b') | {'name': 'y'}]}], errors.IncorrectMessageKeyQuantityError, "{row}: Expected 2 keys in message, but found 3 keys: ['role', 'content', 'name']"),
    'message without content': ([{'messages': [{'role': 'user'}, {'role': 'assistant'}]}], errors.UnknownExampleTypeError, f"{{row}}: Found keys ['role'] in dataset. Unknown example type. For prompt and response finetuning, the {SOURCE_KEYS}"),
    'content is a number': ([{'messages': [user(3), assistant(4)]}], errors.InvalidContentTypeError, "{row}: Expected content to be a string or a list, but found <class 'int'>"),
    'content is null': ([{'messages': [user(None), assistant('b')]}], errors.InvalidContentTypeError, "{row}: Expected content to be a string or a list, but found <class 'NoneType'>"),
    'labels shifted': ([{'input_ids': [1, 2, 3], 'labels': [-100, 3, 4]}], errors.DataError, '{row}: ValueError: labels[1] is 3, but must be -100 or input_ids[1], which is 2: labels are not shifted, the model does that'),
    'labels all masked': ([{'input_ids': [1, 2], 'labels': [-100, -100]}], errors.InvalidDatasetError, 'The dataset {source} cannot be used: all 1 rows were dropped: 1 without a token to train in the first 64.'),
}


@pytest.mark.parametrize('case', ROWS)
def test_rows(case: str, tmp_path: Path) -> None:
    rows, error, text = ROWS[case]
    source, path = json_source(tmp_path, rows)
    place = f'{path} [train], row '
    text = text.replace('{row}', f'{place}0').replace('{row 2}', f'{place}2').replace('{source}', f'{path} [train]')
    check(lambda: load(source, CHAT), error, text)


def test_drop_last_leaves_no_batch(tmp_path: Path) -> None:
    source, _ = json_source(tmp_path, [GOOD])
    text = (
        'Your dataset (name=json, split=train) has 1 samples, but your minimum batch size is 4 because you are running on 1 gpus and your per device batch size is 4. '
        'Please increase the number of samples in your dataset to at least 4.'
    )
    check(lambda: load(source, device_batch_size=4, drop_last=True), errors.NotEnoughDatasetSamplesError, text)


# --- Files ------------------------------------------------------------------------------------------------------------------------------------------------------------------

FILES: dict[str, tuple[bytes, str, type[Exception], str]] = {
    'line is cut off': (b'{"prompt": "a", "response": "b"}\n{"prompt": "a", "resp\n', 'jsonl', errors.MisconfiguredHfDatasetError, '{json} {file}:2: not JSON (Unterminated string starting at column 17): {"prompt": "a", "resp'),
    'not JSON': (b'hello\n', 'jsonl', errors.MisconfiguredHfDatasetError, '{json} {file}:1: not JSON (Expecting value at column 1): hello'),
    'not UTF-8': (b'{"prompt": "caf\xe9", "response": "b"}\n', 'jsonl', errors.DataError, '{file} [train], row 0: not UTF-8 (byte 0xe9 at byte 3 of a value). Re-encode the file'),
    'empty': (b'', 'jsonl', errors.MisconfiguredHfDatasetError, '{json} {file} is empty'),
    'blank lines': (b'\n\n', 'jsonl', errors.InvalidDatasetError, 'The dataset {file} [train] cannot be used: it has no rows.'),
    'array is cut off': (b'[{"prompt": "a",\n "response": "b"},', 'json', errors.MisconfiguredHfDatasetError, '{json} {file}:2: not JSON (Expecting value at column 19)'),
    'empty csv': (b'', 'csv', errors.MisconfiguredHfDatasetError, '{json} {file} is empty'),
    'no parquet': (b'prompt', 'parquet', errors.MisconfiguredHfDatasetError, "{json} Failed to read schema from '{file}' with error ArrowInvalid: Parquet file size is 6 bytes, smaller than the minimum file footer (8 bytes)"),
    'bad extension': (b'{}', 'xlsx', errors.MisconfiguredHfDatasetError, '{json} the name of the file does not tell what it holds: it must end with one of .csv, .json, .jsonl, .parquet, .arrow. Rename it, or give hf_name: json (or csv, parquet) and the file as hf_kwargs.data_files'),
}


@pytest.mark.parametrize('case', FILES)
def test_files(case: str, tmp_path: Path) -> None:
    content, extension, error, text = FILES[case]
    path = file_of(tmp_path, content, extension)
    text = text.replace('{json}', f'Your dataset (name={path}, split=train) {MISCONFIGURED}'.rstrip()).replace('{file}', path)
    check(lambda: load({'hf_name': path}), error, text)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    looked = 'Could not find a finetuning file. Looked for: '
    missing = f'{tmp_path}/nothing.jsonl'
    check(lambda: load({'hf_name': 'json', 'hf_kwargs': {'data_files': missing}}), errors.FinetuningFileNotFoundError, f'{looked}{missing}.')
    check(lambda: load({'hf_name': f'{tmp_path}/folder'}), errors.FinetuningFileNotFoundError, f'{looked}{tmp_path}/folder.')
    uris = ', '.join(f'memory://nothing/train.{extension}' for extension in ('csv', 'json', 'jsonl', 'parquet'))
    check(lambda: load({'hf_name': 'memory://nothing'}), errors.FinetuningFileNotFoundError, f'{looked}{uris}.')


def test_safe_load_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / 'loader.py').write_text('print("code")')
    file_of(tmp_path, json.dumps(GOOD).encode())
    text = f"safe_load is set to True. No data files with safe extensions ['.csv', '.json', '.jsonl', '.parquet'] found for dataset at local path {tmp_path}."
    check(lambda: load({'hf_name': str(tmp_path), 'safe_load': True}), errors.InvalidFileExtensionError, text)


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    source, path = json_source(tmp_path, [GOOD])
    check(lambda: load({**source, 'split': 'test'}), ValueError, f'{path} [test]: Unknown split "test". Should be one of [\'train\'].')


def test_no_tokenizer() -> None:
    text = 'tokenizer: the finetuning loader needs one: add tokenizer.name, for example llmfoundry://gpt2, or a Hugging Face name; got None'
    check(lambda: load({'hf_name': 'json'}, None), *config_error(text))


# --- Preprocessing functions ------------------------------------------------------------------------------------------------------------------------------------------------


def stops_at_17(row: dict[str, Any]) -> dict[str, Any]:
    if row['prompt'] == '17':
        raise RuntimeError('no seventeen')
    return row


def returns_nothing(row: dict[str, Any]) -> None:
    return None


HERE = 'tests.data.finetuning.test_bad_inputs'
IMPORT = '1 problem in the config:\n  dataset.preprocessing_fn: Failed to import preprocessing function from string = '
FUNCTIONS: dict[str, tuple[Any, type[Exception], str]] = {
    'no such module': ('nope:fn', errors.ConfigError, f"{IMPORT}nope:fn. ModuleNotFoundError: No module named 'nope'. Folders searched: the installed packages and {{cwd}}"),
    'no such function': (f'{HERE}:nope', errors.ConfigError, f"{IMPORT}{HERE}:nope. AttributeError: module '{HERE}' has no attribute 'nope'. Folders searched: the installed packages and {{cwd}}"),
    'not a function': ('json:__doc__', errors.ConfigError, f"{IMPORT}json:__doc__. '__doc__' is a str, not a function"),
    'raises at row 17': (f'{HERE}:stops_at_17', errors.UnableToProcessPromptResponseError, f"{{row 17}}: Unable to extract prompt/response from {{'prompt': '17', 'response': 'b'}}: {HERE}:stops_at_17 raised RuntimeError: no seventeen"),
    'returns nothing': (f'{HERE}:returns_nothing', errors.InvalidExampleTypeError, "{row 0}: Expected example to be a Mapping, but found <class 'NoneType'>"),
    'preset of another data set': ('tatsu-lab/alpaca', errors.UnableToProcessPromptResponseError, "{row 0}: Unable to extract prompt/response from {'prompt': '0', 'response': 'b'}"),
    'map in another order': (
        {'response': 'response', 'prompt': 'prompt'},
        errors.InvalidPromptResponseKeysError,
        "{row 0}: Expected mapping={'response': 'response', 'prompt': 'prompt'} to have keys \"prompt\" and \"response\", in this order, for example={'prompt': '0', 'response': 'b'}.",
    ),
    'map of a column that is not there': (
        {'prompt': 'prompt', 'response': 'answer'},
        errors.UnableToProcessPromptResponseError,
        "{row 0}: Unable to extract prompt/response from {'prompt': '0', 'response': 'b'}: preprocessing_fn names the column 'answer', but the columns are ['prompt', 'response']",
    ),
}


@pytest.mark.parametrize('case', FUNCTIONS)
def test_preprocessing_functions(case: str, tmp_path: Path) -> None:
    function, error, text = FUNCTIONS[case]
    source, path = json_source(tmp_path, [{'prompt': str(i), 'response': 'b'} for i in range(30)])
    for row in (0, 17):
        text = text.replace(f'{{row {row}}}', f'{path} [train], row {row}')
    check(lambda: load({**source, 'preprocessing_fn': function}), error, text.replace('{cwd}', str(Path.cwd())))


def test_a_name_that_is_nearly_registered(tmp_path: Path) -> None:
    source, path = json_source(tmp_path, [GOOD])
    with pytest.raises(ValueError) as e:
        load({**source, 'preprocessing_fn': 'tatsu-lab/alpaka'})
    assert str(e.value).startswith(f"{IMPORT}tatsu-lab/alpaka. Did you mean 'tatsu-lab/alpaca'? It is not registered, and an import path has the form package.module:function. Registered: AI-MO")
    with pytest.raises(errors.ConfigError) as e:
        load({'name': 'my-task', 'kwargs': {'data_files': {'train': path}}})
    assert "dataset.name: no preprocessing function is registered as 'my-task'. Register one, or if the rows hold prompt and response already, use `hf_name`. Registered: AI-MO" in str(e.value)


# --- Chat templates ---------------------------------------------------------------------------------------------------------------------------------------------------------

CONVERSATION = [user('a'), assistant('b'), user('c'), assistant('d')]
FAILED = f'{{row}}: Failed to process sample {CONVERSATION} with template '
REMEDY = 'Give a template that keeps what it rendered as tokenizer.kwargs.chat_template, or make one example of each answer.'
TEMPLATES: dict[str, tuple[str, type[Exception], str]] = {
    'raises': ("{{ raise_exception('no way') }}", errors.ChatTemplateError, f"{FAILED}{{{{ raise_exception('no way') }}}}. no way"),
    'syntax': ('{% for m in messages %}', errors.ChatTemplateError, f'{FAILED}{{% for m in messages %}}. '),
    'rewrites earlier turns': (
        "{{ messages[-1]['content'] }}{% if add_generation_prompt %}{% endif %}",
        errors.InvalidConversationError,
        "{row}: Invalid conversation: the prompt before message 1, with the generation prompt, must be the first part of the conversation with that message. Prompt: 'a'. Conversation: 'b'. " + REMEDY,
    ),
    'generation prompt is not what it trains': (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}GO{% endif %}",
        errors.InvalidConversationError,
        "{row}: Invalid conversation: the prompt before message 1, with the generation prompt, must be the first part of the conversation with that message. Prompt: 'aGO'. Conversation: 'ab'. " + REMEDY,
    ),
    'leaves the answers out': (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
        errors.ChatTemplateError,
        f"{FAILED}{{% for m in messages %}}{{% if m['role'] == 'user' %}}{{{{ m['content'] }}}}{{% endif %}}{{% endfor %}}. "
        "It leaves out the content of message 1: 'b' became ''. It may want content as a list: [{\"type\": \"text\", \"text\": ...}]",
    ),
}


@pytest.mark.parametrize('case', TEMPLATES)
def test_templates(case: str, tmp_path: Path) -> None:
    template, error, text = TEMPLATES[case]
    source, path = json_source(tmp_path, [{'messages': CONVERSATION}])
    tokenizer = copy.deepcopy(CHAT)
    tokenizer.chat_template = template
    with pytest.raises(error) as e:
        load(source, tokenizer)
    text = text.replace('{row}', f'{path} [train], row 0')
    # The text of a syntax error is Jinja's own.
    assert type(e.value) is error and (str(e.value) == text if case != 'syntax' else str(e.value).startswith(text) and len(str(e.value)) > len(text))


def test_a_tokenizer_without_template_gets_chatml(tmp_path: Path) -> None:
    """Not an error: the template that public chat models without one are trained with."""
    source, _ = json_source(tmp_path, [{'messages': CONVERSATION}])
    [batch] = load({**source, 'max_seq_len': 256}, GPT2)
    assert GPT2.decode(batch['input_ids'][0][batch['attention_mask'][0] == 1]).startswith('<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb')


# --- Shards -----------------------------------------------------------------------------------------------------------------------------------------------------------------

_FOLDERS = count()
IDS = {'input_ids': 'ndarray:int64', 'labels': 'ndarray:int64'}
TEXT = {'prompt': 'str', 'response': 'str'}
COLUMNS = '{folder}/index.json: the columns are {columns}, but a finetuning dataset needs `turns`, `input_ids` and `labels`, `prompt` and `response`, or `messages`. Convert the data with a preprocessor that returns one of these'
SHARDS: dict[str, tuple[dict[str, str], dict[str, Any], type[Exception], str]] = {
    'unknown columns': ({'text': 'str'}, {'text': 'a'}, errors.DataError, COLUMNS.replace('{columns}', 'text')),
    'columns of pre-training': ({'tokens': 'ndarray:int32'}, {'tokens': np.zeros(4, np.int32)}, errors.DataError, COLUMNS.replace('{columns}', 'tokens')),
    'bytes of another type': ({'input_ids': 'bytes', 'labels': 'bytes'}, {'input_ids': b'abc', 'labels': b'abc'}, errors.DataError, '{sample}: input_ids: 3 bytes are not whole int64 ids. Set token_encoding_type to the type that the data were written with'),
    'ids of another tokenizer': (IDS, {'input_ids': np.array([99999999]), 'labels': np.array([1])}, errors.DataError, '{sample}: input_ids: token id 99999999 is outside the 50257 ids of the tokenizer. Use the tokenizer that the data were prepared with'),
    'ids are text': ({'input_ids': 'str', 'labels': 'str'}, {'input_ids': 'abc', 'labels': 'd'}, errors.DataError, '{sample}: input_ids: expected ids as bytes, ndarray or list, got str'),
    'turns is a mapping': ({'turns': 'json'}, {'turns': {'a': 1}}, errors.DataError, "{sample}: turns: expected a list of turns with input_ids and labels, got {'a': 1}"),
    'turn without labels': ({'turns': 'json'}, {'turns': [{'input_ids': [1]}]}, errors.DataError, "{sample}: turns: expected a list of turns with input_ids and labels, got [{'input_ids': [1]}]"),
    'turns are broken JSON': ({'turns': 'str'}, {'turns': '[bad'}, errors.DataError, '{sample}: turns: not JSON (Expecting value: line 1 column 2 (char 1)): [bad'),
    'messages are broken JSON': ({'messages': 'str'}, {'messages': '[bad'}, errors.DataError, '{sample}: messages: not JSON (Expecting value: line 1 column 2 (char 1)): [bad'),
    'unknown role': ({'messages': 'json'}, {'messages': [{'role': 'x', 'content': 'a'}, assistant('b')]}, errors.InvalidRoleError, "{sample}: Expected role to be one of ['assistant', 'system', 'tool', 'user'] but found: x"),
}


def write_shards(folder: Path, columns: dict[str, str], sample: dict[str, Any], samples: int = 2) -> str:
    from streaming import MDSWriter

    out = folder / f'shards{next(_FOLDERS)}'
    with MDSWriter(columns=columns, out=str(out)) as writer:
        for _ in range(samples):
            writer.write(sample)
    return str(out)


@pytest.mark.parametrize('case', SHARDS)
def test_shards(case: str, tmp_path: Path) -> None:
    columns, sample, error, text = SHARDS[case]
    folder = write_shards(tmp_path, columns, sample)
    with pytest.raises(error) as e:
        load({'local': folder})
    assert str(e.value) == text.replace('{folder}', folder).replace('{sample}', f'{folder}/shard.00000.mds (sample 0)')


def test_shards_that_are_not_there_or_too_few(tmp_path: Path) -> None:
    nowhere, folder = f'{tmp_path}/nowhere', write_shards(tmp_path, TEXT, GOOD)
    check(
        lambda: load({'local': nowhere}), errors.DataError,
        f'{nowhere}: no such folder, and no `remote` to stream from. Give the folder that the data preparation wrote as `local`, or set `remote`',
    )  # fmt: skip
    check(
        lambda: load({'local': folder, 'num_canonical_nodes': 8}), errors.DatasetTooSmallError,
        'Dataset is too small: it has 2 samples, fewer than 8 num_canonical_nodes. Add data, or lower num_canonical_nodes',
    )  # fmt: skip
    (Path(folder) / 'shard.00000.mds').write_bytes(b'cut off')
    with pytest.raises(errors.DataError, match=r'shard.00000.mds is truncated: 7 bytes, but the index says \d+. Copy these files again, or run the data preparation again$'):
        load({'local': folder})


# --- Adapters and commands --------------------------------------------------------------------------------------------------------------------------------------------------


def test_an_adapter_for_another_base_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from llmfoundry.command_utils.merge_adapter import main
    from tests.helpers.tiny_hf import save_model

    base, other = save_model(tmp_path / 'base', 'llama'), save_model(tmp_path / 'other', 'llama', hidden_size=32)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type='CAUSAL_LM', r=2, target_modules=['q_proj']))
    adapted.save_pretrained(tmp_path / 'adapter')
    capsys.readouterr()
    assert main([other, str(tmp_path / 'adapter'), str(tmp_path / 'out')]) == 1
    assert capsys.readouterr().err == (
        f"AdapterMismatchError: The adapter '{tmp_path}/adapter' was made for another base model: it names '{base}', and would be merged into '{other}'. "
        'Give that base model, or pass --any_base if the two are the same model under different names.\n'
    )
    assert not (tmp_path / 'out').exists()


def test_number_of_bad_inputs() -> None:
    assert sum(map(len, (BLOCKS, ROWS, FILES, FUNCTIONS, TEMPLATES, SHARDS))) >= 75
