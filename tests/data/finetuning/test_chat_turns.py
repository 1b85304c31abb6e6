"""Chats to turns: what the template renders, cut where the model would start to generate."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfoundry.data.finetuning.chat import CHATML_TEMPLATE, chat_turn_texts
from llmfoundry.errors import ChatTemplateError, InvalidConversationError
from llmfoundry.tokenizers.utils import get_date_string
from tests.helpers.tokenizers import gpt2_tokenizer, smollm2_tokenizer


def chat(*messages: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{'role': role, 'content': content} for role, content in messages]


def with_template(template: str | None) -> Any:
    tokenizer = gpt2_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


PLAIN = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
REMEDY = 'Give a template that keeps what it rendered as tokenizer.kwargs.chat_template, or make one example of each answer.'
TALK = chat(('system', 'S'), ('user', 'Q'), ('assistant', 'A'), ('tool', 'T'), ('assistant', 'B'))


def test_chatml_where_the_tokenizer_has_no_template() -> None:
    assert chat_turn_texts(TALK, with_template(None)) == [
        ('<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n', 'A<|im_end|>\n'),
        ('<|im_start|>tool\nT<|im_end|>\n<|im_start|>assistant\n', 'B<|im_end|>\n'),
    ]


def test_the_tokenizers_own_template_comes_first() -> None:
    assert chat_turn_texts(TALK, with_template(PLAIN)) == [('system:S|user:Q|assistant:', 'A|'), ('tool:T|assistant:', 'B|')]


def test_a_template_without_generation_prompt_leaves_the_header_to_the_response() -> None:
    template = PLAIN.partition('{% if add')[0]
    assert chat_turn_texts(TALK[1:3], with_template(template)) == [('user:Q|', 'assistant:A|')]


def test_a_chat_that_the_assistant_opens() -> None:
    assert chat_turn_texts(chat(('assistant', 'A'), ('user', 'Q'), ('assistant', 'B')), with_template(PLAIN)) == [('assistant:', 'A|'), ('user:Q|assistant:', 'B|')]


def test_content_in_parts() -> None:
    parts = [{'type': 'text', 'text': 'one '}, 'two']
    assert chat_turn_texts(chat(('user', parts), ('assistant', [{'type': 'text', 'text': 'x'}])), with_template(None)) == [
        ('<|im_start|>user\none two<|im_end|>\n<|im_start|>assistant\n', 'x<|im_end|>\n'),
    ]


def test_a_part_that_is_not_text_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match='only text parts can be rendered'):
        chat_turn_texts(chat(('user', [{'type': 'image', 'url': 'x'}]), ('assistant', 'A')), with_template(None))


def test_date_string() -> None:
    [(prompt, _)] = chat_turn_texts(TALK[1:3], with_template('{{ date_string }}/' + PLAIN))
    assert prompt == f'{get_date_string()}/user:Q|assistant:'
    assert re.match(r'\d\d [A-Z][a-z][a-z] \d{4}/', prompt)


CONTENT = st.text(st.characters(codec='utf-8', exclude_categories=('Cs',)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4), st.booleans())
def test_turns_joined_are_the_whole_render(pairs: list[tuple[str, str]], with_system: bool) -> None:
    messages = chat(*[('system', 'be kind')] * with_system, *[m for q, a in pairs for m in (('user', q), ('assistant', a))])
    for tokenizer in TOKENIZERS:
        turns = chat_turn_texts(messages, tokenizer)
        render = tokenizer.apply_chat_template(messages, chat_template=tokenizer.chat_template or CHATML_TEMPLATE, tokenize=False)
        assert ''.join(p + r for p, r in turns) == render
        assert [r for _, r in turns] == [f'{a}<|im_end|>\n' for _, a in pairs]


TOKENIZERS = [with_template(None), smollm2_tokenizer()]


@pytest.mark.parametrize(
    ('template', 'text'),
    [
        # The last message is rendered in full, earlier ones without what the assistant said.
        (
            "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['role'] }}:{{ m['content'] }}|{% endif %}{% endfor %}",
            'Invalid conversation: up to message 3, the chat template renders earlier messages differently than before, so what was trained would not be what the model sees later. '
            "Before: 'user:Q|assistant:A|'. Now: 'user:Q|user:R|assistant:B|'. " + REMEDY,
        ),
        (
            "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}ASSISTANT{% endif %}",
            'Invalid conversation: the prompt before message 1, with the generation prompt, must be the first part of the conversation with that message. '
            "Prompt: 'user:Q|ASSISTANT'. Conversation: 'user:Q|assistant:A|'. " + REMEDY,
        ),
    ],
)
def test_templates_that_rewrite(template: str, text: str) -> None:
    with pytest.raises(InvalidConversationError) as e:
        chat_turn_texts(chat(('user', 'Q'), ('assistant', 'A'), ('user', 'R'), ('assistant', 'B')), with_template(template))
    assert str(e.value) == text


@pytest.mark.parametrize(
    ('template', 'cause'),
    [("{{ raise_exception('nope') }}", 'nope'), ("{{ messages[0]['content'] + 1 }}", 'can only concatenate str (not "int") to str'), ('{% if %}', "Expected an expression, got 'end of statement block'")],
)
def test_templates_that_fail(template: str, cause: str) -> None:
    with pytest.raises(ChatTemplateError) as e:
        chat_turn_texts(TALK[1:3], with_template(template))
    assert str(e.value) == f'Failed to process sample {TALK[1:3]} with template {template}. {cause}'


def test_a_template_that_ends_the_conversation_with_eos() -> None:
    template = PLAIN.replace('{% endif %}', '{% else %}{{ eos_token }}{% endif %}')
    assert chat_turn_texts(TALK, with_template(template)) == [('system:S|user:Q|assistant:', 'A|'), ('tool:T|assistant:', 'B|<|endoftext|>')]


def test_a_template_that_leaves_the_answer_out() -> None:
    template = "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}{{ part['text'] }}{% endfor %}|{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    with pytest.raises(ChatTemplateError) as e:
        chat_turn_texts(chat(('user', 'Q'), ('assistant', 'An answer.\n')), with_template(template))
    assert str(e.value).endswith('It leaves out the content of message 1: \'An answer.\\n\' became \'|\'. It may want content as a list: [{"type": "text", "text": ...}]')
    parts = [{'type': 'text', 'text': 'An answer.'}]
    assert chat_turn_texts(chat(('user', parts), ('assistant', parts)), with_template(template)) == [('user:An answer.|assistant:', 'An answer.|')]


def test_a_template_may_drop_thoughts_and_trim() -> None:
    template = PLAIN.replace("m['content']", "m['content'].split('</think>')[-1] | trim")
    assert chat_turn_texts(chat(('user', 'Q'), ('assistant', '<think>hm</think>\n The answer. \n')), with_template(template)) == [('user:Q|assistant:', 'The answer.|')]
    assert chat_turn_texts(chat(('user', 'Q'), ('assistant', ' \n')), with_template(template)) == [('user:Q|assistant:', '|')]
