"""Finetuning examples from MDS shards: every form of sample, each example once per epoch, packed batches, resumption, and what cannot be read."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import MDSWriter
from streaming.base.batching import generate_work
from streaming.base.world import World

from llmfoundry.data.elastic_streaming import repeats_per_worker
from llmfoundry.data.finetuning import preprocessing
from llmfoundry.data.finetuning.dataloader import build_finetuning_dataloader
from llmfoundry.data.finetuning.streaming_dataset import StreamingFinetuningDataset
from llmfoundry.errors import ConfigError, DataError, DatasetTooSmallError, InvalidRoleError
from llmfoundry.tokenizers.build import build_tokenizer
from tests.helpers.finetuning_runs import SEQ_LEN, example, write_example_mds


@pytest.fixture(scope='module')
def tokenizer() -> Any:
    return build_tokenizer('llmfoundry://gpt2', {})


@pytest.fixture(scope='module')
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('examples')
    write_example_mds(root / 'train', 203)
    return root


def write(folder: Path, columns: dict[str, str], *rows: dict[str, Any]) -> Path:
    with MDSWriter(columns=columns, out=str(folder)) as out:
        for row in rows:
            out.write(row)
    return folder


def loader(tokenizer: Any, root: Path, device_batch_size: int = 8, num_workers: int = 0, drop_last: bool = False, **dataset: Any) -> Any:
    block = {'local': str(root), 'max_seq_len': SEQ_LEN, 'decoder_only_format': True, **dataset}
    return build_finetuning_dataloader(tokenizer, device_batch_size, block, num_workers=num_workers, drop_last=drop_last, pin_memory=False).dataloader


IDS_OF = {'input_ids': [10, 11], 'labels': [12, 13]}
EXPECTED = [10, 11, 12, 13, 50256]


@pytest.mark.parametrize('form', ['turns', 'turns as text', 'lists', 'ndarray', 'bytes', 'bytes int32'])
def test_tokenised_samples(tokenizer: Any, tmp_path: Path, form: str) -> None:
    turn = {**IDS_OF, 'attention_mask': [1, 1]}
    int_type = 'int32' if form == 'bytes int32' else 'int64'
    columns, row = {
        'turns': ({'turns': 'json'}, {'turns': [turn]}),
        'turns as text': ({'turns': 'str'}, {'turns': json.dumps([turn])}),
        'lists': (dict.fromkeys(IDS_OF, 'json'), IDS_OF),
        'ndarray': (dict.fromkeys(IDS_OF, 'ndarray'), {k: np.array(v, dtype=np.int32) for k, v in IDS_OF.items()}),
    }.get(form, (dict.fromkeys(IDS_OF, 'bytes'), {k: np.array(v, dtype=int_type).tobytes() for k, v in IDS_OF.items()}))
    batch = next(iter(loader(tokenizer, write(tmp_path, columns, row), 1, token_encoding_type=int_type)))
    assert batch['input_ids'][0, :5].tolist() == EXPECTED and batch['labels'][0, :5].tolist() == [-100, -100, 12, 13, 50256]


@pytest.mark.parametrize('form', ['prompt', 'completion', 'messages', 'messages as text'])
def test_text_samples_are_tokenised(tokenizer: Any, tmp_path: Path, form: str) -> None:
    messages = [{'role': 'user', 'content': 'Hello'}, {'role': 'assistant', 'content': ' world'}]
    columns, row = {
        'prompt': ({'prompt': 'str', 'response': 'str', 'id': 'int'}, {'prompt': 'Hello', 'response': ' world', 'id': 3}),
        'completion': ({'prompt': 'str', 'completion': 'str'}, {'prompt': 'Hello', 'completion': ' world'}),
        'messages': ({'messages': 'json'}, {'messages': messages}),
        'messages as text': ({'messages': 'str'}, {'messages': json.dumps(messages)}),
    }[form]
    batch = next(iter(loader(tokenizer, write(tmp_path, columns, row), 1)))
    text = tokenizer.decode(batch['labels'][0][batch['labels'][0] != -100])
    assert text.startswith(' world') and text.rstrip().endswith(('<|endoftext|>', '<|im_end|>'))
    assert 'Hello' in tokenizer.decode(batch['input_ids'][0])


def test_document_000s_name_applies_its_function_to_raw_shards(tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path / 'raw', {'q': 'str', 'a': 'str'}, {'q': 'Hello', 'a': ' world'})
    write_example_mds(tmp_path / 'done', 4)
    preprocessing.register('streaming-task')(lambda row: {'prompt': row['q'], 'response': row['a']})
    try:
        batch = next(iter(loader(tokenizer, tmp_path / 'raw', 1, name='streaming-task')))
        assert tokenizer.decode(batch['labels'][0][batch['labels'][0] != -100]) == ' world<|endoftext|>'
        # Shards that were converted already hold finished examples.
        assert len(list(loader(tokenizer, tmp_path / 'done', 4, name='streaming-task'))) == 1
    finally:
        del preprocessing._REGISTERED['streaming-task']


def numbers(tokenizer: Any, batch: dict[str, torch.Tensor]) -> list[int]:
    """Numbers of the examples of a batch: the first word of each document."""
    found = []
    for ids, sequence, tokens in zip(batch['input_ids'], batch['sequence_id'], batch['total_tokens'], strict=True):
        for document in range(int(sequence.max()) + 1 if tokens else 0):
            found.append(int(tokenizer.decode(ids[sequence == document]).split()[0]))
    return found


@pytest.mark.parametrize('packing', [{}, {'packing_ratio': 'auto'}, {'packing': True}, {'packing_ratio': 2}, {'packing_ratio': 2.5}])
@pytest.mark.parametrize('workers', [0, 2])
def test_every_example_comes_once_per_epoch_whole(tokenizer: Any, shards: Path, packing: dict[str, Any], workers: int) -> None:
    batches = list(loader(tokenizer, shards, num_workers=workers, split='train', shuffle=True, **packing))
    seen = [n for batch in batches for n in numbers(tokenizer, batch)]
    assert sorted(seen) == list(range(203))
    tokens = sum(sum(batch['total_tokens']) for batch in batches)
    whole = [tokenizer(example(n)['prompt'])['input_ids'] + tokenizer(example(n)['response'])['input_ids'] + [50256] for n in range(203)]
    assert tokens == sum(min(SEQ_LEN, len(ids)) for ids in whole)


def test_packed_batches_hold_the_same_examples_as_raw_ones(tokenizer: Any, shards: Path) -> None:
    raw = [numbers(tokenizer, b) for b in loader(tokenizer, shards, 16, split='train', shuffle=True)]
    packed = [numbers(tokenizer, b) for b in loader(tokenizer, shards, 8, split='train', shuffle=True, packing_ratio=2)]
    assert [sorted(b) for b in packed] == [sorted(b) for b in raw]


def test_auto_packs_as_many_examples_as_fit_into_the_device_batch(tokenizer: Any, tmp_path: Path) -> None:
    short = {'prompt': 'a b c', 'response': ' d e f'}
    write(tmp_path, {'prompt': 'str', 'response': 'str'}, *[short] * 200)
    # Seven tokens each: six to a row of 48.
    packed = loader(tokenizer, tmp_path, 4, packing_ratio='auto')
    assert packed.batch_size == packed.dataset.batch_size == 24
    assert [len(b['input_ids']) for b in packed][:8] == [4] * 8


def work_of(num_samples: int, ranks: int, workers: int, dataset: Any) -> np.ndarray:
    dataset.batch_size = 4
    return generate_work('random', dataset, World(1, ranks, workers, 0), 0, 0)


@pytest.mark.parametrize(('ranks', 'workers'), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 3)])
def test_what_streaming_repeats_for_even_ranks_is_found(tokenizer: Any, shards: Path, ranks: int, workers: int) -> None:
    dataset = StreamingFinetuningDataset(tokenizer, local=str(shards), split='train', batch_size=4, shuffle=True)
    work = work_of(203, ranks, workers, dataset)
    marks = repeats_per_worker(work, 203)
    kept = work[(work >= 0) & ~marks] if marks is not None else work[work >= 0]
    assert sorted(kept.tolist()) == list(range(203))
    assert (marks is None) == (ranks == 1)


def test_streams_that_repeat_on_purpose_are_left_alone() -> None:
    assert repeats_per_worker(np.array([0, 1, 1, 2]).reshape(1, 1, 1, 2, 2), 4) is None
    assert repeats_per_worker(np.array([0, 1, 1, 1]).reshape(1, 1, 1, 2, 2), 3) is None
    marks = repeats_per_worker(np.array([[0, 1], [2, 1]]).reshape(1, 2, 1, 1, 2), 3)
    assert marks is not None and marks.reshape(-1).tolist() == [False, False, False, True]


@pytest.mark.parametrize('packing', [{}, {'packing_ratio': 2}])
@pytest.mark.parametrize('batches', [5, 12])
def test_resuming_counts_examples_not_rows(tokenizer: Any, shards: Path, packing: dict[str, Any], batches: int) -> None:
    settings = {'split': 'train', 'shuffle': True, **packing}
    whole = loader(tokenizer, shards, 8, **settings)
    expected = [numbers(tokenizer, b) for _ in range(2) for b in whole]
    interrupted = loader(tokenizer, shards, 8, **settings)
    seen, rows = [], 0
    for batch in interrupted:
        seen.append(numbers(tokenizer, batch))
        rows += len(batch['input_ids'])
        if len(seen) == batches:
            break
    state = interrupted.dataset.state_dict(rows, True)
    assert state['sample_in_epoch'] == batches * 8 * packing.get('packing_ratio', 1)
    resumed = loader(tokenizer, shards, 8, **settings)
    resumed.dataset.load_state_dict(json.loads(json.dumps(state)))
    assert seen + [numbers(tokenizer, b) for _ in range(2) for b in resumed] == expected


def test_a_checkpoint_between_epochs_names_the_next_one(tokenizer: Any, shards: Path) -> None:
    whole = loader(tokenizer, shards, split='train', shuffle=True)
    assert whole.dataset.state_dict(0, True)['epoch'] == 0
    epochs = [[numbers(tokenizer, b) for b in whole]]
    state = whole.dataset.state_dict(0, True)
    epochs.append([numbers(tokenizer, b) for b in whole])
    resumed = loader(tokenizer, shards, split='train', shuffle=True)
    resumed.dataset.load_state_dict(state)
    assert [numbers(tokenizer, b) for b in resumed] == epochs[1] != epochs[0]


def test_plug_in_loaders_count_rows_and_give_the_ratio(tokenizer: Any, shards: Path) -> None:
    dataset = StreamingFinetuningDataset(tokenizer, local=str(shards), split='train', batch_size=4, packing_ratio=2.5)
    assert dataset.state_dict(10, True)['sample_in_epoch'] == 25


def test_ranks_with_fewer_rows_get_idle_ones(tokenizer: Any, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = loader(tokenizer, shards, 8, split='train', packing_ratio=2)
    plain = [b['total_tokens'] for b in packed]
    monkeypatch.setattr('llmfoundry.dist.all_reduce_min', lambda value: min(value, -12))
    padded = list(loader(tokenizer, shards, 8, split='train', packing_ratio=2))
    assert {len(b['input_ids']) for b in padded} >= {12} and all(len(b['input_ids']) >= 12 for b in padded)
    assert [b['total_tokens'][: len(p)] for b, p in zip(padded, plain, strict=True)] == plain
    assert all(sum(b['total_tokens'][len(p) :]) == 0 for b, p in zip(padded, plain, strict=True))
    assert {len(b[key]) for b in padded[:1] for key in ('labels', 'sequence_id', 'attention_mask', 'loss_generating_tokens')} == {len(padded[0]['input_ids'])}


BAD: list[tuple[dict[str, str], dict[str, Any], type[Exception], str]] = [
    ({'text': 'str'}, {'text': 'x'}, DataError, 'the columns are text, but a finetuning dataset needs `turns`, `input_ids` and `labels`, `prompt` and `response`, or `messages`'),
    ({'input_ids': 'bytes', 'labels': 'bytes'}, {'input_ids': b'123', 'labels': b''}, DataError, 'input_ids: 3 bytes are not whole int64 ids. Set token_encoding_type'),
    ({'input_ids': 'json', 'labels': 'json'}, {'input_ids': [1, 60000], 'labels': [1]}, DataError, 'input_ids: token id 60000 is outside the 50257 ids of the tokenizer'),
    ({'input_ids': 'json', 'labels': 'json'}, {'input_ids': [1, -100], 'labels': [1]}, DataError, 'input_ids: token id -100 is outside'),
    ({'input_ids': 'json', 'labels': 'json'}, {'input_ids': 'abc', 'labels': [1]}, DataError, 'input_ids: expected ids as bytes, ndarray or list, got str'),
    ({'input_ids': 'json', 'labels': 'json'}, {'input_ids': [[1]], 'labels': [1]}, DataError, 'input_ids: expected one list of whole numbers, got shape (1, 1) of int64'),
    ({'messages': 'json'}, {'messages': [{'role': 'boss', 'content': 'x'}, {'role': 'assistant', 'content': 'x'}]}, InvalidRoleError, 'shard.00000.mds (sample 0): '),
]  # fmt: skip


@pytest.mark.parametrize(('columns', 'row', 'error', 'text'), BAD, ids=[text[:40] for *_, text in BAD])
def test_samples_that_cannot_be_used(tokenizer: Any, tmp_path: Path, columns: dict[str, str], row: dict[str, Any], error: type[Exception], text: str) -> None:
    write(tmp_path, columns, row)
    with pytest.raises(error) as e:
        next(iter(loader(tokenizer, tmp_path, 1)))
    assert text in str(e.value) and str(tmp_path) in str(e.value)


def test_settings_that_cannot_work(tokenizer: Any, shards: Path) -> None:
    with pytest.raises(ConfigError, match='dataset.remote: needs `local` too'):
        StreamingFinetuningDataset(tokenizer, remote='s3://x')
    with pytest.raises(ConfigError, match="dataset.shufle: unknown key \\(did you mean 'shuffle'\\?\\)"):
        StreamingFinetuningDataset(tokenizer, local=str(shards), shufle=True)
    with pytest.raises(DatasetTooSmallError, match='Dataset is too small: it has 203 samples, fewer than 512 num_canonical_nodes'):
        StreamingFinetuningDataset(tokenizer, local=str(shards), split='train', batch_size=1, num_canonical_nodes=512)


def test_an_example_without_target_is_said_once_and_does_not_stop_the_run(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{'prompt': 'word ' * 60, 'response': ' end'}] * 3 + [{'prompt': 'a', 'response': ' b'}]
    write(tmp_path, {'prompt': 'str', 'response': 'str'}, *rows)
    with caplog.at_level(logging.WARNING):
        batch = next(iter(loader(tokenizer, tmp_path, 4)))
    assert batch['loss_generating_tokens'] == [0, 0, 0, 2]
    assert Counter('no token is trained' in r.message for r in caplog.records)[True] == 1
