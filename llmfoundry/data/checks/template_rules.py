"""Rules about a chat template: what is rendered for training and what is rendered for generation must be the same text up to where the answer begins.

A template is any program. So each rule renders real conversations and compares texts, first with one question and answer that are always the same, then with those of the data.
"""

from __future__ import annotations

from typing import Any, Iterator, Mapping, Sequence

import numpy as np

from llmfoundry.data.checks.findings import ERROR, WARNING, Finding
from llmfoundry.data.checks.rows import LintRow
from llmfoundry.data.checks.tokenizer_facts import CONTROL_TOKEN, PROBE, RENDER_ERRORS, Messages, Render, TokenizerFacts, plain_text

__all__ = ['check_conversation', 'check_prompt_tokens', 'check_template', 'roles_of']

_REWRITE_REMEDY = (
    'Every earlier answer would be trained in a form that the model never sees as history. Use a template that renders each message the same wherever it stands, or split conversations into one '
    'example per answer.'
)


def check_template(tokenizer: Any, render: Render, facts: TokenizerFacts, conversation: Messages = ()) -> list[Finding]:
    """Rules about the template alone, on one question and answer.

    Args:
        conversation: the first one of the data, taken where the template refuses a plain question and answer; it may know other roles only.
    """
    found = check_conversation(PROBE, render)
    if conversation and any(f.rule == 'template-fails' for f in found):
        return []
    if found:
        return found
    return [*_split_tokens(tokenizer, render(PROBE, False)), *_silent_end(tokenizer, facts), *_trained_header(render)]


def check_prompt_tokens(tokenizer: Any, row: LintRow, messages: Messages, render: Render) -> list[Finding]:
    """Whether the tokens before the last answer are those that generation would give: text cut elsewhere may be tokenised otherwise."""
    if not row.turns or row.turns[-1].middle >= len(row.ids):
        return []
    last = max(i for i, message in enumerate(messages) if message['role'] == 'assistant')
    try:
        asked = np.asarray(tokenizer(render(messages[:last], True), add_special_tokens=False)['input_ids'])
    except RENDER_ERRORS:
        return []
    trained = row.ids[: row.turns[-1].middle]
    same = min(len(asked), len(trained))
    different = np.flatnonzero(asked[:same] != trained[:same])
    if len(asked) == len(trained) and not len(different):
        return []
    at = int(different[0]) if len(different) else same
    around = slice(max(0, at - 2), at + 3)
    return [
        Finding(
            'prompt-tokens-differ', WARNING,
            f'from token {at} on, the history is tokenised as {_listed(tokenizer, trained[around])} in training and as {_listed(tokenizer, asked[around])} in generation',
            'Put a special token between the messages in the chat template, so that no token can reach across.', row=row.name, position=at,
        )
    ]


def _listed(tokenizer: Any, ids: np.ndarray) -> str:
    return repr([tokenizer.decode([int(i)]) for i in ids])


def check_conversation(messages: Messages, render: Render, row: str = '') -> list[Finding]:
    """Whether every prompt that generation would use is a prefix of the text that is trained on, and no message changes when others follow."""
    try:
        whole = render(messages, False)
    except RENDER_ERRORS as e:
        return [_failed(e, row)]
    for index, message in enumerate(messages):
        if message['role'] != 'assistant':
            continue
        if message.get('content') is not None and not _text_of(message['content']).strip():
            return [
                Finding(
                    'empty-answer', WARNING, f'message {index}: the assistant says nothing, so the model is trained to end its turn at once',
                    'Leave such conversations out, or such turns with the question before them.', row=row,
                )
            ]
        try:
            prompt, answered = render(messages[:index], True), render(messages[: index + 1], False)
        except RENDER_ERRORS as e:
            return [_failed(e, row)]
        if not answered.startswith(prompt):
            at = _first_difference(prompt, answered)
            return [
                Finding(
                    'generation-prompt-differs', ERROR,
                    f'message {index}: the prompt for generation goes on with {_shown(prompt, at)} where the text for training has {_shown(answered, at)}',
                    'The model would be asked in another form than it was trained in: make add_generation_prompt of the template render exactly the header of an assistant message.',
                    row=row, snippet=_around(prompt, at),
                )
            ]
        if not whole.startswith(answered):
            at = _first_difference(answered, whole)
            return [
                Finding(
                    'history-rewritten', ERROR,
                    f'message {index}: the text up to it ends in {_shown(answered, at)}, but with later messages it becomes {_shown(whole, at)}',
                    _REWRITE_REMEDY, row=row, snippet=_around(whole, at),
                )
            ]
    return []


