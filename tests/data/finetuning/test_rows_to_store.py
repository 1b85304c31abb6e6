"""From the rows of a data set to a token store: ids, filters, errors that name the row, the cache, and several ranks."""

from __future__ import annotations

import json
import logging
import os
import sys
import textwrap
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from llmfoundry.data.finetuning import hf_dataset, store_builder
from llmfoundry.data.finetuning.hf_dataset import TokenSettings, build_hf_dataset, build_token_store, encode_rows
from llmfoundry.data.finetuning.store import StorePlan
from llmfoundry.errors import (
    DataError,
    InvalidDatasetError,
    InvalidPromptTypeError,
    InvalidResponseTypeError,
    MisconfiguredHfDatasetError,
    MissingHuggingFaceURLSplitError,
    UnableToProcessPromptResponseError,
    UnknownExampleTypeError,
)
from llmfoundry.tokenizers import build_tokenizer
from tests.helpers.processes import run_in_processes

ROWS = [{'prompt': f'Question {i}?', 'response': f' Answer {i}.'} for i in range(30)]
EOS = 50256


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return str(path)


@pytest.fixture
def train(tmp_path) -> str:
    return write(tmp_path / 'train.jsonl', ROWS)


def expected_row(tokenizer: Any, row: dict[str, str]) -> tuple[list[int], list[bool]]:
    prompt, response = tokenizer(row['prompt'])['input_ids'], tokenizer(row['response'])['input_ids'] + [EOS]
    return prompt + response, [False] * len(prompt) + [True] * len(response)


def test_ids_targets_and_row_numbers(gpt2, train):
    store = build_token_store(gpt2, train, 'train')
    assert store.row_ids.tolist() == list(range(30))
    for i, row in enumerate(ROWS):
        ids, targets = store.row(i)
        assert (ids.tolist(), targets.tolist()) == expected_row(gpt2, row)


@pytest.mark.parametrize(
    ('settings', 'rows', 'kept', 'warning'),
    [
        ({}, [{'prompt': '', 'response': 'x'}, {'prompt': 'x', 'response': 'y'}], [1], 'dropped 1 of 2 examples: 1 with an empty prompt.'),
        (
            {}, [{'prompt': 'x', 'response': 'y'}, {'prompt': 'x', 'response': ''}, {'prompt': '', 'response': ''}], [0],
            'dropped 2 of 3 examples: 1 with an empty prompt, 1 with an empty response.',
        ),
        (
            {'max_seq_len': 4}, [{'prompt': 'a b c d', 'response': 'y'}, {'prompt': 'a b c', 'response': 'd e f'}], [1],
            'dropped 1 of 2 examples: 1 without a token to train in the first 4.',
        ),
        ({'max_seq_len': 4, 'target_prompts': 'all'}, [{'prompt': 'a b c d', 'response': 'y'}], [0], None),
    ],
)
def test_filters_count_what_they_drop(gpt2, tmp_path, settings, rows, kept, warning):
    path = write(tmp_path / 'train.jsonl', rows)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        store = build_token_store(gpt2, path, 'train', **settings)
    assert store.row_ids.tolist() == kept
    ours = [str(w.message) for w in caught if 'dropped' in str(w.message)]
    assert ours == ([] if warning is None else [f'{path} [train]: {warning}'])


def test_cut_rows_are_counted(gpt2, tmp_path, caplog):
    path = write(tmp_path / 'train.jsonl', [{'prompt': 'a b', 'response': ' c d e f g'}, {'prompt': 'a', 'response': ' b'}])
    with caplog.at_level(logging.WARNING):
        store = build_token_store(gpt2, path, 'train', max_seq_len=4)
    assert store.lengths.tolist() == [4, 3]
    assert (store.counts.truncated, store.counts.truncated_tokens) == (1, 4)
    assert '1 of 2 examples were cut at max_seq_len 4 and lost 4 tokens, 36.36 % of all' in caplog.text
    # A row that is cut does not end in EOS, one that fits does.
    assert store.row(0)[0].tolist()[-1] != EOS and store.row(1)[0].tolist()[-1] == EOS


