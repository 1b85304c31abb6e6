"""Chats to texts: one (prompt, response) per message of the assistant, cut from what the chat template renders.

The template is applied to the growing history, twice per response: once up to where the model would start to generate, once with its answer. Cutting the final render at markers would be cheaper and wrong: where a
template treats the last message differently, only the two renders show what the model will see when it generates. Both must be prefixes of what follows, else the conversation is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping, Sequence

from jinja2 import TemplateError

from llmfoundry.errors import ChatTemplateError, InvalidConversationError
from llmfoundry.tokenizers.utils import get_date_string

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ['CHATML_TEMPLATE', 'chat_template_of', 'chat_turn_texts', 'render_prefixes']

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part is string %}{{ part }}{% elif part['text'] is string %}{{ part['text'] }}"
    "{% else %}{{ raise_exception('only text parts can be rendered') }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""For tokenizers without a template. Its content may be text or a list of text parts."""

_REMEDY = 'Give a template that keeps what it rendered as tokenizer.kwargs.chat_template, or make one example of each answer'

# What a template raises: its own errors, and those of Python for a value of the wrong kind.
_TEMPLATE_FAILURES = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def chat_template_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The template that is used with ``tokenizer``: its own, else ChatML."""
    return getattr(tokenizer, 'chat_template', None) or CHATML_TEMPLATE


def render_prefixes(messages: Sequence[Mapping[str, Any]], ends: Sequence[int], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool) -> list[str]:
    """The first ``end`` messages as text, for each of ``ends``, by the template, which may use ``date_string``.

    Raises:
        ChatTemplateError: the template failed.
    """
    own = getattr(tokenizer, 'chat_template', None)
    try:
        return tokenizer.apply_chat_template(
            [list(messages[:end]) for end in ends],
            chat_template=None if own else CHATML_TEMPLATE,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=get_date_string(),
        )
    except _TEMPLATE_FAILURES as e:
        raise ChatTemplateError(str(own or CHATML_TEMPLATE), list(messages), str(e)) from e


def chat_turn_texts(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """The texts of the turns: what the model reads since its last response, and its response.

    Joined, the texts are the render of the whole conversation.

    Raises:
        ChatTemplateError: the template failed.
        InvalidConversationError: a render is not the beginning of the next one.
    """
    ends = [i for i, message in enumerate(messages) if message['role'] == 'assistant']
    histories = render_prefixes(messages, ends, tokenizer, add_generation_prompt=True)
    wholes = render_prefixes(messages, [i + 1 for i in ends], tokenizer, add_generation_prompt=False)
    eos_token = getattr(tokenizer, 'eos_token', None) or ''
    turns, done = [], ''
    for index, history, whole in zip(ends, histories, wholes, strict=True):
        if turns and eos_token and done.endswith(eos_token) and not history.startswith(done):
            # Phi-3's template ends the whole conversation, not each turn, with EOS: what goes on has none there.
            done = done.removesuffix(eos_token)
            turns[-1] = (turns[-1][0], turns[-1][1].removesuffix(eos_token))
        if not (whole.startswith(done) and history.startswith(done)):
            raise InvalidConversationError(
                f'up to message {index}, the chat template renders earlier messages differently than before, so what was trained would not be what the model sees later. '
                f'Before: {_tail(done)}. Now: {_from_difference(done, whole if not whole.startswith(done) else history)}. {_REMEDY}',
            )
        if not whole.startswith(history):
            raise InvalidConversationError(
                f'the prompt before message {index}, with the generation prompt, must be the first part of the conversation with that message. '
                f'Prompt: {_tail(history)}. Conversation: {_from_difference(history, whole)}. {_REMEDY}',
            )
        turns.append((history[len(done) :], whole[len(history) :]))
        _check_answer_is_rendered(messages, index, turns[-1][1], tokenizer)
        done = whole
    return turns


def _check_answer_is_rendered(messages: Sequence[Mapping[str, Any]], index: int, response: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a template that leaves the answer out: those of vision models do, given text where they want a list of parts."""
    content = messages[index]['content']
    last_words = content.rstrip()[-40:].split() if isinstance(content, str) else []
    if last_words and last_words[-1] not in response:
        reason = f'It leaves out the content of message {index}: {_tail(content)} became {_tail(response)}. It may want content as a list: [{{"type": "text", "text": ...}}]'
        raise ChatTemplateError(str(chat_template_of(tokenizer)), list(messages), reason)


def _tail(text: str, length: int = 80) -> str:
    return repr(text if len(text) <= length else '...' + text[-length:])


def _from_difference(expected: str, actual: str, length: int = 80) -> str:
    """``actual`` around the first character at which it differs from ``expected``."""
    at = next((i for i, (a, b) in enumerate(zip(expected, actual, strict=False)) if a != b), min(len(expected), len(actual)))
    return repr(actual[max(0, at - length // 2) : at + length // 2])
