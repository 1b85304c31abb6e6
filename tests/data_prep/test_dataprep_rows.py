"""dataprep: packing as documented, token for token; masks, BOS and EOS, drops."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfoundry.command_utils.data_prep.dataprep.packing import TokenisedRow, pack_rows
from llmfoundry.command_utils.data_prep.dataprep.rendering import Renderer
from llmfoundry.data.prompts import DefaultPrompt, DollyFormat, Prompt, PromptFormat, Role, UserAssistantFormat, VicunaFormat
from llmfoundry.errors import DataError
from llmfoundry.tokenizers.build import build_tokenizer


def _row(*ids: int, prompt: int = 1) -> TokenisedRow:
    return TokenisedRow(list(ids), prompt, f'text{ids[1]}')


def test_the_documented_example() -> None:
    rows = [_row(1, 100, 100, 2), _row(1, 200, 200, 2, prompt=2), _row(1, 300, 300, 300, 300, 2)]
    assert list(pack_rows(rows, 9)) == [
        {
            'input_ids': [1, 100, 100, 2, 1, 200, 200, 2, 0], 'labels': [-100, 100, 100, 2, -100, -100, 200, 2, -100],
            'attention_mask': [1, 1, 1, 1, 1, 1, 1, 1, 0], 'sequence_id': [0, 0, 0, 0, 1, 1, 1, 1, -1], 'full_text': 'text100\ntext200',
        },
        {
            'input_ids': [1, 300, 300, 300, 300, 2, 0, 0, 0], 'labels': [-100, 300, 300, 300, 300, 2, -100, -100, -100],
            'attention_mask': [1, 1, 1, 1, 1, 1, 0, 0, 0], 'sequence_id': [0, 0, 0, 0, 0, 0, -1, -1, -1], 'full_text': 'text300',
        },
    ]  # fmt: skip


def test_a_row_of_exactly_chunksize_is_kept_and_a_longer_one_refused() -> None:
    assert [p['input_ids'] for p in pack_rows([_row(1, 5, 2), _row(1, 6, 6, 2)], 4, -1)] == [[1, 5, 2, 0], [1, 6, 6, 2]]
    with pytest.raises(ValueError, match='row 1 has 5 tokens, which do not fit into chunksize=4; a row is never split'):
        list(pack_rows([_row(1, 2), _row(1, 7, 7, 7, 2)], 4))
    assert list(pack_rows([], 4)) == []


@given(st.lists(st.integers(1, 12), max_size=40), st.integers(12, 30))
def test_packing_keeps_every_row_whole_and_in_order(lengths: list[int], chunksize: int) -> None:
    rows = [TokenisedRow([i + 1] * n, n // 2, '') for i, n in enumerate(lengths)]
    seen: list[tuple[list[int], list[int]]] = []
    fill = []
    for pack in pack_rows(rows, chunksize):
        assert {len(pack[k]) for k in ('input_ids', 'labels', 'attention_mask', 'sequence_id')} == {chunksize}
        assert [s >= 0 for s in pack['sequence_id']] == [m == 1 for m in pack['attention_mask']]
        for number in range(max(pack['sequence_id']) + 1):
            where = [i for i, s in enumerate(pack['sequence_id']) if s == number]
            seen.append(([pack['input_ids'][i] for i in where], [pack['labels'][i] for i in where]))
        fill.append((sum(pack['attention_mask']), where[0]))
    assert seen == [(r.input_ids, [-100] * r.num_prompt_tokens + r.input_ids[r.num_prompt_tokens :]) for r in rows]
    # A pack was closed only because the next row did not fit.
    firsts = [pack['input_ids'].index(pack['input_ids'][0]) for pack in pack_rows(rows, chunksize)]
    assert all(index == 0 for index in firsts)
    starts = [next(n for i, n in enumerate(lengths) if i + 1 == pack['input_ids'][0]) for pack in pack_rows(rows, chunksize)]
    assert all(used + following > chunksize for (used, _), following in zip(fill, starts[1:], strict=False))


@pytest.fixture(scope='module')
def gpt2() -> Any:
    return build_tokenizer('llmfoundry://gpt2')


@pytest.fixture(scope='module')
def with_bos() -> Any:
    """A tokenizer that puts <s> before every text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ['<unk>', '<s>', '</s>', 'USER', 'ASSISTANT', ':', 'hi', 'you', 'yes', 'User', 'Assistant']
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token='<unk>'))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token='<s>', eos_token='</s>', unk_token='<unk>')


def _labels(renderer: Renderer, **row: Any) -> tuple[list[int], list[int]]:
    rows, counts = renderer({k: [v] for k, v in row.items()}, 0)
    assert counts.kept == 1
    pack = next(pack_rows(rows, len(rows[0].input_ids)))
    return pack['input_ids'], pack['labels']


