"""Every rule of a finetuning ``dataset`` block with its exact text, and what a valid block means."""

from __future__ import annotations

from typing import Any

import pytest

from llmfoundry.data.finetuning.dataset_block import FinetuningDataBlock, asks_for_packing, normalise, problems, unknown_keys

HF = {'hf_name': 'json', 'split': 'train', 'shuffle': True, 'decoder_only_format': True}
MDS = {'local': '/data', 'split': 'train', 'decoder_only_format': True}
STREAMING_KEYS = ('local', 'remote', 'split', 'shuffle', 'shuffle_seed', 'shuffle_algo', 'predownload', 'cache_limit', 'batch_size', 'streams', 'replication')

WRONG: list[tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]] = [
    ({}, {'decoder_only_format': True}, [('', 'needs a source: `hf_name` (Hugging Face, local files), `local` and `remote` (MDS shards) or `streams` (several of those), got none of them')]),
    (HF, {'local': '/data'}, [('hf_name', 'cannot be set together with `local`: the data come either from Hugging Face datasets or from MDS shards. Delete one of them')]),
    (MDS, {'streams': {'a': {'local': 'x'}}}, [('streams', 'cannot be set together with `local`; put `local` into each stream')]),
    (HF, {'streams': {'a': {'local': 'x'}}}, [('streams', 'cannot be set together with `hf_name`: the data come either from Hugging Face datasets or from MDS shards. Delete one of them')]),
    (HF, {'name': 'x'}, [('name', 'is the older spelling of `hf_name` and `preprocessing_fn` in one; with `hf_name`, use `preprocessing_fn`')]),
    (HF, {'kwargs': {}, 'hf_kwargs': {}}, [('kwargs', 'is the older spelling of `hf_kwargs`; give one of them')]),
    (HF, {'hf_kwargs': 'x.jsonl'}, [('hf_kwargs', "expected a mapping of arguments of load_dataset such as {data_dir: ...}, got 'x.jsonl'")]),
    (HF, {'preprocessing_fn': 3}, [('preprocessing_fn', 'expected a registered name, module:function, or {prompt: column, response: column}, got 3')]),
    (HF, {'split': None}, [('split', 'is missing: the split of the Hugging Face dataset, for local files usually `train`')]),
    (HF, {'shuffle': None}, [('shuffle', 'is missing: true (the usual choice for training) or false')]),
    (MDS, {'preprocessing_fn': 'a:b'}, [('preprocessing_fn', 'belongs to Hugging Face sources and cannot be set together with `local`. Preprocess when the shards are made, or delete the key')]),
    (MDS, {'safe_load': True}, [('safe_load', 'belongs to Hugging Face sources and cannot be set together with `local`. Preprocess when the shards are made, or delete the key')]),
    (MDS, {'local': None, 'remote': 's3://b'}, [('remote', 'needs `local` too: the folder where the shards of s3://b are kept')]),
    (MDS, {'local': None, 'streams': ['a']}, [('streams', "expected a mapping of stream names to their settings, got ['a']")]),
    (MDS, {'token_encoding_type': 'float32'}, [('token_encoding_type', "must be one of int8, int16, int32, int64, uint8, uint16, uint32, uint64, got 'float32'")]),
    (HF, {'max_seq_len': 0}, [('max_seq_len', 'must be a whole number of tokens of at least 1, got 0')]),
    (HF, {'max_seq_len': 12.5}, [('max_seq_len', 'must be a whole number of tokens of at least 1, got 12.5')]),
    (HF, {'decoder_only_format': None}, [('decoder_only_format', 'must be true (GPT-like models) or false (encoder-decoder models such as T5), got None')]),
    (HF, {'target_prompts': 'length>=0'}, [('target_prompts', "must be 'none', 'all' or 'length>=N' with a positive whole number N, got 'length>=0'")]),
    (HF, {'target_responses': 'first'}, [('target_responses', "must be 'last' or 'all', got 'first'")]),
    (HF, {'decoder_only_format': False, 'target_prompts': 'all'}, [
        ('decoder_only_format', "encoder-decoder models train the last response only: with false, target_prompts must be 'none' and target_responses 'last', got 'all' and 'last'"),
    ]),
    (HF, {'packing': 3}, [('packing', 'must be true or false, got 3. A number of examples per row is `packing_ratio`')]),
    (HF, {'packing_ratio': 'max'}, [('packing_ratio', "must be a number of examples per row of at least 1, or 'auto', got 'max'")]),
    (HF, {'packing_ratio': True}, [('packing_ratio', "must be a number of examples per row of at least 1, or 'auto', got True")]),
    (HF, {'packing_ratio': 0.5}, [('packing_ratio', 'must be at least 1 (one example in each row, which is no packing), got 0.5')]),
    (HF, {'packing_ratio': float('nan')}, [('packing_ratio', 'must be at least 1 (one example in each row, which is no packing), got nan')]),
    (HF, {'packing': True, 'packing_ratio': 3}, [('packing_ratio', 'cannot be set together with `packing: true`, which fills rows as far as possible. Delete one of them')]),
    (HF, {'packing': False, 'packing_ratio': 'auto'}, [('packing_ratio', "is 'auto', but `packing` is false. Delete one of them")]),
    (HF, {'packing': True, 'decoder_only_format': False}, [('packing', 'encoder-decoder models cannot be trained on packed rows. Delete the key')]),
    (HF, {'packing_ratio': 2, 'max_leftover_bins_to_keep': -1}, [('max_leftover_bins_to_keep', 'must be a whole number of at least 0, got -1')]),
    (HF, {'max_leftover_bins_to_keep': 2}, [('max_leftover_bins_to_keep', 'has a meaning only with `packing_ratio`. Delete the key, or set packing_ratio')]),
    (HF, {'pad_to_longest': 'yes'}, [('pad_to_longest', "must be true or false, got 'yes'")]),
    (HF, {'seq_parallel_replication': 2}, [('seq_parallel_replication', 'sequence parallelism is not supported: must be 1, got 2. Leave it out')]),
    (HF, {'packing_ration': 2}, [('packing_ration', "unknown key (did you mean 'packing_ratio'?)")]),
    (HF, {'max_seq_length': 2048}, [('max_seq_length', "unknown key (did you mean 'max_seq_len'?)")]),
    (HF, {'tokenizer': 'x'}, [('tokenizer', 'is set by the trainer; delete the key')]),
    ({**HF, 'shuffle': None}, {'shufle': True}, [('shufle', "unknown key (did you mean 'shuffle'?)")]),
    ({}, {'decoder_only_format': None, 'max_seq_len': 'x'}, [
        ('', 'needs a source: `hf_name` (Hugging Face, local files), `local` and `remote` (MDS shards) or `streams` (several of those), got none of them'),
        ('max_seq_len', "must be a whole number of tokens of at least 1, got 'x'"),
        ('decoder_only_format', 'must be true (GPT-like models) or false (encoder-decoder models such as T5), got None'),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(('base', 'change', 'expected'), WRONG, ids=[str(change) for _, change, _ in WRONG])
def test_what_is_wrong_is_said_exactly(base: dict[str, Any], change: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    block = {**base, **change}
    if 'shufle' in change:
        del block['shuffle']
    assert problems(block, STREAMING_KEYS) == expected


@pytest.mark.parametrize('block', [
    HF, MDS, {**MDS, 'remote': 's3://b', 'predownload': 8, 'shuffle_algo': 'py1e'}, {'streams': {'a': {'local': 'x'}}, 'decoder_only_format': True},
    {**HF, 'packing': True}, {**HF, 'packing_ratio': 'auto', 'max_leftover_bins_to_keep': 0}, {**HF, 'packing_ratio': 1, 'packing': False}, {**HF, 'decoder_only_format': False, 'packing_ratio': 1.0},
    {**HF, 'packing': True, 'packing_ratio': 'auto'}, {**HF, 'max_seq_len': 1e3, 'target_prompts': 'Length>=3', 'target_responses': 'ALL', 'seq_parallel_replication': 1},
    {'name': 'task', 'kwargs': {'data_files': {'train': 'x.jsonl'}}, 'split': 'train', 'shuffle': False, 'decoder_only_format': True},
    {'name': 'task', 'local': '/data', 'decoder_only_format': True},
])  # fmt: skip
def test_valid_blocks(block: dict[str, Any]) -> None:
    assert problems(block, STREAMING_KEYS) == []


def test_keys_that_resemble_nothing_are_only_worth_a_warning() -> None:
    assert unknown_keys({**HF, 'my_plugin_setting': 1, 'replication': None}, STREAMING_KEYS) == ([], ['my_plugin_setting'])


@pytest.mark.parametrize(('settings', 'expected'), [
    ({}, None), ({'packing': False}, None), ({'packing_ratio': 1}, None), ({'packing_ratio': 1.0}, None), ({'packing': True}, 'full'), ({'packing_ratio': 'auto'}, 'full'), ({'packing_ratio': 2.5}, 2.5),
])  # fmt: skip
def test_packing_settings(settings: dict[str, Any], expected: Any) -> None:
    assert normalise({**HF, **settings}).packing == expected
    assert asks_for_packing(settings) == (expected is not None)


def test_streaming_arguments_are_passed_on_and_nothing_else() -> None:
    block = normalise({**MDS, 'remote': 's3://b', 'predownload': 8, 'max_seq_len': 64, 'packing_ratio': 'auto', 'pad_to_longest': True, 'shuffle_seed': 3, 'shuffle': True})
    assert block.is_streaming and block.packing == 'auto' and block.hf_name is None
    assert block.streaming == {'local': '/data', 'remote': 's3://b', 'split': 'train', 'predownload': 8, 'shuffle_seed': 3, 'shuffle': True}


def document_000(name: str, **settings: Any) -> FinetuningDataBlock:
    block = {'name': name, 'split': 'train', 'shuffle': True, 'decoder_only_format': True, **settings}
    assert problems(block) == []
    return normalise(block, registered=('my-task', 'tatsu-lab/alpaca'))


@pytest.mark.parametrize(('files', 'reader'), [
    ({'train': '/path/to/train.jsonl'}, 'json'), (['a.csv', 'b.csv'], 'csv'), ({'train': ['x.parquet']}, 'parquet'), ('x.json.gz', 'json'), ('x.arrow', 'arrow'),
])  # fmt: skip
def test_document_000_reads_local_files_through_the_registered_function(files: Any, reader: str) -> None:
    block = document_000('my-task', kwargs={'data_files': files})
    assert (block.hf_name, block.preprocessing_fn, block.hf_kwargs) == (reader, 'my-task', {'data_files': files})


def test_document_000_names_a_data_set_of_the_hub() -> None:
    assert (document_000('tatsu-lab/alpaca').hf_name, document_000('tatsu-lab/alpaca').preprocessing_fn) == ('tatsu-lab/alpaca', 'tatsu-lab/alpaca')
    assert (document_000('some/data').hf_name, document_000('some/data').preprocessing_fn) == ('some/data', None)
    assert document_000('my-task', kwargs={'data_dir': '/x'}).hf_name == 'json'


def test_document_000_streams_with_the_registered_function() -> None:
    block = document_000('my-task', local='/x')
    assert block.is_streaming and block.preprocessing_fn == 'my-task' and 'name' not in block.streaming