def test_encoder_decoder_rows_keep_context_and_target_apart(gpt2, tmp_path):
    rows = [{'prompt': 'a b c d e f', 'response': ' g h'}]
    store = build_token_store(gpt2, write(tmp_path / 'train.jsonl', rows), 'train', max_seq_len=3, decoder_only_format=False)
    ids, targets = store.row(0)
    prompt, response = gpt2(rows[0]['prompt'])['input_ids'], gpt2(rows[0]['response'])['input_ids']
    assert ids[~targets].tolist() == prompt and ids[targets].tolist() == response
    assert targets.tolist() == sorted(targets.tolist())
    with pytest.raises(ValueError, match='encoder_decoder'):
        build_token_store(gpt2, str(tmp_path / 'train.jsonl'), 'train', target_prompts='all', decoder_only_format=False)


def test_nothing_left(gpt2, tmp_path):
    path = write(tmp_path / 'train.jsonl', [{'prompt': 'x', 'response': ''}] * 3)
    with pytest.raises(InvalidDatasetError, match=r'The dataset .*train.jsonl \[train\] cannot be used: all 3 rows were dropped: 3 with an empty response.'):
        build_token_store(gpt2, path, 'train')


def test_tokenised_rows_are_taken_as_they_are(gpt2, tmp_path):
    rows = [{'input_ids': [5, 6, 7], 'labels': [-100, 6, 7], 'full_text': 'abc'}, {'input_ids': [8, 9], 'labels': [-100, -100], 'full_text': 'd'}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / 'saved')
    with pytest.warns(UserWarning, match='dropped 1 of 2 examples: 1 without a token to train'):
        store = build_token_store(gpt2, str(tmp_path / 'saved'), 'train')
    assert store.row(0)[0].tolist() == [5, 6, 7] and store.row(0)[1].tolist() == [False, True, True]


def test_padding_of_tokenised_rows_is_left_out(gpt2, tmp_path):
    rows = [
        {'input_ids': [5, 6, 7, 0, 0], 'labels': [-100, 6, 7, -100, -100], 'attention_mask': [1, 1, 1, 0, 0]},
        {'input_ids': [0, 8, 9], 'labels': [-100, -100, 9], 'attention_mask': [0, 1, 1]},
    ]
    store = build_token_store(gpt2, write(tmp_path / 'train.jsonl', rows), 'train')
    assert [store.row(i)[0].tolist() for i in range(2)] == [[5, 6, 7], [8, 9]]
    assert [store.labels(i).tolist() for i in range(2)] == [[-100, 6, 7], [-100, 9]]


