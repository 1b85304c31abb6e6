"""Whatever data preparation makes of the same rows, the finetuning loader trains the same tokens: JSON lines, shards of text, shards of tokens, document 004's Arrow file."""

from __future__ import annotations

import datasets
import pytest

from llmfoundry.command_utils.data_prep.tokenize_data import tokenize_data
from llmfoundry.data.finetuning.dataloader import build_finetuning_dataloader
from tests.data_prep.test_convert_finetuning_dataset import CHATS, convert, write_rows
from tests.helpers.prepared_data import GPT2, random_texts
from tests.helpers.tokenizers import gpt2_tokenizer

PAIRS = [(p or 'empty', r or 'none') for p, r in zip(random_texts(30, 5, 30), random_texts(30, 6, 30), strict=True)]
SHARDS = {'num_canonical_nodes': 1, 'predownload': 4, 'split': 'train'}


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp('cache')
    for name in ('HF_DATASETS_CACHE', 'LLMFOUNDRY_CACHE'):
        monkeypatch.setenv(name, str(cache))
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', cache)


def batches(dataset, **changes):
    block = {'max_seq_len': 512, 'decoder_only_format': True, 'shuffle': False, **dataset, **changes}
    loader = build_finetuning_dataloader(gpt2_tokenizer(), 4, block, 0, prefetch_factor=None, persistent_workers=False, pin_memory=False).dataloader
    return list(loader)


def rows_of(dataset, **changes):
    """(ids, labels) of each row, without padding."""
    found = []
    for batch in batches(dataset, **changes):
        for ids, labels, mask in zip(batch['input_ids'], batch['labels'], batch['attention_mask'], strict=True):
            found.append((ids[mask == 1].tolist(), labels[mask == 1].tolist()))
    return found


def json_source(path):
    return {'hf_name': 'json', 'hf_kwargs': {'data_files': str(path)}, 'split': 'train'}


def test_pairs_in_every_form(tmp_path):
    source = write_rows(tmp_path / 'rows.jsonl', [{'prompt': p, 'response': r} for p, r in PAIRS])
    expected = rows_of(json_source(source))
    assert len(expected) == 30 and all(row[0][-1] == 50256 == row[1][-1] for row in expected)
    for name, tokenizer in (('text', None), ('tokens', GPT2)):
        convert(source, tmp_path / name, tokenizer=tokenizer, compression='zstd')
        assert rows_of({'local': str(tmp_path / name), **SHARDS}) == expected
    tokenize_data(str(write_rows(tmp_path / 'pg.jsonl', [{'prompt': p, 'generation': r} for p, r in PAIRS])), str(tmp_path / 'rows.arrow'), GPT2, 512, 1)
    assert rows_of({'hf_name': str(tmp_path / 'rows.arrow'), 'split': 'train'}) == expected


@pytest.mark.parametrize('target_responses', ['last', 'all'])
def test_chats_in_every_form(tmp_path, target_responses):
    source = write_rows(tmp_path / 'rows.jsonl', CHATS)
    expected = rows_of(json_source(source), target_responses=target_responses)
    for name, tokenizer in (('text', None), ('tokens', GPT2)):
        convert(source, tmp_path / name, tokenizer=tokenizer)
        assert rows_of({'local': str(tmp_path / name), **SHARDS}, target_responses=target_responses) == expected


def test_rows_without_prompt_are_told_from_responses(tmp_path):
    """Their ids are their labels, but for the first, which nothing predicts."""
    source = write_rows(tmp_path / 'pg.jsonl', [{'prompt': '', 'generation': 'all of it is trained'}])
    tokenize_data(str(source), str(tmp_path / 'rows.arrow'), GPT2, 512, 1)
    [(ids, labels)] = rows_of({'hf_name': str(tmp_path / 'rows.arrow'), 'split': 'train'})
    assert ids == [*gpt2_tokenizer()('all of it is trained')['input_ids'], 50256] and labels == [-100, *ids[1:]]


def test_shards_for_encoder_decoder_models(tmp_path):
    source = write_rows(tmp_path / 'rows.jsonl', [{'prompt': p, 'response': r} for p, r in PAIRS])
    convert(source, tmp_path / 'tokens', tokenizer=GPT2, encoder_decoder=True)
    ours, theirs = batches({'local': str(tmp_path / 'tokens'), **SHARDS}, decoder_only_format=False), batches(json_source(source), decoder_only_format=False)
    assert len(ours) == len(theirs) == 8
    for a, b in zip(ours, theirs, strict=True):
        assert set(a) == set(b) and all((a[key] == b[key]).all() for key in ('input_ids', 'labels', 'decoder_input_ids', 'attention_mask'))
