"""Rows packed by dataprep train document by document: none lost, none twice, none beside another, no padding taken for text."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from llmfoundry.command_utils.data_prep.dataprep.packing import TokenisedRow, pack_rows
from llmfoundry.data.finetuning.dataloader import build_finetuning_dataloader
from llmfoundry.data.finetuning.packed_rows import one_row_per_document
from llmfoundry.data.finetuning.sources import load_rows
from llmfoundry.errors import DataError
from llmfoundry.tokenizers.build import build_tokenizer

ROWS = [TokenisedRow([100 * i + k for k in range(1, n + 1)], n // 2, f'{i}') for i, n in enumerate([5, 9, 3, 12, 2, 7, 12, 4, 8])]
EXPECTED = [(r.input_ids, [-100] * r.num_prompt_tokens + r.input_ids[r.num_prompt_tokens :]) for r in ROWS]


def _packed() -> list[dict]:
    return list(pack_rows(ROWS, 12))


@pytest.mark.parametrize('form', ['save_to_disk', 'jsonl', 'parquet'])
def test_documents_come_back_as_they_were(form: str, tmp_path: Path) -> None:
    packed = datasets.Dataset.from_list(_packed())
    kwargs, name = {'cache_dir': str(tmp_path / 'cache')}, str(tmp_path / 'rows')
    if form == 'save_to_disk':
        packed.save_to_disk(name, num_shards=3)
    elif form == 'jsonl':
        name += '.jsonl'
        Path(name).write_text('\n'.join(map(json.dumps, packed.to_list())))
    else:
        name += '.parquet'
        packed.to_parquet(name)
    rows = load_rows(name, 'train', kwargs if form != 'save_to_disk' else None)
    assert rows.column_names == ['input_ids', 'labels']
    assert [(row['input_ids'], row['labels']) for row in rows] == EXPECTED
    assert rows[2:4] == {'input_ids': [e[0] for e in EXPECTED[2:4]], 'labels': [e[1] for e in EXPECTED[2:4]]}
    part = load_rows(name, 'train[1:3]', kwargs if form != 'save_to_disk' else None)
    assert [row['input_ids'] for row in part] == [ids for pack in _packed()[1:3] for ids in _documents(pack)]


def _documents(pack: dict) -> list[list[int]]:
    ids, numbers = np.array(pack['input_ids']), np.array(pack['sequence_id'])
    return [ids[numbers == n].tolist() for n in range(numbers.max() + 1)]


@pytest.mark.parametrize('packing', [False, True])
def test_the_loader_trains_each_document_once_and_alone(packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('LLMFOUNDRY_CACHE', str(tmp_path / 'cache'))
    datasets.Dataset.from_list(_packed()).save_to_disk(str(tmp_path / 'rows'))
    block = {'hf_name': str(tmp_path / 'rows'), 'split': 'train', 'max_seq_len': 24, 'decoder_only_format': True, 'shuffle': False, 'packing': packing}
    spec = build_finetuning_dataloader(build_tokenizer('llmfoundry://gpt2'), 2, block, num_workers=0, pin_memory=False)
    seen = []
    for batch in spec.dataloader:
        for ids, labels, numbers in zip(batch['input_ids'].numpy(), batch['labels'].numpy(), batch['sequence_id'].numpy(), strict=True):
            assert (numbers.max() > 0) <= packing
            seen += [(ids[numbers == n].tolist(), labels[numbers == n].tolist()) for n in range(numbers.max() + 1)]
    assert sorted(seen) == sorted(EXPECTED)
    assert not any(name.startswith('cache-') for name in (p.name for p in (tmp_path / 'rows').iterdir())), 'the folder of the data stays as it was'


def test_a_document_that_is_trained_from_its_first_token_stays_one_document() -> None:
    rows = datasets.Dataset.from_list([{'input_ids': [7, 8, 9, 5, 6, 0], 'labels': [7, 8, 9, 5, 6, -100], 'sequence_id': [0, 0, 0, 1, 1, -1]}])
    found = one_row_per_document(rows, 'rows', 'f' * 16).to_list()
    assert found == [{'input_ids': [7, 8, 9], 'labels': [-100, 8, 9]}, {'input_ids': [5, 6], 'labels': [-100, 6]}]


def test_other_rows_are_left_alone_and_uneven_ones_named() -> None:
    plain = datasets.Dataset.from_list([{'input_ids': [1], 'labels': [-100]}])
    assert one_row_per_document(plain, 'rows', 'f') is plain
    uneven = [{'input_ids': [1, 2], 'labels': [1, 2], 'sequence_id': [0, 0]}, {'input_ids': [1, 2], 'labels': [1], 'sequence_id': [0, 0]}]
    with pytest.raises(DataError, match='rows: row 1 has 2 input_ids but 1 labels; they stand side by side'):
        one_row_per_document(datasets.Dataset.from_list(uneven), 'rows', 'f')
