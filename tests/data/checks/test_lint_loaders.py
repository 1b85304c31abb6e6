"""The linter on real loaders: every form of data that is as it should be gives no finding, and what a loader does wrong is found."""

from __future__ import annotations

import copy
import json
import logging
import time
from pathlib import Path
from typing import Any, Mapping

import datasets
import numpy as np
import pytest
from streaming import MDSWriter

from llmfoundry.command_utils.data_prep.convert_finetuning_dataset import convert_finetuning_dataset
from llmfoundry.command_utils.data_prep.dataprep import dataprep
from llmfoundry.command_utils.data_prep.tokenize_data import tokenize_data
from llmfoundry.data.checks import loader_rows
from llmfoundry.data.checks.first_rows import LintedLoader, lint_batches, lint_failed_loader, lint_first_rows, lint_loader
from llmfoundry.data.checks.rows import TEXT
from llmfoundry.data.finetuning.collator import Seq2SeqFinetuningCollator
from llmfoundry.data.finetuning.dataloader import build_finetuning_dataloader
from llmfoundry.data.finetuning.tasks import dataset_constructor
from llmfoundry.data.text_data import build_text_dataloader
from llmfoundry.errors import BaseContextualError, InvalidConversationError, MaskLintError
from tests.data.checks.test_template_rules import END_IN_NEXT_HEADER, REWRITES
from tests.helpers.chat_rows import TALK, TOOL_TALK, tokenizer_with
from tests.helpers.mds import write_text_mds, write_token_mds
from tests.helpers.tokenizers import gpt2_tokenizer, save_tokenizer, smollm2_tokenizer

