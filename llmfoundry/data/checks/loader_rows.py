"""The first rows of a loader, for the linter: as the source has them (one example each, with its turns and roles), and as the loader lays them out in a batch.

Rows are fetched by number and collated by a copy of the loader's own collator. The loader is not iterated, since that would start its workers and move the position that a checkpoint saves.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from typing import Any, Iterator, Mapping, Sequence

import numpy as np
from streaming import StreamingDataset

from llmfoundry.data.checks.findings import LintCounts
from llmfoundry.data.checks.mask_rules import MaskSettings
from llmfoundry.data.checks.rows import FINETUNING, MASKED_TEXT, TEXT, LintRow, turns_of
from llmfoundry.data.checks.template_rules import roles_of
from llmfoundry.data.finetuning import preprocessing
from llmfoundry.data.finetuning.dataset_block import FinetuningDataBlock, normalise
from llmfoundry.data.finetuning.examples import validate_chat_example
from llmfoundry.data.finetuning.packed_dataset import PackedDataset
from llmfoundry.data.finetuning.sources import load_rows
from llmfoundry.data.finetuning.store import StoreCounts
from llmfoundry.data.finetuning.streaming_dataset import StreamingFinetuningDataset
from llmfoundry.data.finetuning.targets import holds_labels_of_ids
from llmfoundry.data.finetuning.tokenization import tokenize_formatted_example
from llmfoundry.data.text_data import StreamingTextDataset
from llmfoundry.errors import BaseContextualError

__all__ = ['LoaderSample', 'Messages', 'sample_loader', 'source_conversations']

# Rows as the loader lays them out: a collator is wrong in every batch or in none.
_BATCH_ROWS = 8
_EXAMPLES_PER_PACKED_ROW = 8
Messages = Sequence[Mapping[str, Any]]


@dataclass
class LoaderSample:
    """What the linter gets of a loader.

    Args:
        settings: of the loader.
        rows: one example each; counted and shown.
        batch_rows: as they are in a batch, packed and padded; only checked.
        conversations: (name, messages) of rows that are chats.
        source: counts over the whole data set, as far as the loader knows them.
        separator_id: token between documents of a text loader.
    """

    settings: MaskSettings
    rows: list[LintRow] = field(default_factory=list)
    batch_rows: list[LintRow] = field(default_factory=list)
    conversations: list[tuple[str, Messages]] = field(default_factory=list)
    source: LintCounts = field(default_factory=LintCounts)
    separator_id: int | None = None


def sample_loader(loader: Any, dataset_block: Mapping[str, Any], tokenizer: Any, num_rows: int, vocab_size: int | None = None) -> LoaderSample | None:
    """The first rows of a loader that this package built.

    Args:
        loader: a DataSpec or DataLoader.
        dataset_block: its ``dataset`` block.
        tokenizer: as the loader uses it.
        num_rows: examples to look at.
        vocab_size: rows of the model's embedding, None if unknown.

    Returns:
        None for a loader of another kind, such as a plug-in's, or with a collator whose batches have no ``input_ids`` and ``labels``.
    """
    loader = getattr(loader, 'dataloader', loader)
    dataset, collate = getattr(loader, 'dataset', None), getattr(loader, 'collate_fn', None)
    if isinstance(dataset, StreamingTextDataset):
        return _text(dataset, collate, dataset_block, num_rows, vocab_size)
    if not isinstance(dataset, (PackedDataset, StreamingFinetuningDataset)):
        return None
    block = normalise(dataset_block, preprocessing.registered_names())
    sample = LoaderSample(MaskSettings(block.target_prompts, block.target_responses, block.max_seq_len, block.packing is not None, vocab_size))
    if isinstance(dataset, PackedDataset):
        _add_store_rows(sample, dataset, _fresh(collate), block, tokenizer, num_rows)
    else:
        _add_streamed_rows(sample, dataset, _fresh(collate), block, tokenizer, num_rows)
    return sample if sample.rows else None


def _is_known(batch: Any) -> bool:
    """Whether a batch has the form of ours; collators of plug-ins may make any."""
    return isinstance(batch, Mapping) and {'input_ids', 'labels'} <= set(batch)


def _fresh(collate: Any) -> Any:
    """A copy of a collator and of the one in it: some change with the first batch, which is the training run's."""
    fresh = copy.copy(collate)
    for inner in ('collator', 'base_collator'):
        if hasattr(fresh, inner):
            setattr(fresh, inner, _fresh(getattr(fresh, inner)))
    return fresh


def _text(dataset: StreamingTextDataset, collate: Any, block: Mapping[str, Any], num_rows: int, vocab_size: int | None) -> LoaderSample | None:
    kind = MASKED_TEXT if block.get('mlm_probability') else TEXT
    batch = _fresh(collate)([dataset[i] for i in range(min(num_rows, dataset.num_samples))])
    if not _is_known(batch):
        return None
    separators = [block[key] for key in ('eos_token_id', 'bos_token_id') if block.get(key) is not None]
    return LoaderSample(
        MaskSettings(max_seq_len=dataset.max_seq_len, vocab_size=vocab_size, packed=bool(separators)),
        rows=[LintRow.from_batch(str(i), batch, i, kind) for i in range(len(batch['input_ids']))],
        source=LintCounts(source_rows=dataset.num_samples),
        separator_id=separators[0] if separators else None,
    )


