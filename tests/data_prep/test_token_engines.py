"""tiktoken may only stand in for a tokenizer whose ids it gives, on any text."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfoundry.command_utils.data_prep.token_engines import (
    AWKWARD_STRINGS,
    BackendEngine,
    NotByteLevelBPE,
    TiktokenEngine,
    build_engine,
    difference,
    plan_tiktoken,
    sample_slices,
)
from llmfoundry.command_utils.data_prep.tokenizer_spec import TokenizerSpec, describe_tokenizer
from tests.helpers.prepared_data import gpt2_tokenizer, random_texts


def small_tokenizer(**changes):
    """A byte-level BPE trained here, with the pre-tokenizer, normalizer or added tokens wanted."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = changes.get('pre_tokenizer') or pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(random_texts(60, seed=3) + ['the quick brown fox ' * 20], trainer)
    if changes.get('normalizer'):
        tokenizer.normalizer = changes['normalizer']
    for content, options in changes.get('added', {}).items():
        tokenizer.add_tokens([AddedToken(content, **options)])
    if changes.get('template'):
        from tokenizers.processors import TemplateProcessing

        token_id = tokenizer.token_to_id(changes['template'])
        tokenizer.post_processor = TemplateProcessing(single=f'{changes["template"]} $A', special_tokens=[(changes['template'], token_id)])
    return tokenizer.to_str()


@pytest.fixture(scope='module')
def gpt2():
    backend = gpt2_tokenizer().to_str()
    reference = BackendEngine(backend)
    return TiktokenEngine(backend, reference), reference


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=30), st.sampled_from(['<|endoftext|>', '<|endof', ' ', '\n', "'ve", ' 12', '\r\n\t'])), max_size=12))
def test_gpt2_ids_are_equal_on_any_text(gpt2, parts):
    engine, reference = gpt2
    assert difference(engine, reference, [''.join(parts)]) is None


def test_gpt2_ids_are_equal_on_awkward_and_special_text(gpt2):
    engine, reference = gpt2
    texts = [*AWKWARD_STRINGS, '', '<|endoftext|>', 'a<|endoftext|><|endoftext|> b', *random_texts(50, seed=1)]
    assert difference(engine, reference, texts) is None
    assert engine.encode(['x<|endoftext|>y'])[0].tolist() == [87, 50256, 88]


def test_texts_on_which_the_regex_engine_gives_up_go_to_the_tokenizer(gpt2):
    engine, reference = gpt2
    text = '\n' * 1_000_000 + 'a'
    with pytest.raises(ValueError):
        engine._encoding.encode_to_numpy(text, disallowed_special=())
    assert difference(engine, reference, [text]) is None


def _split(pattern):
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), 'isolated'), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


@pytest.mark.parametrize('name', ['_LLAMA3', '_QWEN2', '_O200K'])
def test_other_known_patterns(name):
    from llmfoundry.command_utils.data_prep import token_engines

    backend = small_tokenizer(pre_tokenizer=_split(getattr(token_engines, name)))
    reference = BackendEngine(backend)
    engine = TiktokenEngine(backend, reference)
    assert difference(engine, reference, random_texts(200, seed=2)) is None


def test_nfc_added_tokens_and_templates():
    from tokenizers import normalizers

    added = {'<bos>': {'special': True}, '    ': {'normalized': True}, '  ': {'normalized': True}, '<bos>x': {'normalized': False}}
    backend = small_tokenizer(normalizer=normalizers.NFC(), added=added, template='<bos>')
    reference = BackendEngine(backend)
    engine = TiktokenEngine(backend, reference)
    texts = ['e\u0301a  b    c     d', '<bos>x<bos> y', 'A\u030a<bos>' * 3, *random_texts(100, seed=5)]
    assert difference(engine, reference, texts) is None
    assert engine.encode(['a'])[0][0] == json.loads(backend)['added_tokens'][0]['id']
    assert np.array_equal(engine.encode(['a'], add_special_tokens=False)[0], reference.encode(['a'], add_special_tokens=False)[0])


