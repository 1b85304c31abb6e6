"""The loader as users meet it: sources, packing, ranks, workers, errors, and the command that prints batches."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmfoundry import registry
from llmfoundry.data.dataloader import build_dataloader
from llmfoundry.data.finetuning import preprocessing
from llmfoundry.data.finetuning.collator import Seq2SeqFinetuningCollator
from llmfoundry.data.finetuning.dataloader import build_finetuning_dataloader, main
from llmfoundry.errors import ConfigError, MissingHuggingFaceURLSplitError, NotEnoughDatasetSamplesError
from llmfoundry.tokenizers.build import build_tokenizer
from tests.helpers.finetuning_runs import SEQ_LEN, example, write_example_mds, write_jsonl
from tests.helpers.processes import run_in_processes


@pytest.fixture(scope='module')
def tokenizer() -> Any:
    return build_tokenizer('llmfoundry://gpt2', {})


@pytest.fixture(scope='module')
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp('rows') / 'train.jsonl', 203)


def block(rows: Path, **changes: Any) -> dict[str, Any]:
    return {'hf_name': 'json', 'hf_kwargs': {'data_files': str(rows)}, 'split': 'train', 'max_seq_len': SEQ_LEN, 'decoder_only_format': True, 'shuffle': True, **changes}


def loader(tokenizer: Any, dataset: dict[str, Any], device_batch_size: int = 8, num_workers: int = 0, **changes: Any) -> Any:
    return build_finetuning_dataloader(tokenizer, device_batch_size, dataset, num_workers=num_workers, pin_memory=False, **changes).dataloader


def numbers(tokenizer: Any, batch: dict[str, torch.Tensor]) -> list[int]:
    """Numbers of the examples of a batch: the first word of each document."""
    found = []
    for ids, sequence, tokens in zip(batch['input_ids'], batch['sequence_id'], batch['total_tokens'], strict=True):
        for document in range(int(sequence.max()) + 1 if tokens else 0):
            found.append(int(tokenizer.decode(ids[sequence == document]).split()[0]))
    return found


@pytest.mark.parametrize('packing', [{}, {'packing': True}, {'packing_ratio': 'auto'}, {'packing_ratio': 1.5}])
@pytest.mark.parametrize('workers', [0, 1, 2])
def test_every_example_comes_once_per_epoch_for_any_number_of_workers(tokenizer: Any, rows: Path, packing: dict[str, Any], workers: int) -> None:
    dl = loader(tokenizer, block(rows, **packing), num_workers=workers)
    epochs = [[numbers(tokenizer, batch) for batch in dl] for _ in range(2)]
    for epoch in epochs:
        assert sorted(n for batch in epoch for n in batch) == list(range(203)) and len(epoch) == len(dl)
    assert epochs[0] != epochs[1]
    assert epochs == [[numbers(tokenizer, batch) for batch in plain] for plain in (lambda d: (d, d))(loader(tokenizer, block(rows, **packing)))]


def test_packing_changes_no_token_and_no_target(tokenizer: Any, rows: Path) -> None:
    def documents(packing: bool) -> dict[int, tuple[list[int], list[int]]]:
        found = {}
        for batch in loader(tokenizer, block(rows, packing=packing)):
            for ids, labels, sequence in zip(batch['input_ids'], batch['labels'], batch['sequence_id'], strict=True):
                for document in range(int(sequence.max()) + 1):
                    mine = sequence == document
                    found[int(tokenizer.decode(ids[mine]).split()[0])] = (ids[mine].tolist(), labels[mine].tolist())
        return found

    apart, packed = documents(False), documents(True)
    assert len(apart) == 203 and apart == packed
    ids, labels = apart[7]
    response = tokenizer(example(7)['response'])['input_ids'] + [50256]
    assert ids == tokenizer(example(7)['prompt'])['input_ids'] + response and labels == [-100] * (len(ids) - len(response)) + response


def test_packed_rows_are_full(tokenizer: Any, rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger='llmfoundry'):
        dl = loader(tokenizer, block(rows, packing=True))
    batches = list(dl)
    filled = sum(sum(b['total_tokens']) for b in batches) / sum(b['input_ids'].numel() for b in batches)
    # Rows of 48 tokens and examples of up to 45 leave gaps; with rows of 2,048 it is more than 0.99 (tests/data/test_packing.py).
    assert filled > 0.97
    assert re.search(r'203 examples in \d+ rows of 48 tokens, 97\.\d % of them filled; \d+ batches per epoch', caplog.text)


def streamed(folder: str, ratio: int) -> dict[str, Any]:
    return {'local': folder, 'max_seq_len': SEQ_LEN, 'decoder_only_format': True, 'shuffle': True, 'packing_ratio': ratio}


def _batches_of_rank(rows: str, shards: str) -> list[tuple[list[list[int]], list[int]]]:
    """For each kind of data: the examples of this rank's batches, and their rows."""
    tokenizer = build_tokenizer('llmfoundry://gpt2', {})
    found = []
    for dataset in (block(Path(rows), packing=True), block(Path(rows)), streamed(shards, 2), streamed(shards, 1)):
        batches = list(loader(tokenizer, dataset, 4))
        found.append(([numbers(tokenizer, batch) for batch in batches], [len(batch['input_ids']) for batch in batches]))
    return found


