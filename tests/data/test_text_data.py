"""StreamingTextDataset and its loader: sample forms, arguments, and what is said about data that cannot be used."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmfoundry.data.streams import DEFAULT_NUM_CANONICAL_NODES, DEFAULT_SHUFFLE_BLOCK_SIZE, default_cache_folder
from llmfoundry.data.text_data import StreamingTextDataset, build_text_dataloader, dataset_keys
from llmfoundry.errors import ConfigError, DataError, NotEnoughDatasetSamplesError
from tests.helpers.mds import numbered_samples, shard_files, write_text_mds, write_token_mds


def load(tokenizer: Any, dataset: dict[str, Any], batch_size: int = 4, num_workers: int = 0, drop_last: bool = False) -> list[dict[str, torch.Tensor]]:
    spec = build_text_dataloader(tokenizer, batch_size, {'max_seq_len': 16, 'split': 'train', **dataset}, drop_last, num_workers, pin_memory=False)
    return list(spec.dataloader)


def first_ids(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch['input_ids']]


@pytest.mark.parametrize(('encoding', 'dtype'), [('ndarray:int32:16', ''), ('ndarray:uint16:16', ''), ('ndarray:int32', ''), ('bytes', 'int64'), ('bytes', 'uint16')])
def test_every_stored_form_gives_the_same_batches(gpt2: Any, tmp_path: Path, encoding: str, dtype: str) -> None:
    samples = numbered_samples(6)
    stored = [s.astype(np.uint16) for s in samples] if 'uint16' in encoding else samples
    if encoding == 'ndarray:uint16:16':
        from streaming import MDSWriter

        with MDSWriter(columns={'tokens': encoding}, out=str(tmp_path / 'train')) as out:
            for sample in stored:
                out.write({'tokens': sample})
    else:
        write_token_mds(tmp_path / 'train', samples, encoding=encoding, bytes_dtype=dtype or 'int64')
    batches = load(gpt2, {'local': str(tmp_path), **({'token_encoding_type': dtype} if dtype else {})})
    assert torch.cat([b['input_ids'] for b in batches]).tolist() == [s.tolist() for s in samples]
    assert batches[0]['input_ids'].dtype == torch.int64
    assert list(batches[0]) == ['input_ids', 'attention_mask', 'labels', 'total_tokens', 'loss_generating_tokens', 'sample_ids']


def test_longer_samples_are_cut(gpt2: Any, shared_tokens: Path) -> None:
    batches = load(gpt2, {'local': str(shared_tokens), 'max_seq_len': 10})
    assert batches[0]['input_ids'].shape == (4, 10)


@pytest.mark.parametrize('encoding', ['str', 'bytes'])
def test_text_is_tokenised_cut_and_padded_and_only_text_is_in_the_loss(padded_gpt2: Any, tmp_path: Path, encoding: str) -> None:
    write_text_mds(tmp_path / 'train', ['Hello world <|endoftext|>', 'word ' * 50], encoding)
    (batch,) = load(padded_gpt2, {'local': str(tmp_path)})
    ids = padded_gpt2('Hello world <|endoftext|>')['input_ids']
    assert batch['input_ids'][0, : len(ids)].tolist() == ids
    # The pad token is also the eos token: the real one must stay in the loss, the padding must not.
    assert batch['labels'][0].tolist() == ids + [-100] * (16 - len(ids))
    assert batch['attention_mask'].sum(dim=1).tolist() == [len(ids), 16]
    assert batch['total_tokens'] == [len(ids), 16] and batch['loss_generating_tokens'] == [len(ids) - 1, 15]


def test_workers_and_no_workers_read_the_same(gpt2: Any, shared_tokens: Path) -> None:
    dataset = {'local': str(shared_tokens), 'shuffle': True, 'eos_token_id': 50256}
    alone, helped = load(gpt2, dataset), load(gpt2, dataset, num_workers=2)
    assert first_ids(alone) == first_ids(helped) and sorted(first_ids(alone)) == [100 * i for i in range(100)]
    assert 'sequence_id' in alone[0]


def test_unshuffled_order_is_the_order_of_writing(gpt2: Any, shared_tokens: Path) -> None:
    assert first_ids(load(gpt2, {'local': str(shared_tokens)})) == [100 * i for i in range(100)]


def test_order_defaults_only_where_the_user_set_nothing(gpt2: Any, shared_tokens: Path) -> None:
    common = {'tokenizer': gpt2, 'max_seq_len': 16, 'local': str(shared_tokens), 'split': 'train', 'batch_size': 4}
    ours = StreamingTextDataset(**common)
    assert (ours.num_canonical_nodes, ours.shuffle_block_size) == (DEFAULT_NUM_CANONICAL_NODES, DEFAULT_SHUFFLE_BLOCK_SIZE)
    theirs = StreamingTextDataset(**common, num_canonical_nodes=4, shuffle_block_size=5e2)
    assert (theirs.num_canonical_nodes, theirs.shuffle_block_size) == (4, 500)


def test_streaming_arguments_are_passed_through(gpt2: Any, shared_tokens: Path) -> None:
    spec = build_text_dataloader(
        gpt2, 4, {'local': str(shared_tokens), 'split': 'train', 'max_seq_len': 16, 'epoch_size': 40, 'shuffle_seed': 5, 'predownload': 9, 'sampling_granularity': 3}, False, 0
    )
    dataset = spec.dataloader.dataset
    assert (dataset.epoch_size, dataset.shuffle_seed, dataset.predownload, dataset.sampling_granularity) == (40, 5, 9, 3)
    assert {'streams', 'remote', 'cache_limit', 'stream_config', 'eos_token_id', 'mlm_probability'} <= dataset_keys()
    assert not {'tokenizer', 'batch_size'} & dataset_keys()


def test_streams_are_mixed_as_asked(gpt2: Any, tmp_path: Path) -> None:
    write_token_mds(tmp_path / 'a' / 'train', numbered_samples(20))
    write_token_mds(tmp_path / 'b' / 'other', [s + 50 for s in numbered_samples(20)])
    a, b = {'local': str(tmp_path / 'a')}, {'local': str(tmp_path / 'b'), 'split': 'other'}

    def counts(**weights: tuple[float, float]) -> tuple[int, int]:
        ((key, (weight_a, weight_b)),) = weights.items()
        ids = first_ids(load(gpt2, {'streams': {'a': {**a, key: weight_a}, 'b': {**b, key: weight_b}}}))
        return sum(i % 100 == 0 for i in ids), sum(i % 100 == 50 for i in ids)

    assert counts(repeat=(2, 1)) == (40, 20)
    assert counts(choose=(4, 8)) == (4, 8)
    assert counts(proportion=(0.75, 0.25)) == (30, 10)


def test_remote_is_copied_and_a_missing_local_has_a_lasting_default(gpt2: Any, shared_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(first_ids(load(gpt2, {'remote': str(shared_tokens), 'local': str(tmp_path / 'copy')}))) == 100
    assert len(shard_files(tmp_path / 'copy' / 'train')) == 6
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    for _ in range(2):
        assert len(first_ids(load(gpt2, {'remote': str(shared_tokens)}))) == 100
    assert len(shard_files(Path(default_cache_folder(str(shared_tokens))) / 'train')) == 6


CONFIG_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({'shufle': True}, "dataset.shufle: unknown key (did you mean 'shuffle'?)"),
    ({'eos_token_id': 0}, 'dataset.eos_token_id: 0 is not the eos_token_id of the tokenizer, 50256. Set it to 50256, or override_eos_token_id_mismatch_error: true if the data were prepared with another tokenizer'),
    ({'eos_token_id': 50256, 'bos_token_id': 50256}, 'dataset.bos_token_id: give only one of eos_token_id and bos_token_id, since one token separates documents'),
    ({'max_seq_len': 16.5}, 'dataset.max_seq_len: must be a whole number of tokens of at least 1, got 16.5'),
    ({'token_encoding_type': 'int128'}, "dataset.token_encoding_type: must be one of int8, int16, int32, int64, uint8, uint16, uint32, uint64, got 'int128'"),
    ({'shuffle_algo': 'py1b'}, "dataset.shuffle_algo: must be one of naive, py1br, py1e, py1s, py2s, got 'py1b'"),
    ({'num_canonical_nodes': 0}, 'dataset.num_canonical_nodes: must be a whole number of at least 1, got 0'),
    ({'shuffle_block_size': 1.5}, 'dataset.shuffle_block_size: 1.5 is not a whole number of samples'),
    ({'mlm_probability': 0.15}, 'dataset.mlm_probability: 0.15 asks for masked language modelling, but the tokenizer has no mask_token'),
]


@pytest.mark.parametrize(('extra', 'message'), CONFIG_ERRORS, ids=[next(iter(e[0])) + str(i) for i, e in enumerate(CONFIG_ERRORS)])
def test_wrong_settings_have_exact_errors(gpt2: Any, shared_tokens: Path, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(gpt2, {'local': str(shared_tokens), **extra})
    assert str(caught.value) == f'1 problem in the config:\n  {message}'


@pytest.mark.parametrize(
    ('streams', 'message'),
    [
        ({'a': {'local': 'x', 'splitt': 'y'}}, "dataset.streams.a.splitt: unknown key (did you mean 'split'?)"),
        ({'a': {'split': 'y'}}, 'dataset.streams.a: needs `local`, `remote` or both'),
        ({'a': {'local': 'x', 'repeat': 1, 'choose': 2}}, 'dataset.streams.a: At most one of `proportion`, `repeat`, and `choose` may be specified; the others are derived'),
        ({'a': 'x'}, "dataset.streams.a: expected a mapping such as {local: ..., split: train}, got 'x'"),
        ({}, 'dataset.streams: expected a mapping of stream names to their settings, got {}'),
    ],
)
def test_wrong_streams_have_exact_errors(gpt2: Any, streams: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(gpt2, {'streams': streams})
    assert str(caught.value) == f'1 problem in the config:\n  {message}'


def test_other_refusals(gpt2: Any, shared_tokens: Path) -> None:
    local = {'local': str(shared_tokens)}
    with pytest.raises(ConfigError, match=r'dataset: give either `streams` or `local`/`remote`, got neither$'):
        load(gpt2, {})
    with pytest.raises(ConfigError, match=r'tokenizer: the text loader needs one: add tokenizer.name'):
        load(None, local)
    with pytest.raises(NotImplementedError, match=r'dataset.seq_parallel_replication is 2, but text data cannot be read in sequence parallel'):
        load(gpt2, {**local, 'seq_parallel_replication': 2})
    with pytest.raises(ValueError, match=r'the device batch size must be a whole number of samples, got 1.5'):
        load(gpt2, local, batch_size=1.5)  # type: ignore[arg-type]
    with pytest.raises(NotEnoughDatasetSamplesError, match=r'has 100 samples, but your minimum batch size is 128'):
        load(gpt2, local, batch_size=128, drop_last=True)
    with pytest.warns(UserWarning, match=r'dataset.eos_token_id: 0 is not the eos_token_id of the tokenizer, 50256; going on because'):
        load(gpt2, {**local, 'eos_token_id': 0, 'override_eos_token_id_mismatch_error': True})


def damaged(source: Path, target: Path, name: str, change: Any) -> Path:
    shutil.copytree(source, target)
    path = target / 'train' / name
    change(path)
    return target


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(bytes(data))


AGAIN = 'Copy these files again, or run the data preparation again'
FILE_ERRORS: list[tuple[str, Any, str]] = [
    ('shard.00002.mds', Path.unlink, '{root}/train: 1 of 6 shards cannot be used: {root}/train/shard.00002.mds is missing. ' + AGAIN),
    ('shard.00003.mds', truncate, '{root}/train: 1 of 6 shards cannot be used: {root}/train/shard.00003.mds is truncated: 1316 bytes, but the index says 1416. ' + AGAIN),
    (
        'index.json', lambda p: p.write_text('{"version": 2, "sha'),
        '{root}/train/index.json: is empty or corrupted (Unterminated string starting at: line 1 column 16 (char 15)). '
        'Run the data preparation again, or copy the file again from where it was written',
    ),
    (
        'index.json', lambda p: p.write_text('{"version": 3, "shards": []}'),
        '{root}/train/index.json: is not an MDS index: expected an object with "version": 2 and a list "shards", got {{\'version\': 3, \'shards\': []}}',
    ),
    (
        'index.json', lambda p: p.write_text('{"version": 2, "shards": []}'),
        '{root}/train/index.json: the dataset is empty: its index lists no samples. Check the input of the data preparation',
    ),
    (
        'index.json', Path.unlink,
        '{root}/train: there is no index.json; the folder holds shard.00000.mds, shard.00001.mds, shard.00002.mds, shard.00003.mds, shard.00004.mds, shard.00005.mds. '
        'Remedy: run the data preparation again: it writes the index last, so this one did not finish',
    ),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'change', 'message'), FILE_ERRORS, ids=['missing', 'truncated', 'corrupt-index', 'index-version', 'empty', 'no-index'])
def test_damaged_files_are_named_before_the_first_batch(gpt2: Any, shared_tokens: Path, tmp_path: Path, name: str, change: Any, message: str) -> None:
    root = damaged(shared_tokens, tmp_path / 'data', name, change)
    with pytest.raises(DataError) as caught:
        build_text_dataloader(gpt2, 4, {'max_seq_len': 16, 'split': 'train', 'local': str(root)}, False, 0)
    assert str(caught.value) == message.format(root=root)


def test_missing_folders_and_splits(gpt2: Any, shared_tokens: Path, tmp_path: Path) -> None:
    cases = {
        (str(tmp_path / 'none'), 'train'): f'{tmp_path}/none: no such folder, and no `remote` to stream from. Give the folder that the data preparation wrote as `local`, or set `remote`',
        (str(shared_tokens), 'trian'): f"{shared_tokens}: local directory does not contain split 'trian': its sub-folders are train; did you mean split: train?",
        (str(shared_tokens), None): f'{shared_tokens}: there is no index.json; the folder holds train. Remedy: choose one of its splits with `split`: train',
    }
    for (local, split), message in cases.items():
        for remote in (None, local):
            with pytest.raises(DataError) as caught:
                load(gpt2, {'local': local, 'remote': remote, 'split': split})
            assert str(caught.value) == message


def test_columns_and_lengths(gpt2: Any, shared_tokens: Path, tmp_path: Path) -> None:
    ids = write_token_mds(tmp_path / 'ids' / 'train', numbered_samples(4), column='ids')
    floats = write_token_mds(tmp_path / 'floats' / 'train', numbered_samples(4), encoding='ndarray:int32:16')
    index = json.loads((floats / 'index.json').read_text())
    index['shards'][0]['column_encodings'] = ['ndarray:float32:16']
    (floats / 'index.json').write_text(json.dumps(index))
    text = write_text_mds(tmp_path / 'text' / 'train', ['a'])
    fit = 'Set max_seq_len to at most 16, or prepare the data with --concat_tokens 32'
    cases = [
        (ids, {}, f'{ids}/index.json: the columns are ids, but a text dataset needs `tokens` (prepared with --concat_tokens) or `text`. Prepare the data again, or use the loader that fits them'),
        (floats, {}, f'{floats}/index.json: the column `tokens` is stored as ndarray:float32:16, but must be bytes or an ndarray of integers'),
        (shared_tokens / 'train', {'max_seq_len': 32}, f'{shared_tokens}/train/index.json: the samples have 16 tokens, fewer than max_seq_len 32. {fit}'),
        (text, {}, f"{text}: the samples are raw text, which is padded to max_seq_len 16, but the tokenizer has no pad token. Set tokenizer.kwargs.pad_token: '<|endoftext|>', or prepare the data with --concat_tokens 16"),
    ]
    for folder, extra, message in cases:
        with pytest.raises(DataError) as caught:
            load(gpt2, {'local': str(folder.parent), **extra})
        assert str(caught.value) == message
    with pytest.raises(RuntimeError):
        load(gpt2, {'local': str(ids.parent)})


@pytest.mark.parametrize('num_workers', [0, 2])
def test_bad_samples_are_named_with_and_without_workers(gpt2: Any, tmp_path: Path, num_workers: int) -> None:
    high = numbered_samples(8)
    high[5][3] = 50257
    write_token_mds(tmp_path / 'high' / 'train', high)
    write_token_mds(tmp_path / 'short' / 'train', numbered_samples(8), encoding='ndarray:int32')
    write_token_mds(tmp_path / 'odd' / 'train', [numbered_samples(1)[0].astype(np.int8)[:15]], encoding='bytes', bytes_dtype='int8')
    cases = [
        ('high', {}, '/train/shard.00000.mds (sample 5): token id 50257 is outside the 50257 ids of the tokenizer. Use the tokenizer that the data were prepared with'),
        ('short', {'max_seq_len': 32}, '/train/shard.00000.mds (sample 0): 16 tokens, fewer than max_seq_len 32. Set max_seq_len to at most 16, or prepare the data with --concat_tokens 32'),
        ('odd', {}, '/train/shard.00000.mds (sample 0): 15 bytes are not whole int64 ids. Set token_encoding_type to the type that the data were written with'),
    ]
    for name, extra, message in cases:
        with pytest.raises(DataError) as caught:
            load(gpt2, {'local': str(tmp_path / name), **extra}, num_workers=num_workers)
        text = str(caught.value)
        if name == 'short':
            text = text.replace('(sample 4)', '(sample 0)')
        assert text == f'{tmp_path}/{name}{message}'


@pytest.mark.parametrize('num_workers', [0, 2])
def test_shards_that_fail_while_training_end_the_run_with_their_cause(gpt2: Any, shared_tokens: Path, tmp_path: Path, num_workers: int) -> None:
    lost = damaged(shared_tokens, tmp_path / 'lost', 'shard.00002.mds', Path.unlink)
    with pytest.raises(DataError) as caught:
        load(gpt2, {'remote': str(lost), 'local': str(tmp_path / 'copy_lost'), 'download_retry': 1}, num_workers=num_workers)
    assert str(caught.value) == (
        f'{tmp_path}/copy_lost/train/shard.00002.mds: the shard could not be prepared from {lost}: '
        f"FileNotFoundError: [Errno 2] No such file or directory: '{lost}/train/shard.00002.mds'"
    )
    cut = damaged(shared_tokens, tmp_path / 'cut', 'shard.00003.mds', truncate)
    with pytest.raises(DataError, match=r'copy_cut/train/shard.00003.mds is truncated: 1316 bytes, but the index says 1416. Delete it, and it is fetched again'):
        load(gpt2, {'remote': str(cut), 'local': str(tmp_path / 'copy_cut')}, num_workers=num_workers)
    flipped = damaged(shared_tokens, tmp_path / 'flipped', 'shard.00003.mds', flip)
    with pytest.raises(DataError, match=r'copy_flipped/train/shard.00003.mds: the shard could not be prepared from .*: ValueError: Checksum failure'):
        load(gpt2, {'remote': str(flipped), 'local': str(tmp_path / 'copy_flipped'), 'validate_hash': 'sha1'}, num_workers=num_workers)
    with pytest.raises(DataError, match=r'^\S*flipped/train/shard.00003.mds: the contents are not what was written: sha1 is \w{40}, but the index says \w{40}. Copy the file again$'):
        load(gpt2, {'local': str(flipped), 'validate_hash': 'sha1'}, num_workers=num_workers)
    with pytest.raises(DataError, match=r"validate_hash is 'xxh64', but the index holds sha1 for this file. Choose one of them, or leave validate_hash out$"):
        load(gpt2, {'local': str(shared_tokens), 'validate_hash': 'xxh64'}, num_workers=num_workers)


def test_both_threads_of_a_reader_may_fail_without_a_hang(gpt2: Any, shared_tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the thread that waits for shards meets the missing one too; Streaming then waited for both for ever."""

    def fail(self: Any, it: Any) -> None:
        raise DataError('lost', file='shard.00002.mds')

    for name in ('_prepare_thread', '_ready_thread'):
        monkeypatch.setattr(StreamingTextDataset, name, fail)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            load(gpt2, {'local': str(shared_tokens)})
        except DataError as e:
            caught.append(e)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(60)
    assert not reader.is_alive() and str(caught[0]) == 'shard.00002.mds: lost'