class TestErrorsNameTheRow:
    def fails_at(self, bad: int, error: Exception) -> Any:
        def prep(row: dict[str, str]) -> dict[str, str]:
            if row['prompt'] == f'Question {bad}?':
                raise error
            return row

        return prep

    def test_a_preprocessing_function_that_raises_at_row_17(self, gpt2, train):
        with pytest.raises(UnableToProcessPromptResponseError) as e:
            build_token_store(gpt2, train, 'train', preprocessing_fn=self.fails_at(17, KeyError('text')))
        assert str(e.value).startswith(f"{train} [train], row 17: Unable to extract prompt/response from {{'prompt': 'Question 17?', 'response': ' Answer 17.'}}")
        assert "raised KeyError: 'text'" in str(e.value) and e.value.row == 17

    def test_the_same_from_worker_processes(self, gpt2, train, monkeypatch):
        monkeypatch.setattr(hf_dataset, 'default_num_proc', lambda: 3)
        monkeypatch.setattr(StorePlan, 'for_rows', classmethod(lambda cls, rows, source, made_from=None: cls(rows, 10, source, made_from or {})))
        with pytest.raises(UnableToProcessPromptResponseError, match=r'train.jsonl \[train\], row 17: .*raised ZeroDivisionError: never'):
            build_token_store(gpt2, train, 'train', preprocessing_fn=self.fails_at(17, ZeroDivisionError('never')))

    def test_an_example_of_unknown_form(self, gpt2, tmp_path):
        path = write(tmp_path / 'train.jsonl', [{'question': 'x', 'answer': 'y'}])
        with pytest.raises(UnknownExampleTypeError, match=r'train.jsonl \[train\], row 0: '):
            build_token_store(gpt2, path, 'train')

    def test_a_response_that_is_no_text(self, gpt2, tmp_path):
        rows = [*ROWS[:17], {'prompt': 'x', 'response': None}]
        with pytest.raises(InvalidResponseTypeError, match=r'row 17: '):
            build_token_store(gpt2, write(tmp_path / 'train.jsonl', rows), 'train')

    def test_labels_that_are_shifted(self, gpt2, tmp_path):
        rows = [{'input_ids': [5, 6, 7], 'labels': [-100, 6, 7]}, {'input_ids': [5, 6, 7], 'labels': [6, 7, -100]}]
        with pytest.raises(DataError, match=r'train.jsonl \[train\], row 1: ValueError: labels\[0\] is 6'):
            build_token_store(gpt2, write(tmp_path / 'train.jsonl', rows), 'train')

    def test_rows_beyond_the_first_batch_count_from_the_start_of_the_data(self, gpt2, train, monkeypatch):
        monkeypatch.setattr(hf_dataset, '_BATCH_ROWS', 4)
        with pytest.raises(UnableToProcessPromptResponseError, match='row 17: '):
            build_token_store(gpt2, train, 'train', preprocessing_fn=self.fails_at(17, KeyError('text')))

    @pytest.mark.parametrize('form', ['folder', 'data_dir', 'list', 'mapping'])
    def test_the_file_of_several(self, gpt2, tmp_path, form):
        for name, rows in (('train-1', ROWS[:8]), ('train-2', [*ROWS[8:12], {'prompt': 5, 'response': 'x'}]), ('train-3', ROWS[12:])):
            datasets.Dataset.from_list([{k: json.dumps(v) for k, v in row.items()} for row in rows]).to_parquet(str(tmp_path / f'{name}.parquet'))
        files = [str(tmp_path / f'train-{i}.parquet') for i in (1, 2, 3)]
        hf_name = str(tmp_path) if form == 'folder' else 'parquet'
        kwargs = {'folder': {}, 'data_dir': {'data_dir': str(tmp_path)}, 'list': {'data_files': files}, 'mapping': {'data_files': {'train': files}}}[form]
        def prep(row: dict[str, str]) -> dict[str, Any]:
            return {'prompt': json.loads(row['prompt']), 'response': 'x'}

        with pytest.raises(InvalidPromptTypeError, match=rf'^{tmp_path}/train-2.parquet, row 4 \(row 12 of .* \[train\]\): Expected '):
            build_token_store(gpt2, hf_name, 'train', hf_kwargs=kwargs, preprocessing_fn=prep)

    def test_the_file_of_several_for_an_error_of_the_ids(self, gpt2, tmp_path):
        write(tmp_path / 'train-1.jsonl', [{'input_ids': [5, 6], 'labels': [-100, 6]}])
        write(tmp_path / 'train-2.jsonl', [{'input_ids': [5, 6], 'labels': [-100, 6]}, {'input_ids': [5, 6, 7], 'labels': [6, 7, -100]}])
        with pytest.raises(DataError, match=rf'^{tmp_path}/train-2.jsonl, row 1 \(row 2 of {tmp_path} \[train\]\): '):
            build_token_store(gpt2, str(tmp_path), 'train')

    def test_no_split(self, gpt2, train):
        with pytest.raises(MissingHuggingFaceURLSplitError):
            build_token_store(gpt2, train, None)


def test_what_is_done_before_an_error_is_kept(gpt2, tmp_path, monkeypatch):
    """The next start, with the bad row mended in the function, tokenises everything; with the same function it goes on."""
    monkeypatch.setattr(StorePlan, 'for_rows', classmethod(lambda cls, rows, source, made_from=None: cls(rows, 10, source, made_from or {})))
    path = write(tmp_path / 'train.jsonl', ROWS)
    flag = tmp_path / 'flag'
    calls = []

    def prep(row: dict[str, str]) -> dict[str, str]:
        calls.append(row['prompt'])
        if row['prompt'] == 'Question 25?' and not flag.exists():
            raise OSError('disk away')
        return row

    monkeypatch.setattr(hf_dataset, 'function_fingerprint', lambda fn: 'same')
    with pytest.raises(UnableToProcessPromptResponseError, match='row 25: '):
        build_token_store(gpt2, path, 'train', preprocessing_fn=prep)
    flag.touch()
    calls.clear()
    assert len(build_token_store(gpt2, path, 'train', preprocessing_fn=prep)) == 30
    assert calls == [f'Question {i}?' for i in range(20, 30)]


