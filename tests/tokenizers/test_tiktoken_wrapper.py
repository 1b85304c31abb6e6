"""The tiktoken wrapper, offline: GPT-2's encoding, whose files follow from the shipped tokenizer's, and a tiny encoding with gaps."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any, Iterator

import pytest

from llmfoundry.errors import ConfigError
from llmfoundry.tokenizers import TiktokenTokenizerWrapper, build_tokenizer, bytes_to_unicode
from llmfoundry.tokenizers.tiktoken import DEFAULT_SYSTEM_PROMPT

tiktoken = pytest.importorskip('tiktoken')
ASSETS = Path(__file__).resolve().parents[2] / 'llmfoundry' / 'assets' / 'gpt2'
SOURCE = 'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/'
TEXTS = ['Hello wörld! 日本 <|endoftext|> next\x00', '', ' two  spaces\n\ttab', '🙂']


@pytest.fixture(scope='module', autouse=True)
def offline_encodings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """TIKTOKEN_CACHE_DIR with GPT-2's files, and ``tiny``: the 256 bytes, ``ab`` as 256, and special tokens at 260 and 263."""
    cache = tmp_path_factory.mktemp('tiktoken')
    vocabulary = json.dumps(json.loads((ASSETS / 'vocab.json').read_text(encoding='utf-8'))).encode()
    for name, data in (('vocab.bpe', (ASSETS / 'merges.txt').read_bytes()), ('encoder.json', vocabulary)):
        (cache / hashlib.sha1((SOURCE + name).encode()).hexdigest()).write_bytes(data)
    ranks = {bytes([i]): i for i in range(256)} | {b'ab': 256}
    patch = pytest.MonkeyPatch()
    patch.setenv('TIKTOKEN_CACHE_DIR', str(cache))
    tiktoken.list_encoding_names()
    tiny = tiktoken.Encoding('tiny', pat_str=r'\w+|\W+', mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 260, '<|end|>': 263})
    patch.setitem(tiktoken.registry.ENCODINGS, 'tiny', tiny)
    patch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, 'tiny', lambda: None)
    yield
    patch.undo()


def gpt2(**kwargs: Any) -> TiktokenTokenizerWrapper:
    return TiktokenTokenizerWrapper(encoding_name='gpt2', **kwargs)


def test_ids_text_and_vocabulary_equal_hugging_faces() -> None:
    ours, theirs = build_tokenizer('tiktoken', {'encoding_name': 'gpt2'}), build_tokenizer('llmfoundry://gpt2', {})
    for text in TEXTS:
        assert ours(text)['input_ids'] == theirs(text)['input_ids']
        assert ours.decode(ours(text)['input_ids']) == text
        assert ours.tokenize(text) == theirs.tokenize(text)
    assert ours.get_vocab() == theirs.get_vocab() and len(ours) == len(theirs) == 50257
    assert ours.model_max_length == int(1e30) and not ours.is_fast
    assert ours.model_input_names == ['input_ids', 'attention_mask']


def test_model_names_and_exactly_one_name() -> None:
    assert TiktokenTokenizerWrapper(model_name='gpt2')('Hello world')['input_ids'] == [15496, 995]
    text = 'exactly one of model_name and encoding_name must be given, got model_name='
    with pytest.raises(ValueError, match=f'^{text}None, encoding_name=None$'):
        TiktokenTokenizerWrapper()
    with pytest.raises(ValueError, match=f"^{text}'gpt2', encoding_name='gpt2'$"):
        TiktokenTokenizerWrapper(model_name='gpt2', encoding_name='gpt2')
    with pytest.raises(ValueError, match=r"tiktoken knows no encoding_name='nope'; encodings: cl100k_base, gpt2"):
        TiktokenTokenizerWrapper(encoding_name='nope')


@pytest.mark.parametrize(('add_bos', 'add_eos'), [(False, False), (True, False), (False, True), (True, True)])
def test_bos_and_eos_are_added_only_if_asked(add_bos: bool, add_eos: bool) -> None:
    tokenizer = gpt2(add_bos_token=add_bos, add_eos_token=add_eos)
    special = 50256
    assert tokenizer('Hello world')['input_ids'] == [special] * add_bos + [15496, 995] + [special] * add_eos
    pair = tokenizer('Hello', ' world')['input_ids']
    assert pair == [special] * add_bos + [15496] + [special] * add_eos + [special] * add_bos + [995] + [special] * add_eos
    mask = tokenizer('Hello world', return_special_tokens_mask=True)['special_tokens_mask']
    assert mask == [1] * add_bos + [0, 0] + [1] * add_eos