@pytest.mark.slow
def test_two_real_ranks_share_each_global_batch(tokenizer: Any, rows: Path, tmp_path: Path) -> None:
    shards = write_example_mds(tmp_path / 'mds', 203)
    first, second = run_in_processes(_batches_of_rank, 2, str(rows), str(shards))
    for index, dataset in enumerate((block(rows, packing=True), block(rows), streamed(str(shards), 2), streamed(str(shards), 1))):
        (mine, my_rows), (other, other_rows) = first[index], second[index]
        assert my_rows == other_rows, 'ranks with other numbers of rows would wait for each other'
        together = [sorted(a + b) for a, b in zip(mine, other, strict=True)]
        # Streaming repeats a sample for even ranks; it is not trained twice.
        assert sorted(sum(together, [])) == list(range(203))
        alone = [sorted(numbers(tokenizer, batch)) for batch in loader(tokenizer, dataset, 8)]
        assert together[:-1] == alone[:-1] and (index > 1 or together == alone)


def test_a_registered_name_builds_it_and_the_block_is_not_changed(tokenizer: Any, rows: Path) -> None:
    config = {'name': 'finetuning', 'dataset': block(rows, packing_ratio='auto'), 'num_workers': 0, 'drop_last': True}
    before = repr(config)
    spec = build_dataloader(config, tokenizer, 4)
    batch = next(iter(spec.dataloader))
    assert repr(config) == before
    assert spec.get_num_samples_in_batch(batch) == 4 and spec.get_num_tokens_in_batch(batch, 'total') == sum(batch['total_tokens'])
    assert spec.get_num_tokens_in_batch(batch, 'loss_generating') == int((batch['labels'][:, 1:] != -100).sum())


