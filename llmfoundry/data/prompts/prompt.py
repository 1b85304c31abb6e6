"""Prompts: input, contexts and response -> the text that a model reads.

A ``Prompt`` decides what is said (templates, system message, examples), its ``format`` how it is marked. Training and generation use the same
``render``: without a response it ends where the model has to go on, and a training row is masked up to that very place.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, field
from typing import Any, Mapping, Sequence

from llmfoundry.data.prompts.formats import PromptFormat
from llmfoundry.data.prompts.roles import Role

__all__ = ['Message', 'Prompt', 'PromptText']

PromptText = str | Mapping[str, Any]
"""A text, or values for the names in a template."""


@dataclass(frozen=True)
class Message:
    """One exchange.

    Args:
        input: what the user says.
        response: what the model answers; None where it has yet to.
        contexts: texts to answer from.
    """

    input: PromptText
    response: PromptText | None = None
    contexts: tuple[PromptText, ...] = ()

    @classmethod
    def of(cls, value: Message | Mapping[str, Any]) -> Message:
        """A message from a row with ``input`` and, if it has them, ``response`` and ``contexts``.

        Raises:
            TypeError: neither a message nor a mapping, other keys, or contexts that are not a list.
        """
        if isinstance(value, Message):
            return value
        if not isinstance(value, Mapping) or not set(value) <= {'input', 'response', 'contexts'} or 'input' not in value:
            raise TypeError(f'a message is a mapping with input, response and contexts, got {value!r}')
        contexts = value.get('contexts') or ()
        if isinstance(contexts, (str, Mapping)):
            raise TypeError(f'contexts is a list of texts, got {type(contexts).__name__} {contexts!r}')
        return cls(value['input'], value.get('response'), tuple(contexts))


@dataclass(frozen=True)
class Prompt:
    """Renders messages; this base class adds no words of its own.

    Args:
        system_message: instructions that stand before everything else; '' for none.
        examples: finished messages that show the model what to do; mappings with input, response and contexts will do.
        format: the markers around each part.
        text_key: the name by which templates refer to the text.
        input_template: wording around the input.
        context_template: wording around each context; ``{index}`` counts from 1.
        response_template: wording around the response.

    Raises:
        ValueError: a template without its text.
        TypeError: an example that is not a message.
    """

    system_message: str = ''
    examples: Sequence[Message | Mapping[str, Any]] = ()
    format: PromptFormat = field(default_factory=PromptFormat)
    text_key: str = 'text'
    input_template: str = '{text}'
    context_template: str = '{text}'
    response_template: str = '{text}'

    def __post_init__(self) -> None:
        object.__setattr__(self, 'examples', tuple(Message.of(e) for e in self.examples))
        for name in ('input_template', 'context_template', 'response_template'):
            template = getattr(self, name)
            names = [n for _, n, _, _ in string.Formatter().parse(template) if n is not None]
            if not names:
                raise ValueError(f'{name}={template!r} has no place for the text: write {{{self.text_key}}} where it belongs')

    @property
    def stop_strings(self) -> list[str]:
        """Texts at which generation has left the model's turn."""
        return self.format.stop_strings

    def render(
        self,
        input: PromptText,
        response: PromptText | None = None,
        contexts: Sequence[PromptText] = (),
        history: Sequence[Message | Mapping[str, Any]] = (),
    ) -> str:
        """The whole text: examples, earlier messages, and this message.

        Args:
            input: what the user says.
            response: the answer; None ends the text where the model has to begin it.
            contexts: texts to answer from.
            history: earlier messages of the conversation.

        Returns:
            The text, without white space at either end.
        """
        messages = [*(Message.of(m) for m in history), Message(input, response, tuple(contexts))]
        # The system message comes once, with the first thing that is said.
        system = self.system_message
        parts = []
        if self.examples:
            shown = [self.render_message(m, system if i == 0 else '') for i, m in enumerate(self.examples)]
            parts.append(self.format.examples.render(self.format.role_separator.join(shown)))
            system = ''
        parts += [self.render_message(m, system if i == 0 else '') for i, m in enumerate(messages)]
        return self.format.role_separator.join(parts).strip()

    def render_message(self, message: Message | Mapping[str, Any], system_message: str = '') -> str:
        """Instruction and response of one message."""
        message = Message.of(message)
        instruction = self.render_instruction(message.input, message.contexts, system_message)
        return instruction + self.format.role_separator + self.render_response(message.response)

    def render_instruction(self, input: PromptText, contexts: Sequence[PromptText] = (), system_message: str = '') -> str:
        """BOS, system message, contexts and input; the first two of these parts inside the input role where the format nests them."""
        style = self.format
        outside: list[str] = []
        inside: list[str] = []
        if system_message:
            (inside if style.nested_system else outside).append(style.system.render(system_message))
        if contexts:
            rendered = [self._fill(self.context_template, text, style.contexts, index=i) for i, text in enumerate(contexts, 1)]
            (inside if style.nested_contexts else outside).append(style.contexts.render(style.content_separator.join(rendered)))
        inside.append(self._fill(self.input_template, input, style.input))
        return style.BOS + style.role_separator.join([*outside, style.input.render(style.content_separator.join(inside))])

    def render_response(self, response: PromptText | None) -> str:
        """The response with its markers and EOS; for None what stands before it."""
        role = self.format.response
        if response is None:
            return role.prefix + next(string.Formatter().parse(self.response_template))[0]
        return role.render(self._fill(self.response_template, response, role)) + self.format.EOS

    def _fill(self, template: str, text: PromptText, role: Role, **values: Any) -> str:
        """The template with the text, or with the values of a mapping, in its places; stripped first, if the role says so, since here it is still alone.

        Raises:
            ValueError: the template names a value that is not there.
        """
        if isinstance(text, str) and role.strip_text:
            text = text.strip()
        given = {**values, **(text if isinstance(text, Mapping) else {self.text_key: text})}
        try:
            return template.format(**given)
        except (KeyError, IndexError) as e:
            raise ValueError(f'the template {template!r} asks for {e}; there is {", ".join(sorted(given))}') from None
