"""Ids and masks against an independent oracle: TRL, through the dataset preparation and the collator of its SFTTrainer, on the same rows.

Completion-only loss on prompt/completion text and chats, and assistant-only loss on chats whose template marks what the assistant generates; the marks in the templates that TRL
ships for some thirty models. TRL is a test-only dependency.
"""

from __future__ import annotations

import lzma
import re
from pathlib import Path
from typing import Any

import pytest

from llmfoundry.data.finetuning.chat import chat_turn_texts
from llmfoundry.data.finetuning.targets import IGNORE_INDEX, line_break_ids, stitch_example
from llmfoundry.data.finetuning.tokenization import tokenize_batch
from llmfoundry.errors import InvalidConversationError
from llmfoundry.tokenizers.utils import get_date_string
from tests.helpers.tokenizers import SMOLLM2_TEMPLATE, gpt2_tokenizer, neox_tokenizer, smollm2_tokenizer

trl = pytest.importorskip('trl')
pytestmark = pytest.mark.slow

_AUSTEN = Path(__file__).resolve().parents[3] / 'llmfoundry' / 'assets' / 'austen' / 'austen.txt.xz'
Rows = list[tuple[list[int], list[int]]]


def padded(tokenizer: Any) -> Any:
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def llama3_like(splits_like_llama3: bool = True) -> Any:
    """GPT-NeoX's vocabulary with Llama 3's special tokens, TRL's own training template for it, and its way of splitting text, which keeps line breaks together."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    tokenizer = neox_tokenizer()
    tokenizer.add_special_tokens({'additional_special_tokens': ['<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>']})
    tokenizer.bos_token, tokenizer.eos_token = '<|begin_of_text|>', '<|eot_id|>'
    tokenizer.chat_template = (Path(trl.__file__).parent / 'chat_templates' / 'llama3_training.jinja').read_text()
    if splits_like_llama3:
        parts = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Split(Regex(parts), 'isolated'), ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


def chatml_with_markers() -> Any:
    """SmolLM2 with its template, in which the words of the assistant and its terminator are marked as generated."""
    tokenizer = smollm2_tokenizer()
    whole = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    marked = (
        "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endgeneration %}"
        f'{{% else %}}{whole}{{% endif %}}'
    )
    assert whole in SMOLLM2_TEMPLATE
    tokenizer.chat_template = SMOLLM2_TEMPLATE.replace(whole, marked)
    return tokenizer


def words(start: int, count: int) -> str:
    return ' '.join(_words()[start : start + count])


_WORDS: list[str] = []


def _words() -> list[str]:
    if not _WORDS:
        with lzma.open(_AUSTEN, 'rt', encoding='utf-8') as f:
            _WORDS.extend(re.findall(r'\S+', f.read(400_000)))
    return _WORDS


def text_pairs() -> list[dict[str, str]]:
    pairs = [{'prompt': words(i * 97, 5 + i), 'completion': ' ' + words(i * 97 + 5 + i, 3 + 2 * i)} for i in range(40)]
    return [*pairs, {'prompt': 'Q: 維也納?\nA:', 'completion': ' 😀 é.\n\nEnd'}, {'prompt': 'List:', 'completion': '\n\n1. one\n2. two'}]


def chats() -> list[list[dict[str, str]]]:
    """Conversations of one to four answers, with and without system message, with tools."""
    rows = []
    for i in range(24):
        messages = [{'role': 'system', 'content': words(i, 6)}] if i % 3 == 0 else []
        for turn in range(1 + i % 4):
            at = 500 + 211 * i + 40 * turn
            messages += [{'role': 'user', 'content': words(at, 4 + i)}, {'role': 'assistant', 'content': words(at + 20, 1 + i + turn)}]
        if i % 5 == 0:
            messages += [{'role': 'tool', 'content': '{"degrees": 21}'}, {'role': 'assistant', 'content': 'It is 21 degrees.\n'}]
        rows.append(messages)
    return rows


def by_trl(rows: list[dict[str, Any]], tokenizer: Any, folder: Path, **config: Any) -> Rows:
    """Ids and labels of each row as SFTTrainer would feed them to a model."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    size = len(tokenizer) + 8
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1))
    args = trl.SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to='none', max_length=None, shuffle_dataset=False, gradient_checkpointing=False, **config)
    trainer = trl.SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    lengths = batch['attention_mask'].sum(1).tolist()
    return [(ids[:n].tolist(), labels[:n].tolist()) for ids, labels, n in zip(batch['input_ids'], batch['labels'], lengths, strict=True)]


