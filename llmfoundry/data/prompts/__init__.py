"""Prompts and prompt formats: the text form of ``input``, ``contexts`` and ``response`` for each model family."""

from __future__ import annotations

from llmfoundry.data.prompts.conversation import Conversation
from llmfoundry.data.prompts.formats import (
    FORMATS,
    ChatMLFormat,
    DollyFormat,
    Llama2Format,
    PromptFormat,
    RedpajamaFormat,
    TogetherLlama2Format,
    UserAssistantFormat,
    VicunaFormat,
    default_format,
)
from llmfoundry.data.prompts.presets import PROMPTS, DefaultPrompt, FewShotQA, StandaloneQuestion, ZeroShotQA
from llmfoundry.data.prompts.prompt import Message, Prompt, PromptText
from llmfoundry.data.prompts.roles import Role

__all__ = [
    'FORMATS',
    'PROMPTS',
    'ChatMLFormat',
    'Conversation',
    'DefaultPrompt',
    'DollyFormat',
    'FewShotQA',
    'Llama2Format',
    'Message',
    'Prompt',
    'PromptFormat',
    'PromptText',
    'RedpajamaFormat',
    'Role',
    'StandaloneQuestion',
    'TogetherLlama2Format',
    'UserAssistantFormat',
    'VicunaFormat',
    'ZeroShotQA',
    'default_format',
]