def _text_of(content: Any) -> str:
    """Text of a content that may be a list of parts."""
    return content if isinstance(content, str) else ' '.join(str(part.get('text', part) if isinstance(part, Mapping) else part) for part in content)


def _failed(error: Exception, row: str) -> Finding:
    return Finding(
        'template-fails', ERROR, f'the chat template raises {type(error).__name__}: {str(error)[:300]}',
        "Give a template that accepts the roles of the data: tokenizer.kwargs.chat_template, or another model's tokenizer.", row=row,
    )


def _first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _shown(text: str, at: int) -> str:
    return repr(text[at : at + 30]) if at < len(text) else 'nothing'


def _around(text: str, at: int) -> str:
    return ('...' if at > 60 else '') + text[max(0, at - 60) : at + 60].replace('\n', '\\n')


def _split_tokens(tokenizer: Any, text: str) -> Iterator[Finding]:
    """Control tokens that the tokenizer does not know as one token; each is spelled out instead."""
    unknown: dict[str, int] = {}
    for token in dict.fromkeys(CONTROL_TOKEN.findall(text)):
        pieces = len(tokenizer(token, add_special_tokens=False)['input_ids'])
        if pieces > 1:
            unknown[token] = pieces
    if unknown:
        listed = ', '.join(f'{token} ({pieces} tokens)' for token, pieces in unknown.items())
        yield Finding(
            'split-special-token', WARNING, f'the chat template writes tokens that the tokenizer does not have and spells out: {listed}',
            f'Add them (tokenizer.kwargs.additional_special_tokens: {list(unknown)}, with a model whose vocabulary has room), or use a template whose tokens the tokenizer has. As it is, generation needs '
            'stop strings.',
        )


def _silent_end(tokenizer: Any, facts: TokenizerFacts) -> Iterator[Finding]:
    """A template that puts nothing after an assistant message."""
    if facts.terminator == '':
        yield Finding(
            'template-without-end', WARNING, 'the chat template puts nothing after an assistant message',
            f'Only the last answer ends in {facts.name(facts.eos_id)}; earlier ones end without a sign. Add the eos token after assistant messages in the template.',
        )
    elif facts.terminator and not (facts.stop_ids - {facts.eos_id}) and not _holds(tokenizer, facts) and not CONTROL_TOKEN.search(facts.terminator):
        yield Finding(
            'template-without-end', WARNING, f'the chat template ends an assistant message with {facts.terminator!r}, which is no special token',
            f'Generation stops at {facts.name(facts.eos_id)} only, so give {facts.terminator!r} as a stop string, or end assistant messages with the eos token.',
        )


def _holds(tokenizer: Any, facts: TokenizerFacts) -> bool:
    return facts.eos_id is not None and facts.eos_id in tokenizer(facts.terminator, add_special_tokens=False)['input_ids']


def _trained_header(render: Render) -> Iterator[Finding]:
    """Without a generation prompt, the header of the assistant message counts as part of its answer."""
    answered, prompt = render(PROBE, False), render(PROBE[:1], True)
    header = answered[len(prompt) :].partition(str(PROBE[1]['content']))[0]
    if CONTROL_TOKEN.search(header) or 'assistant' in header.lower():
        yield Finding(
            'header-trained', WARNING, f'the generation prompt leaves out {header!r}, so that it is trained as part of each answer',
            'Let the template render the header of an assistant message when add_generation_prompt is true.',
        )


def roles_of(messages: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """(role, text) of each message."""
    return tuple((str(m['role']), plain_text(m['content'])) for m in messages)