class TestCache:
    @pytest.fixture(autouse=True)
    def count(self, monkeypatch):
        self.spans: list[tuple[int, int]] = []
        write_part = store_builder.write_part

        def noted(folder: Path, plan: StorePlan, part: int, rows: Any) -> Any:
            self.spans.append(plan.span(part))
            return write_part(folder, plan, part, rows)

        monkeypatch.setattr(store_builder, 'write_part', noted)

    def built(self, *args: Any, **kwargs: Any) -> bool:
        before = len(self.spans)
        build_token_store(*args, **kwargs)
        return len(self.spans) > before

    def test_the_second_start_reads(self, gpt2, train):
        assert self.built(gpt2, train, 'train')
        assert not self.built(gpt2, train, 'train')
        assert not self.built(build_tokenizer('llmfoundry://gpt2', {}), train, 'train')

    def test_padding_and_truncation_of_the_tokenizer_do_not_matter(self, train):
        tokenizer = build_tokenizer('llmfoundry://gpt2', {'pad_token': '<|endoftext|>'})
        assert self.built(tokenizer, train, 'train')
        tokenizer(['a', 'b c'], padding=True, truncation=True, max_length=1)
        assert not self.built(tokenizer, train, 'train')

    @pytest.mark.parametrize('settings', [{'max_seq_len': 5}, {'target_prompts': 'all'}, {'target_responses': 'all'}, {'decoder_only_format': False}])
    def test_every_setting_counts(self, gpt2, train, settings):
        assert self.built(gpt2, train, 'train')
        assert self.built(gpt2, train, 'train', **settings)
        assert not self.built(gpt2, train, 'train', **{k: v.upper() if isinstance(v, str) else v for k, v in settings.items()})

    def test_changed_rows_count(self, gpt2, train):
        assert self.built(gpt2, train, 'train')
        write(Path(train), ROWS[:5])
        assert self.built(gpt2, train, 'train')

    def test_the_tokenizer_counts(self, gpt2, train):
        assert self.built(gpt2, train, 'train')
        other = build_tokenizer('llmfoundry://gpt2', {})
        other.add_tokens(['Question'])
        assert self.built(other, train, 'train')
        templated = build_tokenizer('llmfoundry://gpt2', {})
        templated.chat_template = '{{ messages }}'
        assert self.built(templated, train, 'train')

    def test_the_code_of_a_function_and_of_what_it_uses_counts(self, gpt2, train, tmp_path, monkeypatch):
        """A helper in another module, too, which the cache of ``datasets`` would not see."""
        monkeypatch.syspath_prepend(tmp_path)
        helper, prep = tmp_path / 'my_helper_for_cache.py', tmp_path / 'my_prep_for_cache.py'
        prep.write_text('from my_helper_for_cache import mark\n\ndef prep(row):\n    return {"prompt": mark(row["prompt"]), "response": row["response"]}\n')

        def built(mark: str) -> bool:
            helper.write_text(textwrap.dedent(mark))
            for name in ('my_helper_for_cache', 'my_prep_for_cache'):
                sys.modules.pop(name, None)
            return self.built(gpt2, train, 'train', preprocessing_fn='my_prep_for_cache:prep')

        sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
        try:
            assert built('def mark(text): return "!" + text')
            assert not built('def mark(text): return "!" + text')
            assert built('def mark(text): return "?" + text')
        finally:
            sys.dont_write_bytecode = before

    def test_closures_and_column_maps_count(self, gpt2, train):
        def with_suffix(suffix: str) -> Any:
            return lambda row: {'prompt': row['prompt'] + suffix, 'response': row['response']}

        assert self.built(gpt2, train, 'train', preprocessing_fn=with_suffix('a'))
        assert not self.built(gpt2, train, 'train', preprocessing_fn=with_suffix('a'))
        assert self.built(gpt2, train, 'train', preprocessing_fn=with_suffix('b'))
        assert self.built(gpt2, train, 'train', preprocessing_fn={'prompt': 'prompt', 'response': 'response'})
        assert not self.built(gpt2, train, 'train', preprocessing_fn={'prompt': 'prompt', 'response': 'response'})
        assert self.built(gpt2, train, 'train', preprocessing_fn={'prompt': 'response', 'response': 'prompt'})

    def test_what_cannot_be_hashed_is_not_cached(self, gpt2, train):
        stream = open(os.devnull, 'rb')
        with stream:
            generator = (i for i in range(10))
            assert self.built(gpt2, train, 'train', preprocessing_fn=lambda row: row if generator else None)
            assert self.built(gpt2, train, 'train', preprocessing_fn=lambda row: row if generator else None)