def test_a_fast_hash_in_the_index_is_compared_without_being_asked_for(gpt2: Any, tmp_path: Path) -> None:
    for name, algorithm in (('fast', 'xxh3_64'), ('slow', 'sha1')):
        write_token_mds(tmp_path / name / 'train', numbered_samples(32), hashes=[algorithm])
        flip(tmp_path / name / 'train' / 'shard.00001.mds')
    with pytest.raises(DataError, match=r'fast/train/shard.00001.mds: the contents are not what was written: xxh3_64 is \w{16}, but the index says \w{16}'):
        load(gpt2, {'local': str(tmp_path / 'fast')})
    with pytest.raises(DataError, match='token id 68649 is outside'):  # seen only because this bit makes an impossible id
        load(gpt2, {'local': str(tmp_path / 'slow')})


def test_a_remote_without_an_index_and_with_a_bad_one(gpt2: Any, shared_tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'none/train: the index could not be read from there: FileNotFoundError: .*Check `remote` and `split`, and that the folder holds index.json$'):
        load(gpt2, {'remote': str(tmp_path / 'none'), 'local': str(tmp_path / 'a'), 'download_retry': 1})
    bad = damaged(shared_tokens, tmp_path / 'bad', 'index.json', lambda p: p.write_text('['))
    with pytest.raises(DataError, match=r'b/train/index.json: is empty or corrupted'):
        load(gpt2, {'remote': str(bad), 'local': str(tmp_path / 'b')})