def by_us(examples: list[dict[str, Any]], tokenizer: Any, target_responses: str) -> Rows:
    rows = []
    for tokenized in tokenize_batch(examples, tokenizer):
        ids, targets = stitch_example(tokenized['turns'], 'none', target_responses, tokenizer.eos_token_id, line_break_ids(tokenizer))
        rows.append((ids.tolist(), [int(i) if t else IGNORE_INDEX for i, t in zip(ids, targets, strict=True)]))
    return rows


def assert_same(ours: Rows, theirs: Rows, tokenizer: Any) -> None:
    assert len(ours) == len(theirs)
    for row, (mine, his) in enumerate(zip(ours, theirs, strict=True)):
        assert mine[0] == his[0], f'row {row}: {tokenizer.decode(mine[0])!r} and {tokenizer.decode(his[0])!r}'
        assert mine[1] == his[1], f'row {row}: trained {tokenizer.decode([i for i in mine[1] if i >= 0])!r} and {tokenizer.decode([i for i in his[1] if i >= 0])!r}'
        assert 0 < sum(label != IGNORE_INDEX for label in mine[1]) < len(mine[1])


@pytest.mark.parametrize('make', [gpt2_tokenizer, neox_tokenizer, smollm2_tokenizer], ids=lambda f: f.__name__)
def test_completion_only_on_text(make: Any, tmp_path: Path) -> None:
    tokenizer, rows = padded(make()), text_pairs()
    theirs = by_trl(rows, tokenizer, tmp_path, completion_only_loss=True)
    assert_same(by_us(rows, tokenizer, 'last'), theirs, tokenizer)
    assert all(labels[-1] == tokenizer.eos_token_id for _, labels in theirs), 'the end of each response is trained'


@pytest.mark.parametrize('make', [smollm2_tokenizer, llama3_like], ids=lambda f: f.__name__)
def test_completion_only_on_chats(make: Any, tmp_path: Path) -> None:
    tokenizer = padded(make())
    theirs = by_trl([{'prompt': m[:-1], 'completion': m[-1:]} for m in chats()], tokenizer, tmp_path, completion_only_loss=True)
    assert_same(by_us([{'messages': m} for m in chats()], tokenizer, 'last'), theirs, tokenizer)


@pytest.mark.parametrize('make', [chatml_with_markers, llama3_like], ids=lambda f: f.__name__)
def test_assistant_only(make: Any, tmp_path: Path) -> None:
    tokenizer, rows = padded(make()), [{'messages': m} for m in chats()]
    theirs = by_trl(rows, tokenizer, tmp_path, assistant_only_loss=True)
    assert_same(by_us(rows, tokenizer, 'all'), theirs, tokenizer)
    for messages, (ids, _) in zip(chats(), theirs, strict=True):
        assert tokenizer.decode(ids).count(messages[-1]['content'].strip()) >= 1


def test_a_response_that_starts_inside_a_word(tmp_path: Path) -> None:
    """Where prompt and response share a token, TRL tokenises both as one text, and its context is not what the model sees when it answers that prompt; ours is."""
    tokenizer, row = padded(gpt2_tokenizer()), {'prompt': 'Hel', 'completion': 'lo world'}
    [(ours, our_labels)], [(theirs, _)] = by_us([row], tokenizer, 'last'), by_trl([row], tokenizer, tmp_path, completion_only_loss=True)
    assert tokenizer.decode(ours) == tokenizer.decode(theirs) == 'Hello world<|endoftext|>'
    prompt = tokenizer('Hel')['input_ids']
    assert ours[: len(prompt)] == prompt != theirs[: len(prompt)]
    assert our_labels[: len(prompt)] == [IGNORE_INDEX] * len(prompt)


