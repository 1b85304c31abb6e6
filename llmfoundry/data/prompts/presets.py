"""Prompts with wording of their own, named in ``prompt_config.method``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Sequence

from llmfoundry.data.prompts.prompt import Message, Prompt

__all__ = ['PROMPTS', 'DefaultPrompt', 'FewShotQA', 'StandaloneQuestion', 'ZeroShotQA']

_ANSWER_FROM_CONTEXTS = (
    'Answer the question at the end from the contexts above it and from nothing else. '
    'If the contexts do not hold the answer, say that you do not know. Keep the answer short.'
)


@dataclass(frozen=True)
class DefaultPrompt(Prompt):
    """``Context: ...``, ``Input: ...`` and ``Response: ...``, each on a line of its own."""

    input_template: str = 'Input: {text}'
    context_template: str = 'Context: {text}'
    response_template: str = 'Response: {text}'


@dataclass(frozen=True)
class ZeroShotQA(Prompt):
    """Answers a question from contexts."""

    system_message: str = _ANSWER_FROM_CONTEXTS
    input_template: str = 'Question: {text}'
    context_template: str = 'Context {index}: {text}'
    response_template: str = 'Answer: {text}'


@dataclass(frozen=True)
class FewShotQA(ZeroShotQA):
    """Answers a question from contexts, after two worked examples: one that can be answered and one that cannot."""

    examples: Sequence[Message | Mapping[str, Any]] = (
        Message(
            'Which of the two lakes is deeper?',
            'Lake Vorn, with 212 metres against 84.',
            ('Lake Vorn lies in a rift and is 212 metres deep.', 'Lake Ells is a reservoir of at most 84 metres.'),
        ),
        Message('Who built the dam?', 'I do not know; the contexts do not say who built it.', ('Lake Ells is a reservoir of at most 84 metres.',)),
    )


@dataclass(frozen=True)
class StandaloneQuestion(Prompt):
    """Rewrites the last question of a conversation so that it can be understood alone; the contexts are the earlier turns."""

    system_message: str = (
        'Rewrite the follow-up question as a question that can be understood without the conversation. Keep its meaning and its language. Do not answer it.'
    )
    input_template: str = 'Follow-up question: {text}'
    context_template: str = '{text}'
    response_template: str = 'Standalone question: {text}'


PROMPTS: dict[str, type[Prompt]] = {cls.__name__: cls for cls in (Prompt, DefaultPrompt, ZeroShotQA, FewShotQA, StandaloneQuestion)}
