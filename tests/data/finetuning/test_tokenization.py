"""Tokenising many examples at once: what the tokenizer gives one by one, whatever the batch and whatever the tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from llmfoundry import errors
from llmfoundry.data.finetuning import tokenization
from llmfoundry.data.finetuning.tokenization import is_valid_ift_example, tokenize_batch, tokenize_formatted_example
from llmfoundry.tokenizers import build_tokenizer
from tests.helpers.tokenizers import gpt2_tokenizer, neox_tokenizer, smollm2_tokenizer

EOS = 50256
BAD_CHAT = {'messages': [{'role': 'user', 'content': 'a'}]}
CHAT = {'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Yo'}, {'role': 'user', 'content': 'Q'}, {'role': 'assistant', 'content': 'A'}]}
TEXT = st.text(st.characters(codec='utf-8', exclude_categories=('Cs',)), max_size=20) | st.sampled_from([' <|endoftext|>', 'a<|im_end|>\n', '\n\n  x'])
PAIR = st.fixed_dictionaries({'prompt': TEXT, 'response': TEXT})


def with_specials(single: str) -> Any:
    """GPT-2 that puts its one special token where ``single`` says, for example ``<|endoftext|> $A``."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = gpt2_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[('<|endoftext|>', EOS)])
    return tokenizer


def turn(prompt: list[int], response: list[int]) -> dict[str, Any]:
    return {'turns': [{'input_ids': prompt, 'attention_mask': [1] * len(prompt), 'labels': response}]}


TOKENIZERS = {
    'gpt2': gpt2_tokenizer(), 'neox': neox_tokenizer(), 'smollm2': smollm2_tokenizer(), 'bos': with_specials('<|endoftext|> $A'), 'bos-eos': with_specials('<|endoftext|> $A <|endoftext|>'),
}


@settings(max_examples=40, deadline=None)
@given(st.lists(PAIR, min_size=1, max_size=4))
def test_pairs_are_tokenised_as_the_tokenizer_does(pairs: list[dict[str, str]]) -> None:
    for tokenizer in TOKENIZERS.values():
        expected = []
        for pair in pairs:
            one = tokenizer(text=pair['prompt'], text_target=pair['response'])
            bos, labels = tokenizer.bos_token_id, one['labels']
            if labels[:1] == [bos] and one['input_ids'][:1] == [bos]:
                labels = labels[1:]
            expected.append({'turns': [{'input_ids': one['input_ids'], 'attention_mask': one['attention_mask'], 'labels': labels}]})
        assert tokenize_batch(pairs, tokenizer) == expected


def test_special_tokens_of_pairs_are_the_tokenizers() -> None:
    pair = {'prompt': 'Hi', 'completion': ' there'}
    assert tokenize_formatted_example(pair, TOKENIZERS['gpt2']) == turn([17250], [612])
    assert tokenize_formatted_example(pair, TOKENIZERS['bos']) == turn([EOS, 17250], [612]), 'one BOS'
    assert tokenize_formatted_example(pair, TOKENIZERS['bos-eos']) == turn([EOS, 17250, EOS], [612, EOS])