def test_a_generation_prompt_that_merges_with_the_answer(tmp_path: Path) -> None:
    """The same with a chat: two line breaks before the answer are one token for the model that generates, and two in a text that goes on."""
    tokenizer, messages = padded(llama3_like(splits_like_llama3=False)), chats()[1]
    [(ours, _)] = by_us([{'messages': messages}], tokenizer, 'last')
    [(theirs, _)] = by_trl([{'prompt': messages[:-1], 'completion': messages[-1:]}], tokenizer, tmp_path, completion_only_loss=True)
    seen = tokenizer(tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False), add_special_tokens=False)['input_ids']
    assert tokenizer.decode(ours) == tokenizer.decode(theirs)
    assert ours[: len(seen)] == seen != theirs[: len(seen)]


# Templates in which TRL marks what our responses are: the generation prompt is context, everything from there to the end of the turn is trained.
AGREE = [
    'cohere', 'cohere2', 'gemma', 'gemma3', 'glm4moe', 'lfm2', 'lfm2_v2', 'llama3', 'phi3', 'phi3_5', 'qwen2_5_vl', 'qwen3', 'qwen3_instruct_2507', 'qwen3_vl',
]
# Here TRL also trains what the generation prompt gives the model already: a line break, an empty thought.
MARK_MORE = ['muse_glimmer', 'qwen2_5', 'qwen3_5_nothink', 'qwen3_5_think', 'qwen3_6', 'qwen3_8']
# The generation prompt opens a thought that the rendered answer does not have, or earlier turns change.
REFUSED = ['deepseek_r1_distill', 'deepseekv3', 'gptoss', 'nemotron_3_5_lightning', 'nemotron_3_nano', 'nemotron_3_super', 'nemotron_3_ultra']


def training_template(name: str) -> str:
    path = Path(trl.__file__).parent / 'chat_templates' / f'{name}_training.jinja'
    if not path.exists():
        pytest.skip(f'this TRL has no {path.name}')
    return path.read_text()


def trained_characters(name: str) -> tuple[str, list[bool], list[bool]]:
    """The render of a chat, and which characters are trained by us and by TRL's markers."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer, messages = smollm2_tokenizer(), [{'role': r, 'content': c} for r, c in (('user', 'Why?'), ('assistant', 'So.'), ('user', 'And then?'), ('assistant', 'Then it ends.'))]
    tokenizer.chat_template = training_template(name)
    ours: list[bool] = []
    turns = chat_turn_texts(messages, tokenizer)
    for prompt, response in turns:
        ours += [False] * len(prompt) + [True] * len(response)
    [text], [spans] = render_jinja_template(
        [messages], chat_template=tokenizer.chat_template, return_assistant_tokens_mask=True, date_string=get_date_string(), **tokenizer.special_tokens_map,
    )
    assert ''.join(p + r for p, r in turns) == text
    return text, ours, [any(a <= i < b for a, b in spans) for i in range(len(text))]


@pytest.mark.parametrize('name', AGREE)
def test_templates_of_many_models(name: str) -> None:
    text, ours, theirs = trained_characters(name)
    assert ours == theirs
    assert ''.join(c for c, t in zip(text, ours, strict=True) if t).count('.') == 2


@pytest.mark.parametrize('name', MARK_MORE)
def test_templates_that_mark_a_part_of_the_generation_prompt(name: str) -> None:
    _, ours, theirs = trained_characters(name)
    assert ours != theirs
    assert all(t for o, t in zip(ours, theirs, strict=True) if o)


@pytest.mark.parametrize('name', REFUSED)
def test_templates_that_cannot_be_trained_as_they_are(name: str) -> None:
    with pytest.raises(InvalidConversationError, match='Give a template that keeps what it rendered'):
        trained_characters(name)