def test_memory_does_not_grow_with_the_rows(gpt2):
    def peak(count: int) -> int:
        rows = datasets.Dataset.from_dict({'prompt': ['some words to read ' * 20] * count, 'response': [' and some to say'] * count})
        tracemalloc.start()
        try:
            for _ in encode_rows(rows, 's', gpt2, None, TokenSettings()):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(8 * hf_dataset._BATCH_ROWS) < 1.5 * peak(hf_dataset._BATCH_ROWS)


def test_huge_rows_are_read_few_at_a_time(gpt2, monkeypatch):
    monkeypatch.setattr(hf_dataset, '_BATCH_BYTES', 10_000)
    rows = datasets.Dataset.from_dict({'prompt': ['word ' * 1000] * 8, 'response': ['x'] * 8})
    spans = []
    tokenized = hf_dataset._tokenized
    monkeypatch.setattr(hf_dataset, '_tokenized', lambda *args: (spans.append(args[-1]), tokenized(*args))[1])
    list(encode_rows(rows, 's', gpt2, None, TokenSettings()))
    assert [len(s) for s in spans] == [1] * 8 or max(len(s) for s in spans) == 2 and sum(len(s) for s in spans) == 8


def test_build_hf_dataset_gives_the_turns_of_the_rows_that_are_kept(gpt2, tmp_path):
    path = write(tmp_path / 'train.jsonl', [{'q': 'a', 'a': ''}, {'q': 'b', 'a': 'c'}, {'q': 'd', 'a': 'e f'}])
    with pytest.warns(UserWarning, match='dropped 1 of 3'):
        found = build_hf_dataset(path, 'train', tokenizer=gpt2, preprocessing_fn={'prompt': 'q', 'response': 'a'})
    assert len(found) == 2
    assert [found[i]['turns'][0]['labels'] for i in (0, 1, -1)] == [gpt2('c')['input_ids'], gpt2('e f')['input_ids'], gpt2('e f')['input_ids']]
    with pytest.raises(IndexError):
        found[2]
    with pytest.raises(ValueError, match='tokenizer is required'):
        build_hf_dataset(path, 'train')


def build_on_rank(path: str, bad: int | None, note: str) -> tuple[str, str, list[int]]:
    """Run on every rank: what came of building, and the ids of the store."""

    def prep(row: dict[str, str]) -> dict[str, str]:
        with open(note, 'a') as f:
            f.write(os.environ['RANK'])
        if bad is not None and row['prompt'] == f'Question {bad}?':
            raise KeyError('text')
        return row

    try:
        store = build_token_store(build_tokenizer('llmfoundry://gpt2', {}), path, 'train', preprocessing_fn=prep)
    except Exception as e:  # the type is what the test asks for
        return type(e).__name__, str(e), []
    return store.digest, str(store.folder), np.concatenate([store.row(i)[0] for i in range(len(store))]).tolist()


def test_two_ranks_tokenise_once(train, tmp_path):
    first, second = run_in_processes(build_on_rank, 2, train, None, str(tmp_path / 'note'))
    assert first == second and len(first[2]) > 100
    assert (tmp_path / 'note').read_text() == '0' * 30


def test_an_error_of_rank_0_reaches_rank_1(train, tmp_path):
    first, second = run_in_processes(build_on_rank, 2, train, 17, str(tmp_path / 'note'))
    assert first == second
    assert first[0] == 'UnableToProcessPromptResponseError' and f'{train} [train], row 17: ' in first[1]


def test_a_broken_file_is_the_same_error_on_both_ranks(tmp_path):
    (tmp_path / 'train.jsonl').write_text('{"prompt": \n')
    first, second = run_in_processes(build_on_rank, 2, str(tmp_path / 'train.jsonl'), None, str(tmp_path / 'note'))
    assert first == second and first[0] == MisconfiguredHfDatasetError.__name__
