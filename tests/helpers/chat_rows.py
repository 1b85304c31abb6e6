"""Chats tokenised the slow and obvious way, apart from the library's pipeline, and chat templates in the manner of well-known models."""

from __future__ import annotations

import functools
from typing import Any, Mapping, Sequence

import numpy as np

from llmfoundry.data.checks.rows import LintRow, turns_of
from llmfoundry.data.checks.tokenizer_facts import render_chat
from tests.helpers.tokenizers import neox_tokenizer

__all__ = ['CHATML', 'GEMMA', 'LLAMA2', 'LLAMA3', 'SPECIALS', 'TALK', 'TOOL_TALK', 'chat_row', 'tokenizer_with']

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPECIALS = {
    'chatml': (CHATML, ['<|im_start|>', '<|im_end|>'], '<|endoftext|>', '<|im_end|>'),
    'llama3': (LLAMA3, ['<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'], '<|begin_of_text|>', '<|eot_id|>'),
    'llama2': (LLAMA2, ['<s>', '</s>'], '<s>', '</s>'),
    # Gemma's eos is another token than the end of a turn.
    'gemma': (GEMMA, ['<bos>', '<eos>', '<start_of_turn>', '<end_of_turn>'], '<bos>', '<eos>'),
}
TALK = [
    {'role': 'user', 'content': 'What is the capital of France?'},
    {'role': 'assistant', 'content': 'Paris.'},
    {'role': 'user', 'content': 'And of café-rich Austria?'},
    {'role': 'assistant', 'content': 'Vienna, 維也納 😀.'},
]
TOOL_TALK = [
    {'role': 'system', 'content': 'Be brief.'},
    {'role': 'user', 'content': 'How warm is it?'},
    {'role': 'tool', 'content': '{"celsius": 21}'},
    {'role': 'assistant', 'content': '21 degrees.'},
]


@functools.cache
def tokenizer_with(style: str, template: str | None = None) -> Any:
    """GPT-NeoX's vocabulary with the special tokens and the chat template of a style; pad is eos."""
    own, specials, bos, eos = SPECIALS[style]
    tokenizer = neox_tokenizer()
    tokenizer.add_special_tokens({'additional_special_tokens': specials})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = bos, eos, eos
    tokenizer.chat_template = template or own
    return tokenizer


def chat_row(tokenizer: Any, messages: Sequence[Mapping[str, str]], responses: str = 'all', append_eos: bool = True, name: str = '0', with_turns: bool = True) -> LintRow:
    """One row: each answer is what the conversation up to it has more than the prompt for it."""
    render = render_chat(tokenizer)
    turns: list[dict[str, list[int]]] = []
    done = ''
    for index, message in enumerate(messages):
        if message['role'] == 'assistant':
            prompt, answered = render(messages[:index], True), render(messages[: index + 1], False)
            turns.append({'input_ids': _ids(tokenizer, prompt[len(done) :]), 'labels': _ids(tokenizer, answered[len(prompt) :])})
            done = answered
    ids: list[int] = []
    targets: list[bool] = []
    for index, turn in enumerate(turns):
        ids += turn['input_ids'] + turn['labels']
        targets += [False] * len(turn['input_ids']) + [responses == 'all' or index == len(turns) - 1] * len(turn['labels'])
    if append_eos and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
        targets.append(True)
    spans = turns_of(turns, len(ids)) if with_turns else ()
    said = tuple((m['role'], m['content']) for m in messages)
    return LintRow(name=name, ids=np.array(ids, np.int32), targets=np.array(targets), turns=spans, messages=said if with_turns else ())


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)['input_ids']