def test_the_pad_token_is_filled_in_with_a_line_in_the_log(rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    fresh = build_tokenizer('llmfoundry://gpt2', {})
    assert fresh.pad_token is None
    with caplog.at_level(logging.INFO, logger='llmfoundry'):
        loader(fresh, block(rows))
    assert fresh.pad_token == '<|endoftext|>' and "rows are filled up with its end token '<|endoftext|>'" in caplog.text


def test_document_000s_form_reads_local_files_through_a_function_with_a_tokenizer(tokenizer: Any, rows: Path) -> None:
    @preprocessing.register('my-000-task')
    def tokenise(row: dict[str, Any], tokenizer: Any) -> Any:
        return tokenizer(text=row['prompt'], text_target=row['response'])

    try:
        old = {'name': 'my-000-task', 'kwargs': {'data_files': {'train': str(rows)}}, 'split': 'train', 'shuffle': False, 'max_seq_len': SEQ_LEN, 'decoder_only_format': True}
        new = block(rows, shuffle=False)
        for a, b in zip(loader(tokenizer, old), loader(tokenizer, new), strict=True):
            assert torch.equal(a['input_ids'], b['input_ids']) and torch.equal(a['labels'], b['labels'])
    finally:
        del preprocessing._REGISTERED['my-000-task']


def test_encoder_decoder_rows(tokenizer: Any, rows: Path) -> None:
    batch = next(iter(loader(tokenizer, block(rows, decoder_only_format=False, shuffle=False), 4)))
    assert tokenizer.decode(batch['input_ids'][3][batch['attention_mask'][3].bool()]) == example(3)['prompt']
    labels = batch['labels'][3]
    assert tokenizer.decode(labels[labels != -100]) == example(3)['response'] + '<|endoftext|>'
    assert batch['decoder_input_ids'][3, 1:5].tolist() == labels[:4].tolist()


class CountingCollator:
    """A plug-in's own collator."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, examples: list[Any]) -> Any:
        assert all(set(example) == {'input_ids', 'labels'} for example in examples)
        return self.inner(examples)


def test_a_plug_ins_collator_gets_examples(tokenizer: Any, rows: Path) -> None:
    def build(dataloader_cfg: Any, tokenizer: Any, dataset_batch_size: int) -> Any:
        assert dataloader_cfg['dataset']['split'] == 'train'
        return CountingCollator(Seq2SeqFinetuningCollator(tokenizer, SEQ_LEN, True)), dataset_batch_size

    plain = list(loader(tokenizer, block(rows)))
    with registry.save_registry():
        registry.collators.register('finetuning_collator', func=build)
        for a, b in zip(loader(tokenizer, block(rows)), plain, strict=True):
            assert torch.equal(a['input_ids'], b['input_ids']) and torch.equal(a['labels'], b['labels'])


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({'split': None}, MissingHuggingFaceURLSplitError, 'When using a HuggingFace dataset from a URL, you must set the `split` key in the dataset config.'),
    ({'decoder_only_format': False, 'packing': True}, NotImplementedError, 'dataset.packing: encoder-decoder models cannot be trained on packed rows. Delete the key'),
    ({'packing_ratio': 0.5}, ConfigError, '1 problem in the config:\n  dataset.packing_ratio: must be at least 1 (one example in each row, which is no packing), got 0.5'),
    ({'local': 'x', 'shufle': 1}, ConfigError, '2 problems in the config:\n  dataset.hf_name: cannot be set together with `local`: the data come either from Hugging Face datasets or from MDS '
     "shards. Delete one of them\n  dataset.shufle: unknown key (did you mean 'shuffle'?)"),
]  # fmt: skip


@pytest.mark.parametrize(('change', 'error', 'text'), WRONG, ids=[str(change) for change, *_ in WRONG])
def test_wrong_blocks(tokenizer: Any, rows: Path, change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as e:
        loader(tokenizer, block(rows, **change))
    assert str(e.value) == text


def test_wrong_batch_sizes_and_tokenizers(tokenizer: Any, rows: Path) -> None:
    with pytest.raises(ConfigError, match='tokenizer: the finetuning loader needs one'):
        loader(None, block(rows))
    with pytest.raises(ValueError, match='the device batch size must be a whole number'):
        loader(tokenizer, block(rows), 2.5)
    with pytest.raises(NotEnoughDatasetSamplesError, match='has 203 samples, but your minimum batch size is 400'):
        loader(tokenizer, block(rows), 400, drop_last=True)
    assert len(loader(tokenizer, block(rows), 400)) == 1


def test_unknown_keys_warn(tokenizer: Any, rows: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loader(tokenizer, block(rows, my_plugin_setting=1))
    assert 'dataset: unknown keys that have no effect: my_plugin_setting' in caplog.text


def test_the_module_prints_batches_in_colours(rows: Path, capsys: pytest.CaptureFixture) -> None:
    main(['--hf_name', 'json', '--data_files', str(rows), '--max_seq_len', str(SEQ_LEN)])
    out = capsys.readouterr().out
    assert out.count('# Batch') == 5 and out.count('- Row') == 10
    assert f'\033[36m{example(0)["prompt"]}\033[0m\033[1;32m{example(0)["response"]}<|endoftext|>\033[0m' in out
    with pytest.raises(SystemExit, match='error: .*train-nope.jsonl'):
        main(['--hf_name', 'json', '--data_files', str(rows.parent / 'train-nope.jsonl')])


def test_rows_are_read_from_the_store_not_held(tokenizer: Any, rows: Path) -> None:
    dataset = loader(tokenizer, block(rows, packing=True)).dataset
    ids, _ = dataset.store.row(0)
    assert ids.dtype == np.int32 and not hasattr(dataset, 'rows')
