"""Prompt formats: how each model family marks who says what.

A format holds markers only; what is said, and in which order, is the business of ``Prompt``. Fine-tuning works best in the format that the base model
was already tuned on, so ``default_format`` knows the families for which that format is public.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Iterator

from llmfoundry.data.prompts.roles import Role

__all__ = [
    'FORMATS',
    'ChatMLFormat',
    'DollyFormat',
    'Llama2Format',
    'PromptFormat',
    'RedpajamaFormat',
    'TogetherLlama2Format',
    'UserAssistantFormat',
    'VicunaFormat',
    'default_format',
]


@dataclass(frozen=True)
class PromptFormat:
    """Markers of a model family; this base class has none.

    Args:
        input: around what the user says.
        response: around what the model says.
        system: around the system message.
        contexts: around all contexts of one message together.
        examples: around all examples together.
        nested_system: whether the system message stands inside the first input role instead of before it.
        nested_contexts: whether contexts stand inside their input role.
        strip_stop_strings: whether ``stop_strings`` come without the white space around them.
        role_separator: between two roles.
        content_separator: between the parts that stand inside one role.
        BOS: before each instruction.
        EOS: after each finished response.
    """

    input: Role = Role()
    response: Role = Role()
    system: Role = Role()
    contexts: Role = Role()
    examples: Role = Role()
    nested_system: bool = False
    nested_contexts: bool = True
    strip_stop_strings: bool = True
    role_separator: str = '\n'
    content_separator: str = '\n'
    BOS: str = ''
    EOS: str = ''

    def __post_init__(self) -> None:
        for name in ('input', 'response', 'system', 'contexts', 'examples'):
            object.__setattr__(self, name, Role.of(getattr(self, name)))

    def roles(self) -> Iterator[Role]:
        """The five roles."""
        yield from (self.input, self.response, self.system, self.contexts, self.examples)

    @property
    def stop_strings(self) -> list[str]:
        """Texts at which generation has left the model's turn: every prefix and suffix that is not blank, each once."""
        markers = [marker for role in self.roles() for marker in (role.prefix, role.suffix) if marker.strip()]
        return list(dict.fromkeys(marker.strip() if self.strip_stop_strings else marker for marker in markers))


@dataclass(frozen=True)
class UserAssistantFormat(PromptFormat):
    """``User: ...`` and ``Assistant: ...`` on lines of their own."""

    input: Role = Role('User: ')
    response: Role = Role('Assistant: ')


@dataclass(frozen=True)
class RedpajamaFormat(PromptFormat):
    """``<human>: ...`` and ``<bot>: ...``, as RedPajama-INCITE was tuned."""

    input: Role = Role('<human>: ')
    response: Role = Role('<bot>: ')


@dataclass(frozen=True)
class VicunaFormat(PromptFormat):
    """``USER: ...`` and ``ASSISTANT: ...`` between ``<s>`` and ``</s>``."""

    input: Role = Role('USER: ')
    response: Role = Role('ASSISTANT: ')
    BOS: str = '<s>'
    EOS: str = '</s>'


@dataclass(frozen=True)
class Llama2Format(PromptFormat):
    """``<s>[INST] <<SYS>>...<</SYS>> ... [/INST] ... </s>``, as Llama-2-chat was tuned."""

    input: Role = Role('[INST] ', ' [/INST]')
    response: Role = Role(' ', ' ')
    system: Role = Role('<<SYS>>\n', '\n<</SYS>>\n')
    nested_system: bool = True
    role_separator: str = ''
    BOS: str = '<s>'
    EOS: str = '</s>'


@dataclass(frozen=True)
class TogetherLlama2Format(Llama2Format):
    """Llama-2's markers with two spaces inside ``[INST]`` and no BOS or EOS text, as LLaMA-2-7B-32K-Instruct was tuned."""

    input: Role = Role('[INST]  ', '  [/INST]')
    BOS: str = ''
    EOS: str = ''


@dataclass(frozen=True)
class ChatMLFormat(PromptFormat):
    """``<|im_start|>user ... <|im_end|>``."""

    input: Role = Role('<|im_start|>user\n', '<|im_end|>')
    response: Role = Role('<|im_start|>assistant\n', '<|im_end|>')
    system: Role = Role('<|im_start|>system\n', '<|im_end|>')


@dataclass(frozen=True)
class DollyFormat(PromptFormat):
    """``### Instruction:`` and ``### Response:`` above their text, as Dolly and MPT-instruct were tuned."""

    input: Role = Role('### Instruction:\n', '\n')
    response: Role = Role('### Response:\n', '\n')
    system: Role = Role('', '\n')


FORMATS: dict[str, type[PromptFormat]] = {
    cls.__name__: cls
    for cls in (PromptFormat, UserAssistantFormat, RedpajamaFormat, VicunaFormat, Llama2Format, TogetherLlama2Format, ChatMLFormat, DollyFormat)
}

# In this order: a pattern that is a part of another comes after it.
_FAMILIES: tuple[tuple[str, type[PromptFormat]], ...] = (
    (r'vicuna-(7|13|33)b', VicunaFormat),
    (r'llama-2-7b-32k-instruct', TogetherLlama2Format),
    (r'llama-2-7b-32k', PromptFormat),
    (r'llama-2-(7|13|70)b-chat', Llama2Format),
    (r'llama-2-(7|13|70)b', PromptFormat),
    (r'redpajama-incite-7b-(instruct|chat)', RedpajamaFormat),
    (r'mpt-(7|30)b-instruct', DollyFormat),
    (r'mpt-(7|30)b-chat', ChatMLFormat),
)


def default_format(base_model: str) -> PromptFormat | None:
    """The format that a model family was tuned on, by the name of the model; None for a family that is not known."""
    name = base_model.rstrip('/').rpartition('/')[2].lower()
    return next((cls() for pattern, cls in _FAMILIES if re.match(pattern, name)), None)