def test_gaps_of_the_vocabulary() -> None:
    tokenizer = TiktokenTokenizerWrapper(encoding_name='tiny')
    assert tokenizer.vocab_size == len(tokenizer) == 264
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(264))
    gaps = [257, 258, 259, 261, 262]
    assert {name: i for name, i in vocabulary.items() if name.startswith('<extra_id_')} == {f'<extra_id_{n}>': i for n, i in enumerate(gaps)}
    assert tokenizer('xabx')['input_ids'] == [120, 256, 120]
    assert tokenizer.decode([120, *gaps, 256]) == 'xab'
    assert tokenizer('a<|end|>')['input_ids'] == [97, 263]


def test_bytes_that_are_not_utf8() -> None:
    assert TiktokenTokenizerWrapper(encoding_name='tiny').decode([0xFF]) == '�'
    assert TiktokenTokenizerWrapper(encoding_name='tiny', errors='ignore').decode([0xFF, 97]) == 'a'


def test_added_tokens_get_ids_behind_the_encoding() -> None:
    tokenizer = gpt2(pad_token='<pad>')
    assert tokenizer.pad_token_id == 50257 and len(tokenizer) == 50258
    assert tokenizer('a<pad>')['input_ids'] == [64, 50257]
    assert tokenizer.decode([64, 50257]) == 'a<pad>'


def test_pickles_and_saves_without_a_vocabulary_file(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = gpt2(add_eos_token=True)
    assert pickle.loads(pickle.dumps(tokenizer))(TEXTS[0]) == tokenizer(TEXTS[0])
    assert tokenizer.save_vocabulary(str(tmp_path)) == ()
    tokenizer.save_pretrained(tmp_path)
    assert {'tiktoken.py', 'utils.py', 'tokenizer_config.json'} <= {p.name for p in tmp_path.iterdir()}
    loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded) is not TiktokenTokenizerWrapper and loaded(TEXTS[0]) == tokenizer(TEXTS[0])


CHAT = [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': ' yo '}]


def test_chatml_is_the_default_template() -> None:
    tokenizer = gpt2()
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|><|endoftext|>'
    assert tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True) == '<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n'
    with_system = [{'role': 'system', 'content': 'S'}, *CHAT]
    assert tokenizer.apply_chat_template(with_system, tokenize=False).startswith('<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n')
    longer = [*CHAT, {'role': 'user', 'content': 'more'}]
    assert tokenizer.apply_chat_template(longer, tokenize=False).startswith(tokenizer.apply_chat_template(CHAT, tokenize=False))


def test_default_system_prompt_own_template_and_date() -> None:
    assert gpt2(use_default_system_prompt=True).apply_chat_template(CHAT, tokenize=False).startswith(f'<|im_start|>system\n{DEFAULT_SYSTEM_PROMPT}<|im_end|>\n')
    dated = gpt2(chat_template='{{ date_string }}')
    assert len(dated.apply_chat_template(CHAT, tokenize=False)) == 11
    assert dated.apply_chat_template(CHAT, tokenize=False, date_string='x') == 'x'


def test_an_encoding_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError('no route')

    monkeypatch.setattr('tiktoken.get_encoding', refuse)
    with pytest.raises(ConfigError) as caught:
        build_tokenizer('tiktoken', {'encoding_name': 'o200k_base'})
    assert str(caught.value) == (
        "1 problem in the config:\n  tokenizer: 'tiktoken' could not be built: the vocabulary of the tiktoken encoding 'o200k_base' could not be downloaded. Call tiktoken.get_encoding once "
        'where the network can be reached, with TIKTOKEN_CACHE_DIR set to a folder, copy that folder here and set TIKTOKEN_CACHE_DIR to it. Cause: ConnectionError: no route'
    )


def test_bytes_to_unicode_is_a_bijection_onto_printable_characters() -> None:
    table = bytes_to_unicode()
    assert sorted(table) == list(range(256)) and len(set(table.values())) == 256
    assert all(char.isprintable() and not char.isspace() for char in table.values())
    assert (table[ord('A')], table[ord(' ')], table[ord('\n')]) == ('A', 'Ġ', 'Ċ')