@pytest.mark.parametrize('name', ['gpt2', 'bos', 'smollm2'])
def test_chats_get_no_special_tokens_but_those_of_the_template(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    first, second = tokenize_formatted_example(CHAT, tokenizer)['turns']
    system = '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' if name == 'smollm2' else ''
    assert tokenizer.decode(first['input_ids']) == f'{system}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
    assert tokenizer.decode(first['labels']) == 'Yo<|im_end|>\n'
    assert tokenizer.decode(second['input_ids']) == '<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n'
    assert tokenizer.decode(second['labels']) == 'A<|im_end|>\n'
    assert first['attention_mask'] == [1] * len(first['input_ids'])
    if name != 'smollm2':
        # The ids of the public release.
        assert first['input_ids'] == [27, 91, 320, 62, 9688, 91, 29, 7220, 198, 17250, 27, 91, 320, 62, 437, 91, 29, 198, 27, 91, 320, 62, 9688, 91, 29, 562, 10167, 198]
        assert first['labels'] == [38101, 27, 91, 320, 62, 437, 91, 29, 198]


@settings(max_examples=30, deadline=None)
@given(st.lists(PAIR | st.just(CHAT) | st.just({'input_ids': [1], 'labels': [2]}), max_size=8), st.integers(1, 4))
def test_batches_do_not_matter(examples: list[dict[str, Any]], size: int) -> None:
    tokenizer = TOKENIZERS['smollm2']
    one_by_one = [tokenize_formatted_example(e, tokenizer) for e in examples]
    assert [t for i in range(0, len(examples), size) for t in tokenize_batch(examples[i : i + size], tokenizer)] == one_by_one
    assert tokenize_batch(examples, tokenizer) == one_by_one


def test_keys_that_arrow_fills_with_none_do_not_reach_the_template() -> None:
    tokenizer = gpt2_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{% if 'name' in m %} ({{ m['name'] }}){% endif %}|{% endfor %}"
    filled = {'messages': [{**m, 'name': None} for m in CHAT['messages']]}
    assert tokenize_formatted_example(filled, tokenizer) == tokenize_formatted_example(CHAT, tokenizer)


@pytest.mark.parametrize('leftover', [{'truncation': True, 'max_length': 2}, {'padding': 'max_length', 'max_length': 50}, {'split_special_tokens': True}], ids=str)
def test_settings_of_an_earlier_call_are_off(leftover: dict[str, Any]) -> None:
    tokenizer = neox_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    pair = {'prompt': 'one two three four five', 'response': ' six seven eight <|endoftext|>'}
    expected = tokenize_formatted_example(pair, tokenizer)
    tokenizer('x y z', **leftover)
    assert tokenize_formatted_example(pair, tokenizer) == expected


def test_split_special_tokens_is_respected() -> None:
    tokenizer = gpt2_tokenizer(split_special_tokens=True)
    pair = {'prompt': 'a<|endoftext|>', 'response': 'b'}
    assert tokenize_formatted_example(pair, tokenizer)['turns'][0]['input_ids'] == tokenizer('a<|endoftext|>')['input_ids'] != [64, EOS]
    assert tokenize_formatted_example(pair, TOKENIZERS['gpt2'])['turns'][0]['input_ids'] == [64, EOS]


class Shouting(PreTrainedTokenizerFast):
    """A tokenizer with code of its own, which the fast path would pass by."""

    def __call__(self, text: Any = None, text_target: Any = None, **kwargs: Any) -> Any:
        def upper(value: Any) -> Any:
            return value.upper() if isinstance(value, str) else [v.upper() for v in value]

        return super().__call__(text=upper(text)) if text_target is None else super().__call__(text_target=upper(text_target))


class Translating(PreTrainedTokenizerFast):
    """A tokenizer that treats targets differently, as those of translation models do."""

    def _switch_to_target_mode(self) -> None:
        from tokenizers.processors import TemplateProcessing

        self.backend_tokenizer.post_processor = TemplateProcessing(single='$A <|endoftext|>', special_tokens=[('<|endoftext|>', EOS)])

    def _switch_to_input_mode(self) -> None:
        self.backend_tokenizer.post_processor = gpt2_tokenizer().backend_tokenizer.post_processor


@pytest.mark.parametrize(('kind', 'expected'), [(Shouting, turn([17250, 40], [3180])), (Translating, turn([17250, 314], [318, EOS]))], ids=lambda k: getattr(k, '__name__', ''))
def test_tokenizers_with_ways_of_their_own(kind: type, expected: dict[str, Any]) -> None:
    tokenizer = kind(tokenizer_object=gpt2_tokenizer().backend_tokenizer, eos_token='<|endoftext|>')
    [result] = tokenize_batch([{'prompt': 'Hi I', 'response': ' is'}], tokenizer)
    assert result['turns'][0]['labels'] == expected['turns'][0]['labels']
    assert tokenizer.decode(result['turns'][0]['input_ids']) == ('HI I' if kind is Shouting else 'Hi I')


@pytest.mark.parametrize(
    ('example', 'expected'),
    [
        ({'input_ids': [5, 6], 'attention_mask': [1, 1], 'labels': [7]}, turn([5, 6], [7])),
        ({'input_ids': np.array([5, 6]), 'labels': np.array([-100, 6])}, turn([5, 6], [-100, 6])),
        ({'input_ids': np.array([[5, 6]]), 'attention_mask': np.array([[1, 1]]), 'labels': np.array([[7]])}, turn([5, 6], [7])),
        ({'input_ids': [EOS, 5], 'labels': [EOS, 7]}, turn([EOS, 5], [7])),
        ({'turns': [{'input_ids': [EOS, 5], 'labels': [EOS, 7]}]}, turn([EOS, 5], [EOS, 7])),
    ],
)
def test_examples_that_are_tokenised_already(example: dict[str, Any], expected: dict[str, Any]) -> None:
    assert tokenize_formatted_example(example, TOKENIZERS['gpt2']) == expected


def test_what_a_tokenisation_function_returns() -> None:
    tokenizer = TOKENIZERS['gpt2']
    assert tokenize_formatted_example(tokenizer(text='Hi', text_target=' there'), tokenizer) == turn([17250], [612])


@pytest.mark.parametrize(
    ('example', 'text'),
    [
        ({'input_ids': [5, 50257], 'labels': [7]}, 'input_ids: token id 50257 is outside the 50257 ids of the tokenizer. Use the tokenizer that the data were prepared with'),
        ({'input_ids': [5], 'labels': [-100, -1]}, 'labels: token id -1 is outside the 50257 ids of the tokenizer. Use the tokenizer that the data were prepared with'),
        ({'input_ids': [5, -100], 'labels': [7]}, 'input_ids: token id -100 is outside the 50257 ids of the tokenizer. Use the tokenizer that the data were prepared with'),
        ({'input_ids': [0.5], 'labels': [7]}, 'input_ids: expected one list of whole numbers, got shape (1,) of float64'),
        ({'input_ids': [[5], [6]], 'labels': [7]}, 'input_ids: expected one list of whole numbers, got shape (2, 1) of int64'),
        ({'input_ids': [5], 'labels': 'text'}, 'labels: expected one list of whole numbers, got shape () of <U4'),
        ({'input_ids': None, 'labels': [7]}, 'input_ids: expected one list of whole numbers, got shape () of object'),
        ({'turns': 'text'}, 'turns must be a list of mappings with input_ids and labels, got text'),
        ({'turns': [{'input_ids': [5]}]}, "turns must be a list of mappings with input_ids and labels, got [{'input_ids': [5]}]"),
    ],
)
def test_ids_that_cannot_be_used(example: dict[str, Any], text: str) -> None:
    with pytest.raises(errors.DataError) as e:
        tokenize_batch([{'prompt': 'a', 'response': 'b'}, example], TOKENIZERS['gpt2'])
    assert str(e.value) == text and e.value.row == 1


def test_ids_of_added_tokens_are_ids() -> None:
    tokenizer = smollm2_tokenizer()
    tokenizer.add_tokens(['<new>'])
    assert tokenize_formatted_example({'input_ids': [5, 49152], 'labels': [49152]}, tokenizer) == turn([5, 49152], [49152])
    with pytest.raises(errors.DataError, match='token id 49153 is outside the 49153 ids'):
        tokenize_formatted_example({'input_ids': [5, 49153], 'labels': [1]}, tokenizer)


@pytest.mark.parametrize(('bad', 'error'), [(BAD_CHAT, errors.NotEnoughChatDataError), ({'prompt': 'a', 'response': None}, errors.InvalidResponseTypeError), ({'x': 1}, errors.UnknownExampleTypeError)])
def test_an_error_knows_its_row(bad: dict[str, Any], error: type[Exception]) -> None:
    good = {'prompt': 'a', 'response': 'b'}
    with pytest.raises(error) as e:
        tokenize_batch([good] * 17 + [bad, BAD_CHAT], TOKENIZERS['gpt2'])
    assert e.value.row == 17
    assert pickle.loads(pickle.dumps(e.value)).row == 17


def test_threads_are_for_large_batches_of_a_process_that_was_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    class Backend:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list[Any]:
            seen.append(os.environ.get('TOKENIZERS_PARALLELISM'))
            return []

    monkeypatch.setenv('TOKENIZERS_PARALLELISM', 'false')
    tokenization._encode_fast(Backend(), ['a'] * 500, True)
    tokenization._encode_fast(Backend(), ['a'], True)
    monkeypatch.setattr(tokenization._Fork, 'happened', True)
    tokenization._encode_fast(Backend(), ['a'] * 500, True)
    assert seen == ['true', 'false', 'false']
    assert os.environ['TOKENIZERS_PARALLELISM'] == 'false'


def test_a_forked_process_does_not_wait_for_threads_it_does_not_have() -> None:
    tokenizer, pairs = gpt2_tokenizer(), [{'prompt': f'one {i}', 'response': ' two'} for i in range(500)]
    expected = tokenize_batch(pairs, tokenizer)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if tokenize_batch(pairs, tokenizer) == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


VALID = [
    ([([1, 2], [3])], True, True), ([([], [3])], False, False), ([([1], [])], False, False), ([([1] * 16, [3])], False, True), ([([1] * 15, [3])], True, True),
    ([([1], []), ([1], [2])], False, False), ([([], [4]), ([1], [2])], False, False), ([([1], [2]), ([1], [])], False, False), ([([1], [2]), ([], [2])], False, False),
]


@pytest.mark.parametrize(('turns', 'with_none', 'with_all'), VALID)
def test_what_counts_as_valid_in_the_public_release(turns: list, with_none: bool, with_all: bool) -> None:
    example = {'turns': [{'input_ids': p, 'attention_mask': [1] * len(p), 'labels': r} for p, r in turns]}
    assert is_valid_ift_example(16, 'none', 'last', True, example) is with_none
    assert is_valid_ift_example(16, 'all', 'last', True, example) is with_all


def test_length_does_not_matter_to_an_encoder_decoder() -> None:
    assert is_valid_ift_example(16, 'none', 'last', False, turn([1] * 20, [3] * 5))


def test_labels_with_nothing_to_train() -> None:
    assert not is_valid_ift_example(16, 'none', 'last', True, turn([1, 2], [-100, -100]))


def test_a_tokenizer_without_rust_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('tiktoken')
    assets = Path(tokenization.__file__).resolve().parents[2] / 'assets' / 'gpt2'
    source = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
    vocabulary = json.dumps(json.loads((assets / 'vocab.json').read_text(encoding='utf-8'))).encode()
    for name, data in (('vocab.bpe', (assets / 'merges.txt').read_bytes()), ('encoder.json', vocabulary)):
        (tmp_path / hashlib.sha1((source + name).encode()).hexdigest()).write_bytes(data)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    slow, fast = build_tokenizer('tiktoken', {'encoding_name': 'gpt2'}), gpt2_tokenizer()
    fast.chat_template = slow.chat_template
    assert not slow.is_fast
    examples = [{'prompt': 'Hello wörld! 日本', 'response': ' <|endoftext|> x'}, CHAT, {'prompt': '', 'response': '🙂'}]
    assert tokenize_batch(examples, slow) == tokenize_batch(examples, fast)