def _add_store_rows(sample: LoaderSample, dataset: PackedDataset, collate: Any, block: FinetuningDataBlock, tokenizer: Any, num_rows: int) -> None:
    store: Any = dataset.store
    sample.source = _source_counts(store.counts)
    numbers = [int(row) for row in store.row_ids[:num_rows]]
    formatted = _formatted_rows(block, tokenizer, numbers)
    for index, (number, example) in enumerate(zip(numbers, formatted, strict=True)):
        if block.decoder_only_format:
            row = LintRow(str(number), *store.row(index))
        else:
            row = LintRow.from_encoder_decoder_batch(str(number), collate([dataset[index]]), 0)
        _add_row(sample, row, example, tokenizer)
    if block.decoder_only_format:
        batch = collate([dataset[row] for row in range(min(_BATCH_ROWS, len(dataset)))])
        sample.batch_rows = list(_rows_of_batch(batch))


def _formatted_rows(block: FinetuningDataBlock, tokenizer: Any, numbers: Sequence[int]) -> list[Mapping[str, Any]]:
    """The examples behind rows of the store, before they were tokenised."""
    assert block.hf_name is not None
    rows = load_rows(block.hf_name, block.split, block.hf_kwargs, block.safe_load)
    fn = preprocessing.resolve_preprocessing_fn(block.preprocessing_fn, block.hf_name)
    return [rows[number] if fn is None else preprocessing.apply(fn, rows[number], tokenizer) for number in numbers]


def _add_streamed_rows(sample: LoaderSample, dataset: StreamingFinetuningDataset, collate: Any, block: FinetuningDataBlock, tokenizer: Any, num_rows: int) -> None:
    sample.source = LintCounts(source_rows=dataset.num_samples)
    # A packing collator holds the one that lays out single examples.
    single = getattr(collate, 'collator', collate)
    examples = []
    for index in range(min(num_rows, dataset.num_samples)):
        # The columns themselves; `dataset[index]` gives them tokenised.
        raw = StreamingDataset.get_item(dataset, index)
        examples.append(dataset[index])
        batch = single([examples[-1]])
        if not _is_known(batch):
            return
        if block.decoder_only_format:
            row = LintRow.from_batch(str(index), batch, 0)
            real = row.is_real()
            row = LintRow(str(index), row.ids[real], row.targets[real])
        else:
            row = LintRow.from_encoder_decoder_batch(str(index), batch, 0)
        _add_row(sample, row, _streamed_example(dataset, raw, examples[-1]), tokenizer)
    if block.decoder_only_format:
        sample.batch_rows = list(_rows_of_batch(collate(examples[: _BATCH_ROWS * (_EXAMPLES_PER_PACKED_ROW if sample.settings.packed else 1)])))


def _streamed_example(dataset: StreamingFinetuningDataset, raw: Mapping[str, Any], tokenised: Mapping[str, Any]) -> Mapping[str, Any]:
    if 'turns' in raw or {'input_ids', 'labels'} <= set(raw):
        return tokenised
    if 'messages' in raw:
        messages = raw['messages']
        return {'messages': json.loads(messages) if isinstance(messages, (str, bytes)) else messages}
    if {'prompt', 'response'} <= set(raw) or {'prompt', 'completion'} <= set(raw) or dataset.preprocessing_fn is None:
        return tokenised
    return preprocessing.apply(dataset.preprocessing_fn, raw, dataset.tokenizer)


def _add_row(sample: LoaderSample, row: LintRow, example: Mapping[str, Any], tokenizer: Any) -> None:
    """Adds a row with what its example says about turns and roles."""
    turns = tokenize_formatted_example(example, tokenizer)['turns']
    if not any(holds_labels_of_ids(turn) for turn in turns) and not row.turns:
        row = replace(row, turns=turns_of(turns, len(row.ids)))
    messages = example.get('messages')
    if messages is not None:
        row = replace(row, messages=roles_of(messages))
        sample.conversations.append((row.name, messages))
    limit = sample.settings.max_seq_len
    whole = sum(len(turn['input_ids']) + len(turn['labels']) for turn in turns) if row.turns else 0
    sample.rows.append(replace(row, truncated=row.decoder_only and limit is not None and whole > limit))


def _rows_of_batch(batch: Any) -> Iterator[LintRow]:
    for index in range(len(batch['input_ids']) if _is_known(batch) else 0):
        if batch.get('total_tokens') is not None and int(np.asarray(batch['total_tokens'])[index]) == 0:
            # A row without documents that only keeps a rank busy.
            continue
        yield LintRow.from_batch(f'{index} of a batch', batch, index, FINETUNING)


def _source_counts(counts: StoreCounts) -> LintCounts:
    dropped = {'empty prompt': counts.empty_prompt, 'empty response': counts.empty_response, 'nothing to train': counts.no_target}
    return LintCounts(source_rows=counts.rows, source_kept=counts.kept, source_truncated=counts.truncated, source_dropped=dropped)


def source_conversations(dataset_block: Mapping[str, Any], tokenizer: Any, num_rows: int) -> list[tuple[str, Messages]]:
    """(row, messages) of the first rows of a Hugging Face source that are chats, read without tokenising; empty if they cannot be read."""
    try:
        block = normalise(dataset_block, preprocessing.registered_names())
        if block.hf_name is None:
            return []
        rows = load_rows(block.hf_name, block.split, block.hf_kwargs, block.safe_load)
        fn = preprocessing.resolve_preprocessing_fn(block.preprocessing_fn, block.hf_name)
        examples = [(str(i), rows[i] if fn is None else preprocessing.apply(fn, rows[i], tokenizer)) for i in range(min(num_rows, len(rows)))]
        found = []
        for name, example in examples:
            if 'messages' in example:
                validate_chat_example(example)
                found.append((name, example['messages']))
        return found
    except (BaseContextualError, ValueError, KeyError, OSError):
        # The error of the loader itself is reported.
        return []