def _config(**changes):
    config = json.loads(small_tokenizer())
    for key, value in changes.items():
        target = config['model'] if key in config['model'] else config
        target[key] = value
    return config


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'type': 'Unigram'}, 'its model is Unigram, not BPE'),
        ({'dropout': 0.1}, 'its BPE uses dropout'),
        ({'byte_fallback': True}, 'its BPE uses byte_fallback'),
        ({'normalizer': {'type': 'Lowercase'}}, 'it normalises text by Lowercase'),
        ({'pre_tokenizer': {'type': 'Whitespace'}}, 'its pre-tokenizer is not byte-level, or adds a space'),
        ({'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': True}}, 'its pre-tokenizer is not byte-level, or adds a space'),
        (
            {'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [{'type': 'Digits'}, {'type': 'ByteLevel'}]}},
            'it splits words by a pattern that is not one of the known ones',
        ),
        ({'vocab': {'a': 0}}, 'its vocabulary lacks 255 of the 256 bytes'),
        (
            {'added_tokens': [{'content': '<x>', 'id': 9, 'lstrip': True, 'rstrip': False, 'single_word': False, 'normalized': False}]},
            "its added token '<x>' strips or needs word boundaries",
        ),
    ],
)
def test_other_tokenizers_are_refused_with_the_reason(changes, reason):
    with pytest.raises(NotByteLevelBPE) as e:
        plan_tiktoken(_config(**changes))
    assert str(e.value) == reason


def test_a_vocabulary_that_tiktoken_reads_differently_is_found_out():
    config = json.loads(small_tokenizer())
    # Without its merges, `tokenizers` leaves every byte alone; here they are put in the wrong order instead.
    config['model']['merges'] = config['model']['merges'][::-1]
    engine, reference, reason = build_engine(TokenizerSpec('broken', {}, json.dumps(config)), use_tiktoken=True)
    assert reference is None or difference(engine, reference, random_texts(100)) is None
    assert engine.name == 'tiktoken' or 'differ' in reason


def test_slices_hold_what_differs_first():
    texts = ['plain ' * 2000, 'x' * 5000 + 'é' + 'y' * 5000]
    slices = sample_slices(texts, seed=0)
    assert len(slices) == 2 and 'é' in slices[1]
    assert max(map(len, slices)) <= 2048
    assert sample_slices([], 0) == []


def test_the_short_way_to_the_shipped_tokenizer_equals_the_long_one():
    short, long = describe_tokenizer('llmfoundry://gpt2'), describe_tokenizer('llmfoundry://gpt2', {'padding_side': 'right'})
    assert json.loads(short.backend) == json.loads(long.backend)
    assert (short.bos_id, short.eos_id, short.eos_token) == (long.bos_id, long.eos_id, long.eos_token) == (50256, 50256, '<|endoftext|>')


def test_unknown_tokenizer_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="the tokenizer '/no/such' could not be loaded: "):
        describe_tokenizer('/no/such')


def test_a_tokenizer_written_in_python_gives_the_same_ids(tmp_path):
    from transformers import ByT5Tokenizer

    from llmfoundry.command_utils.data_prep.pool import WorkerPool
    from llmfoundry.command_utils.data_prep.rows import Segment
    from llmfoundry.command_utils.data_prep.worker import EncoderSpec

    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(tmp_path)
    spec = describe_tokenizer(str(tmp_path))
    assert spec.backend is None
    texts = random_texts(30)
    with WorkerPool(EncoderSpec(spec, eos_text='</s>'), 1) as pool:
        assert pool.facts()[:2] == ('python', 'the tokenizer is written in Python')
        [(_, encoded)] = pool.map([(0, [Segment('rows', 'f', 1, texts)])])
    eos = tokenizer.eos_token_id  # once as the text that ends a document, once because this tokenizer adds it to every text
    expected = [i for text in texts for i in [*(byte + 3 for byte in text.encode()), eos, eos]]
    assert np.frombuffer(encoded.data, '<i4').tolist() == expected