PAIRS = [{'prompt': f'How much is {i} and 1?\n', 'response': f'It is {i + 1}.'} for i in range(60)]
CHATS = [{'messages': talk} for talk in (TALK, TOOL_TALK) * 30]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('LLMFOUNDRY_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'datasets')


@pytest.fixture(scope='module')
def smollm2() -> Any:
    return smollm2_tokenizer()


def jsonl(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return {'hf_name': 'json', 'hf_kwargs': {'data_files': {'train': str(path)}}, 'split': 'train', 'shuffle': True}


def block(source: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    return {**source, 'max_seq_len': 128, 'decoder_only_format': True, **settings}


def built(tokenizer: Any, dataset: Mapping[str, Any]) -> Any:
    return build_finetuning_dataloader(tokenizer, 4, dataset, num_workers=0, pin_memory=False)


def linted(tokenizer: Any, dataset: Mapping[str, Any], **kwargs: Any) -> LintedLoader:
    result = lint_loader(built(tokenizer, dataset), tokenizer, dataset, 'train_loader', **kwargs)
    assert result is not None
    return result


def rules(item: LintedLoader) -> list[str]:
    return list(dict.fromkeys(f.rule for f in item.report.findings))


def mds(folder: Path, columns: dict[str, str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    with MDSWriter(out=str(folder), columns=columns) as out:
        for row in rows:
            out.write(row)
    return {'local': str(folder), 'shuffle': True}


def turn_of(tokenizer: Any, pair: Mapping[str, str]) -> dict[str, list[int]]:
    return {'input_ids': tokenizer(pair['prompt'])['input_ids'], 'labels': tokenizer(pair['response'])['input_ids']}


SETTINGS = [
    {},
    {'packing': True},
    {'packing_ratio': 3.0, 'target_responses': 'all'},
    {'target_prompts': 'all', 'target_responses': 'all'},
    {'target_prompts': 'length>=20'},
    {'pad_to_longest': True, 'allow_pad_trimming': True},
]


@pytest.mark.parametrize('settings', SETTINGS, ids=str)
@pytest.mark.parametrize('rows', [PAIRS, CHATS], ids=['pairs', 'chats'])
def test_files_of_pairs_and_chats(tmp_path: Path, smollm2: Any, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    item = linted(smollm2, block(jsonl(tmp_path / 'rows.jsonl', rows), **settings))
    assert item.report.findings == []
    counts = item.report.counts
    assert (counts.rows, counts.source_rows, counts.source_kept, counts.truncated) == (50, 60, 60, 0)
    assert {row.name for row in item.rows[:50]} == {str(i) for i in range(50)} and len(item.rows) > 50
    if rows is CHATS:
        assert dict(counts.messages) == {'user': 75, 'assistant': 75, 'system': 25, 'tool': 25}
        assert counts.trained_turns == (75 if settings.get('target_responses') == 'all' else 50)


def test_a_tokenizer_without_template_or_pad(tmp_path: Path) -> None:
    """Pairs with GPT-2: pad becomes eos, and the end of each answer stays trained."""
    item = linted(gpt2_tokenizer(), block(jsonl(tmp_path / 'rows.jsonl', PAIRS)))
    assert item.report.findings == []


def test_document_000_functions(tmp_path: Path, smollm2: Any) -> None:
    """A registered function that tokenises by itself."""
    name = f'check/{tmp_path.name}'

    @dataset_constructor.register(name)
    def tokenise(example: Mapping[str, Any], tokenizer: Any) -> Any:
        return tokenizer(text=example['prompt'], text_target=example['response'])

    files = jsonl(tmp_path / 'rows.jsonl', PAIRS)
    item = linted(smollm2, block({'name': name, 'kwargs': files['hf_kwargs'], 'split': 'train', 'shuffle': False}))
    assert item.report.findings == [] and item.report.counts.trained_turns == 50


def test_rows_tokenised_before(tmp_path: Path, smollm2: Any) -> None:
    """Rows with ``labels`` beside ``input_ids``, as documents 001 and 004 prepare them, in a folder of ``save_to_disk``."""
    rows = []
    for pair in PAIRS:
        turn = turn_of(smollm2, pair)
        response = [*turn['labels'], smollm2.eos_token_id]
        rows.append({'input_ids': turn['input_ids'] + response, 'labels': [-100] * len(turn['input_ids']) + response})
    datasets.DatasetDict({'train': datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / 'saved'))
    source = {'hf_name': str(tmp_path / 'saved'), 'split': 'train', 'shuffle': False}
    for settings in ({}, {'packing': True}):
        assert linted(smollm2, block(source, **settings)).report.findings == []
    for row in rows:
        row['labels'][-1] = -100
    datasets.DatasetDict({'train': datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / 'cut'))
    found = linted(smollm2, block({**source, 'hf_name': str(tmp_path / 'cut')}))
    assert rules(found) == ['terminator-not-trained']
    assert found.report.errors[0].snippet == '... 0 and 1?\\n[[It is 1.]]<|im_end|>'


@pytest.mark.parametrize('packing', [{}, {'packing_ratio': 2.0}, {'packing_ratio': 'auto'}], ids=str)
@pytest.mark.parametrize('form', ['turns', 'bytes', 'text', 'chats'])
def test_mds_forms(tmp_path: Path, smollm2: Any, form: str, packing: dict[str, Any]) -> None:
    if form == 'turns':
        columns, rows = {'turns': 'json'}, [{'turns': [turn_of(smollm2, p)]} for p in PAIRS]
    elif form == 'bytes':
        turns = [turn_of(smollm2, p) for p in PAIRS]
        columns, rows = {'input_ids': 'bytes', 'labels': 'bytes'}, [{k: np.array(v).tobytes() for k, v in t.items()} for t in turns]
    elif form == 'text':
        columns, rows = {'prompt': 'str', 'response': 'str'}, PAIRS
    else:
        columns, rows = {'messages': 'json'}, CHATS
    item = linted(smollm2, block(mds(tmp_path / 'mds', columns, rows), target_responses='all', **packing))
    assert item.report.findings == []
    assert item.report.counts.rows == 50 and item.report.counts.trained_tokens > 200
    assert bool(item.report.counts.messages) == (form == 'chats')


def test_encoder_decoder(tmp_path: Path, smollm2: Any) -> None:
    item = linted(smollm2, block(jsonl(tmp_path / 'rows.jsonl', PAIRS), decoder_only_format=False))
    assert item.report.findings == []
    row = item.rows[3]
    text = smollm2.decode(row.ids[row.targets])
    assert (text, smollm2.decode(row.ids[~row.targets])) == ('It is 4.<|im_end|>', 'How much is 3 and 1?\n')


def text_block(folder: Path, **settings: Any) -> dict[str, Any]:
    return {'local': str(folder), 'shuffle': False, 'max_seq_len': 16, **settings}


def test_text(tmp_path: Path) -> None:
    """Rows of documents with their ends; ends that are named but not there; ids beyond the model."""
    tokenizer = gpt2_tokenizer()
    with_ends = [np.array([10, 11, 12, 50256] * 4, np.int32) + 0 for _ in range(20)]
    folder = write_token_mds(tmp_path / 'with', with_ends)

    def check(folder: Path, vocab_size: int | None = None, **settings: Any) -> LintedLoader:
        dataset = text_block(folder, **settings)
        loader = build_text_dataloader(tokenizer, 4, dataset, drop_last=False, num_workers=0, pin_memory=False)
        item = lint_loader(loader, tokenizer, dataset, 'train_loader', 50, vocab_size)
        assert item is not None and item.rows[0].kind == TEXT and item.report.counts.rows == 20
        return item

    assert rules(check(folder)) == rules(check(folder, eos_token_id=50256)) == []
    counts = check(folder, eos_token_id=50256).report.counts
    # Nothing predicts the first token of a row.
    assert (counts.documents, counts.tokens, counts.trained_tokens) == (80, 320, 300)
    assert rules(check(folder, vocab_size=50000)) == ['tokenizer-larger-than-model', 'token-outside-vocabulary']
    plain = write_token_mds(tmp_path / 'without', [np.arange(16, dtype=np.int32)] * 20)
    assert rules(check(plain, eos_token_id=50256)) == ['separator-missing']


def test_a_template_that_never_trains_its_end(tmp_path: Path) -> None:
    tokenizer = tokenizer_with('chatml', END_IN_NEXT_HEADER)
    dataset = block(jsonl(tmp_path / 'rows.jsonl', CHATS), target_responses='all')
    assert 'terminator-not-trained' in rules(linted(tokenizer, dataset))
    with pytest.raises(MaskLintError) as raised:
        lint_first_rows(built(tokenizer, dataset), tokenizer, dataset)
    assert raised.value.rules == ('terminator-not-trained',)
    assert '<|im_end|>' in str(raised.value) and 'row 0' in str(raised.value)


class _MasksPadIds(Seq2SeqFinetuningCollator):
    """The mistake of many collators: padding is found by comparing ids, and pad is eos."""

    def batch_of_rows(self, rows: Any) -> dict[str, Any]:
        batch = super().batch_of_rows(rows)
        batch['labels'][batch['input_ids'] == self.tokenizer.pad_token_id] = -100
        return batch


class _TrainsPadding(Seq2SeqFinetuningCollator):
    def batch_of_rows(self, rows: Any) -> dict[str, Any]:
        batch = super().batch_of_rows(rows)
        batch['labels'] = batch['labels'].masked_scatter(batch['attention_mask'] == 0, batch['input_ids'][batch['attention_mask'] == 0])
        return batch


class _MergesDocuments(Seq2SeqFinetuningCollator):
    def batch_of_rows(self, rows: Any) -> dict[str, Any]:
        batch = super().batch_of_rows(rows)
        del batch['sequence_id']
        return batch


class _TrainsFirstTokens(Seq2SeqFinetuningCollator):
    def batch_of_rows(self, rows: Any) -> dict[str, Any]:
        batch = super().batch_of_rows(rows)
        batch['labels'][:, 1:][batch['sequence_id'].diff(dim=-1) == 1] = 5
        return batch


@pytest.mark.parametrize(
    ('collator', 'settings', 'rule'),
    [
        (_MasksPadIds, {}, 'terminator-not-trained'),
        (_TrainsPadding, {}, 'trained-padding'),
        (_MergesDocuments, {'packing': True}, 'sequence-ids'),
        (_TrainsFirstTokens, {'packing': True}, 'first-token-trained'),
    ],
)
def test_collators_that_are_wrong(tmp_path: Path, smollm2: Any, collator: type, settings: dict[str, Any], rule: str) -> None:
    """The batch is looked at too, since a store that is right says nothing of what is made of it."""
    dataset = block(jsonl(tmp_path / 'rows.jsonl', PAIRS), **settings)
    spec = built(smollm2, dataset)
    spec.dataloader.collate_fn.__class__ = collator
    item = lint_loader(spec, smollm2, dataset, 'train_loader')
    assert item is not None and rule in rules(item)


def test_targets_that_are_not_those_asked_for(tmp_path: Path, smollm2: Any) -> None:
    """The store was made for other settings than the block says."""
    asked = block(jsonl(tmp_path / 'rows.jsonl', CHATS), target_responses='last')
    item = lint_loader(built(smollm2, {**asked, 'target_responses': 'all'}), smollm2, asked, 'train_loader')
    assert item is not None and rules(item) == ['history-trained']
    item = lint_loader(built(smollm2, {**asked, 'target_prompts': 'all'}), smollm2, asked, 'train_loader')
    assert item is not None and rules(item)[0] == 'prompt-trained' and 'history-trained' not in rules(item)


def test_truncated_and_dropped_rows_are_counted(tmp_path: Path, smollm2: Any) -> None:
    long = [{'prompt': 'word ' * (20 if i % 2 else 400), 'response': 'word ' * 30} for i in range(40)] + [{'prompt': 'a', 'response': ''}] * 10
    with pytest.warns(UserWarning, match='dropped 30 of 50'):
        item = linted(smollm2, block(jsonl(tmp_path / 'rows.jsonl', long), max_seq_len=32))
    counts = item.report.counts
    assert (counts.source_rows, counts.source_kept, counts.source_truncated) == (50, 20, 20)
    assert counts.source_dropped == {'empty prompt': 0, 'empty response': 10, 'nothing to train': 20}
    assert (counts.rows, counts.truncated) == (20, 20) and item.rows[0].truncated
    assert rules(item) == ['many-truncated', 'many-dropped'] and not item.report.errors


def test_prompts_that_fill_the_row_in_shards(tmp_path: Path, smollm2: Any) -> None:
    """Shards are read as they are, so such rows stay; they are a warning, and no reason to stop."""
    rows = [{'prompt': 'word ' * (4 if i % 20 else 400), 'response': 'yes'} for i in range(60)]
    item = linted(smollm2, block(mds(tmp_path / 'mds', {'prompt': 'str', 'response': 'str'}, rows), max_seq_len=32))
    assert rules(item) == ['no-target'] and not item.report.errors


def test_the_loader_is_left_as_it_was(tmp_path: Path, smollm2: Any) -> None:
    """Neither its position nor the state of its collator, whose first batch is never trimmed."""
    dataset = block(jsonl(tmp_path / 'rows.jsonl', PAIRS), allow_pad_trimming=True)
    untouched, checked = built(smollm2, dataset), built(smollm2, dataset)
    lint_first_rows(checked, smollm2, dataset)
    assert checked.dataloader.dataset.sampler._batches_out is None
    for a, b in zip(untouched.dataloader, checked.dataloader, strict=True):
        assert a['input_ids'].shape == b['input_ids'].shape and (a['input_ids'] == b['input_ids']).all()


def test_start_up_is_fast_and_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """50 rows of 1,000 tokens, with a warning that does not stop the run."""
    tokenizer = gpt2_tokenizer()
    chats = [{'messages': [{'role': 'user', 'content': 'why ' * 400}, {'role': 'assistant', 'content': 'so ' * 400}]} for _ in range(60)]
    dataset = block(jsonl(tmp_path / 'rows.jsonl', chats), max_seq_len=1024)
    spec = built(tokenizer, dataset)
    start = time.perf_counter()
    with caplog.at_level(logging.WARNING):
        report = lint_first_rows(spec, tokenizer, dataset)
    assert time.perf_counter() - start < 4, 'promised 2 s on an idle machine'
    assert report is not None and report.counts.tokens > 40_000
    assert 'split-special-token' in caplog.text and not report.errors


def test_loaders_of_plug_ins(tmp_path: Path, smollm2: Any) -> None:
    """Their batches are all that is known."""
    dataset = block(jsonl(tmp_path / 'rows.jsonl', PAIRS), packing=True)
    batches = list(built(smollm2, dataset).dataloader)
    assert lint_loader(batches, smollm2, dataset, 'train_loader') is None
    assert lint_first_rows(batches, smollm2, dataset) is None
    item = lint_batches(batches, smollm2, 'train_loader')
    assert item.report.findings == [] and item.report.counts.documents == 60
    for batch in batches:
        batch['labels'][batch['input_ids'] == smollm2.eos_token_id] = -100
    assert 'terminator-not-trained' in rules(lint_batches(batches, smollm2, 'train_loader'))


def test_collators_of_plug_ins_may_make_other_batches(tmp_path: Path, smollm2: Any) -> None:
    """They are no reason to stop: what is not known cannot be judged."""
    stored, streamed = block(jsonl(tmp_path / 'rows.jsonl', PAIRS)), block(mds(tmp_path / 'mds', {'prompt': 'str', 'response': 'str'}, PAIRS))
    for dataset, rows in ((stored, 50), (streamed, None)):
        spec = built(smollm2, dataset)
        spec.dataloader.collate_fn = _other_batches
        item = lint_loader(spec, smollm2, dataset, 'train_loader')
        assert (item and len(item.rows)) == rows and (item is None or not item.report.findings)


def _other_batches(examples: Any) -> dict[str, Any]:
    return {'pixels': [0 for _ in examples]}


def test_a_loader_that_cannot_be_built(tmp_path: Path) -> None:
    """The template rewrites history, so the loader refuses the data; the check still says which rule and where."""
    tokenizer = tokenizer_with('chatml', REWRITES)
    dataset = block(jsonl(tmp_path / 'rows.jsonl', CHATS))
    with pytest.raises(InvalidConversationError) as raised:
        built(tokenizer, dataset)
    item = lint_failed_loader(raised.value, dataset, tokenizer, 'train_loader')
    assert rules(item) == ['history-rewritten', 'loader-fails'] and 'row 0' in item.report.errors[-1].seen


def test_rows_that_cannot_be_read_do_not_hide_the_error(tmp_path: Path, smollm2: Any) -> None:
    dataset = block({'hf_name': str(tmp_path / 'absent.jsonl'), 'split': 'train', 'shuffle': False})
    with pytest.raises(BaseContextualError) as raised:
        built(smollm2, dataset)
    item = lint_failed_loader(raised.value, dataset, smollm2, 'train_loader')
    assert rules(item) == ['loader-fails'] and 'absent.jsonl' in item.report.errors[0].seen
    assert loader_rows.source_conversations({'local': str(tmp_path), 'decoder_only_format': True}, smollm2, 5) == []


def test_two_begin_tokens(tmp_path: Path) -> None:
    """The prompt text holds the token that the tokenizer adds too."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizer_with('llama2'))
    bos = tokenizer.convert_tokens_to_ids('<s>')
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single='<s> $A', pair='<s> $A $B', special_tokens=[('<s>', bos)])
    assert tokenizer('a')['input_ids'][0] == bos
    good = linted(tokenizer, block(jsonl(tmp_path / 'good.jsonl', PAIRS)))
    assert good.report.findings == []
    assert linted(tokenizer, block(jsonl(tmp_path / 'chats.jsonl', [{'messages': TALK}] * 20))).report.findings == []
    twice = [{**pair, 'prompt': f'<s>{pair["prompt"]}'} for pair in PAIRS]
    item = linted(tokenizer, block(jsonl(tmp_path / 'twice.jsonl', twice)))
    assert rules(item) == ['double-bos'] and item.report.errors[0].snippet.startswith('<s><s>How much')


def test_raw_text_that_is_padded_here(tmp_path: Path) -> None:
    """Pad is eos; padding is no document end that somebody forgot to train."""
    tokenizer = gpt2_tokenizer(pad_token='<|endoftext|>')
    dataset = text_block(write_text_mds(tmp_path / 'text', [f'{i} words' for i in range(20)]))
    loader = build_text_dataloader(tokenizer, 4, dataset, drop_last=False, num_workers=0, pin_memory=False)
    item = lint_loader(loader, tokenizer, dataset, 'train_loader')
    assert item is not None and item.report.findings == [] and item.report.counts.padding_tokens > 200


def test_what_the_data_preparation_writes(tmp_path: Path, smollm2: Any) -> None:
    """Documents 001 and 004 and convert_finetuning_dataset, each with the command of its document."""
    tokenizer, folder = smollm2, save_tokenizer(smollm2, tmp_path / 'tokenizer')
    lines = tmp_path / 'lines.jsonl'
    lines.write_text(''.join(json.dumps({'prompt': p['prompt'], 'generation': p['response']}) + '\n' for p in PAIRS), encoding='utf-8')
    tokenize_data(str(lines), str(tmp_path / 'rows.arrow'), folder, 64)
    for source in ({'hf_name': str(tmp_path / 'rows.arrow')}, {'hf_name': 'arrow', 'hf_kwargs': {'data_files': {'train': str(tmp_path / 'rows.arrow')}}}):
        item = linted(tokenizer, block({**source, 'split': 'train', 'shuffle': False}, packing=True))
        assert item.report.findings == [] and item.report.counts.trained_turns == 50

    datasets.Dataset.from_list([{'input': p['prompt'], 'response': p['response']} for p in PAIRS]).save_to_disk(str(tmp_path / 'inputs'))
    config = tmp_path / 'dataprep.yaml'
    config.write_text(
        f'source_config: {{method: load_from_disk, kwargs: {{dataset_path: {tmp_path}/inputs}}}}\nbase_model: {folder}\nchunksize: 64\n'
        f'dataset_writer_config: {{method: save_to_disk, kwargs: {{dataset_path: {tmp_path}/chunks}}}}\n',
        encoding='utf-8',
    )
    dataprep(str(config))
    item = linted(tokenizer, block({'hf_name': str(tmp_path / 'chunks'), 'split': 'train', 'shuffle': False}))
    assert item.report.findings == [] and item.report.counts.source_rows == 60

    for name, tokenised in (('raw', {}), ('tokenised', {'tokenizer': folder, 'max_seq_len': 128})):
        files = jsonl(tmp_path / f'{name}.jsonl', PAIRS)['hf_kwargs']['data_files']['train']
        convert_finetuning_dataset('json', None, ['train'], None, [files], True, str(tmp_path / name), num_workers=1, **tokenised)
        item = linted(tokenizer, block({'local': str(tmp_path / name), 'split': 'train', 'shuffle': False}, packing=True))
        assert item.report.findings == [] and item.report.counts.trained_turns == 50