def test_prompt_and_response_prefix_are_masked_and_the_rest_is_trained(gpt2: Any) -> None:
    ids, labels = _labels(Renderer(DefaultPrompt(), gpt2, 100), input='Name a river.', response='The Danube.', contexts=['Rivers of Europe.'])
    assert gpt2.decode(ids) == 'Context: Rivers of Europe.\nInput: Name a river.\nResponse: The Danube.<|endoftext|>'
    trained = [i for i, label in enumerate(labels) if label != -100]
    # One run to the end: the first word with the space that the tokenizer joins to it, up to the terminator.
    assert trained == list(range(trained[0], len(ids))) and [labels[i] for i in trained] == ids[trained[0] :]
    assert gpt2.decode(ids[trained[0] :]) == ' The Danube.<|endoftext|>'
    assert ids[: trained[0]] == gpt2('Context: Rivers of Europe.\nInput: Name a river.\nResponse:')['input_ids']


@pytest.mark.parametrize('style', [PromptFormat(), UserAssistantFormat(), DollyFormat()], ids=lambda s: type(s).__name__)
def test_the_model_is_trained_from_where_generation_starts(gpt2: Any, style: PromptFormat) -> None:
    prompt = DefaultPrompt(format=style)
    ids, labels = _labels(Renderer(prompt, gpt2, 100), input='Ünïcode ☂?', response='Ja ☂.')
    generation = gpt2(prompt.render('Ünïcode ☂?'))['input_ids']
    assert ids[: len(generation)] == generation
    assert labels == [-100] * len(generation) + ids[len(generation) :]


def test_one_bos_and_one_eos(with_bos: Any) -> None:
    for style in (UserAssistantFormat(), VicunaFormat()):
        ids, labels = _labels(Renderer(Prompt(format=style), with_bos, 100), input='hi', response='yes you')
        assert ids.count(1) == 1 and ids[0] == 1
        assert ids.count(2) == 1 and ids[-1] == labels[-1] == 2
        assert [i for i in labels if i != -100] == [8, 7, 2]


def test_eos_is_not_doubled_and_not_taken_for_the_prompts(gpt2: Any) -> None:
    ids, _ = _labels(Renderer(Prompt(format=PromptFormat(EOS='<|endoftext|>')), gpt2, 100), input='a', response='b')
    assert ids.count(50256) == 1 and ids[-1] == 50256
    ids, _ = _labels(Renderer(Prompt(format=PromptFormat(BOS='<|endoftext|>')), gpt2, 100), input='a', response='b')
    assert [ids[0], ids[-1]] == [50256, 50256] and ids.count(50256) == 2


def test_drops_are_counted(gpt2: Any) -> None:
    renderer = Renderer(Prompt(format=PromptFormat(response=Role(':'))), gpt2, 6)
    columns = {'input': ['a', 'a', 'a', 'a', 'a'], 'response': ['b b', 'b b b', None, '  ', 'b']}
    rows, counts = renderer(columns, 0)
    lengths = [len(r.input_ids) for r in rows]
    assert max(lengths) == 6, 'the row of exactly chunksize is there'
    assert (counts.rows, counts.kept, counts.too_long, counts.without_response, counts.longest) == (5, 2, 1, 2, 7)


@pytest.mark.parametrize(('row', 'message'), [
    ({'input': 3, 'response': 'b'}, r"rows.jsonl \(sample 17\): input must be text, got int '3'"),
    ({'input': None, 'response': 'b'}, r"sample 17\): input must be text, got NoneType 'None'"),
    ({'input': 'a', 'response': ['b']}, r'sample 17\): response must be text, got list'),
    ({'input': 'a', 'response': 'b', 'contexts': 'c'}, r"sample 17\): contexts must be a list of texts, got str 'c'"),
    ({'input': 'a', 'response': 'b', 'contexts': [1]}, r'sample 17\): contexts must be a list of texts, got list'),
])  # fmt: skip
def test_bad_rows_are_named(gpt2: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Renderer(Prompt(), gpt2, 100, 'rows.jsonl')({k: [v] for k, v in row.items()}, 17)


class _Backwards(Prompt):
    def render(self, input: Any, response: Any = None, contexts: Any = (), history: Any = ()) -> str:
        if input == 'boom':
            raise RuntimeError('no')
        return f'{response or ""}{input}'


def test_a_prompt_class_that_contradicts_itself_is_refused(gpt2: Any) -> None:
    renderer = Renderer(_Backwards(), gpt2, 100, 'rows')
    with pytest.raises(DataError, match=r"rows \(sample 0\): _Backwards.render gives a text with the response, 'RQ', that does not begin with the one without it, 'Q'"):
        renderer({'input': ['Q'], 'response': ['R']}, 0)
    with pytest.raises(DataError, match=r'rows \(sample 1\): _Backwards.render failed: RuntimeError: no'):
        renderer({'input': ['', 'boom'], 'response': [None, 'R']}, 0)
