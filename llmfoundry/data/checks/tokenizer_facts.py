"""What a tokenizer and its chat template say about where a turn starts and ends.

The template is asked rather than read: a conversation with known words is rendered, and what stands after an assistant's words is the terminator. Reading the Jinja source would have to guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Callable, Mapping, Sequence

import numpy as np
from jinja2 import TemplateError

__all__ = ['PROBE', 'RENDER_ERRORS', 'TokenizerFacts', 'plain_text', 'render_chat', 'terminator_text', 'token_facts']

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, bool], str]

# What a template can raise: its own raise_exception, and Python's errors over values that it did not expect.
RENDER_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError, AssertionError)

# What looks like one control token in a rendered chat: <|im_end|>, <end_of_turn>, <bos>, </s>.
CONTROL_TOKEN = re.compile(r'<\|[^|<>\s]{1,40}\|>|</?[a-z]{1,12}(?:_[a-z]{1,12}){1,4}>|</?(?:s|bos|eos)>')
# Words that no template holds by itself.
PROBE: tuple[dict[str, str], ...] = ({'role': 'user', 'content': 'question alpha'}, {'role': 'assistant', 'content': 'answer bravo'})


def render_chat(tokenizer: Any, default_template: str | None = None, **variables: Any) -> Render:
    """``(messages, add_generation_prompt) -> text`` through the tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer.
        default_template: used if it has none.
        variables: passed to the template.
    """
    template = getattr(tokenizer, 'chat_template', None) or default_template

    def render(messages: Messages, add_generation_prompt: bool) -> str:
        return tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt, **variables)

    return render


@dataclass
class TokenizerFacts:
    """Ids and strings that the rules compare with.

    Args:
        bos_id, eos_id, pad_id: special ids, None where the tokenizer has none.
        stop_ids: tokens that may end an assistant's turn: eos, and the special tokens that the template puts after an assistant message.
        terminator: text that the template puts after an assistant message, stripped; None without a template.
        num_ids: highest id + 1.
        decode: ids -> text, specials included.
    """

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    stop_ids: frozenset[int]
    terminator: str | None
    num_ids: int
    decode: Callable[[Sequence[int]], str]
    _pieces: dict[int, str] = field(default_factory=dict)
    _joined: dict[tuple[int, ...], str] = field(default_factory=dict)
    _anchor: tuple[int, str] | None = None

    def name(self, token_id: int | None) -> str:
        """A token for a message: its text and id."""
        return 'none' if token_id is None else f'{self.decode([token_id])!r} (id {token_id})'

    def piece(self, token_id: int) -> str:
        """Text of one token inside a row, with the space that sentencepiece tokenizers drop at the start of a text."""
        known = self._pieces.get(token_id)
        if known is None:
            if self._anchor is None:
                known = self.decode([token_id])
            else:
                anchor, text = self._anchor
                known = self.decode([anchor, token_id])[len(text) :]
            self._pieces[token_id] = known
        return known

    def joined(self, ids: tuple[int, ...]) -> str:
        """Text of a few tokens, remembered: characters of several tokens come again and again."""
        known = self._joined.get(ids)
        if known is None:
            known = self._joined[ids] = self.decode(ids)
        return known

    def snippet(self, ids: np.ndarray, targets: np.ndarray, position: int, around: int = 12) -> str:
        """Decoded tokens around a position, trained ones in double brackets, newlines escaped."""
        start, stop = max(0, position - around), min(len(ids), position + around)
        text, at = '...' if start else '', start
        while at < stop:
            end = at
            while end < stop and targets[end] == targets[at]:
                end += 1
            run = self.decode([int(i) for i in ids[at:end]]).replace('\n', '\\n')
            text += f'[[{run}]]' if targets[at] else run
            at = end
        return text + ('...' if stop < len(ids) else '')


def token_facts(tokenizer: Any, render: Render | None = None, conversation: Messages = ()) -> TokenizerFacts:
    """Asks a tokenizer, and its chat template through ``render`` (None: the data are not chats), with ``conversation`` where the template refuses a plain question and answer."""
    special = {int(i) for i in tokenizer.all_special_ids}
    special |= {int(i) for i, token in getattr(tokenizer, 'added_tokens_decoder', {}).items() if token.special}
    stop_ids = {int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set()
    terminator = None if render is None else terminator_text(render, conversation)
    if terminator:
        # Words after the terminator (a header of the next turn) are no end of a turn, so only the first special token counts.
        first = next((i for i in _encode(tokenizer, terminator) if i in special), None)
        stop_ids |= {first} if first is not None else set()
    anchor = _encode(tokenizer, 'a')
    return TokenizerFacts(
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        stop_ids=frozenset(stop_ids),
        terminator=terminator,
        num_ids=max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1),
        decode=lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False),
        _anchor=(anchor[-1], tokenizer.decode([anchor[-1]])) if anchor else None,
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
    return [int(i) for i in tokenizer(text, add_special_tokens=False)['input_ids']]


def terminator_text(render: Render, conversation: Messages = ()) -> str | None:
    """Text that a template puts after the last assistant message, stripped; None if it cannot be found out.

    Args:
        render: the template.
        conversation: of the data, ending with the assistant; asked if the template refuses a plain question and answer.
    """
    for messages in (PROBE, conversation):
        words = plain_text(messages[-1]['content']).strip() if messages else ''
        try:
            _, said, after = render(messages, False).rpartition(words) if words else ('', '', '')
        except RENDER_ERRORS:
            # The rules about templates report it.
            continue
        if said:
            return after.strip()
    return None


def plain_text(content: Any) -> str:
    """The text of a message; parts of it that are no text are left out."""
    if isinstance(content, str):
        return content
    return ''.join(str(part.get('text', '')) if isinstance(part, Mapping) else str(part) for part in content or ())
