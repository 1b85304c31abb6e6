"""A conversation of bounded length: old turns, and old contexts before them, are left out of the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Sequence

from llmfoundry.data.prompts.presets import DefaultPrompt
from llmfoundry.data.prompts.prompt import Message, Prompt, PromptText

__all__ = ['Conversation']


@dataclass
class Conversation:
    """Turns so far, and how many of them the model is shown.

    Args:
        prompt: renders the turns.
        message_retention: turns that stay, the newest one included.
        context_retention: turns whose contexts stay, the newest one included.
        messages: the turns, oldest first.

    Raises:
        ValueError: ``message_retention`` below 1 or ``context_retention`` below 0.
    """

    prompt: Prompt = field(default_factory=DefaultPrompt)
    message_retention: int = 5
    context_retention: int = 1
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.message_retention < 1 or self.context_retention < 0:
            raise ValueError(
                f'message_retention must be at least 1 and context_retention at least 0, got {self.message_retention} and {self.context_retention}'
            )

    def ask(self, input: PromptText, contexts: Sequence[PromptText] = ()) -> str:
        """Adds a turn of the user and returns the text that the model has to go on from."""
        self.messages.append(Message(input, None, tuple(contexts)))
        return self.render()

    def answer(self, response: PromptText) -> None:
        """Adds the model's answer to the last turn.

        Raises:
            ValueError: there is no turn that waits for one.
        """
        if not self.messages or self.messages[-1].response is not None:
            raise ValueError('there is no question that waits for an answer; call ask first')
        self.messages[-1] = replace(self.messages[-1], response=response)

    def render(self) -> str:
        """The text of the turns that stay.

        Raises:
            ValueError: nobody has said anything yet.
        """
        if not self.messages:
            raise ValueError('the conversation is empty; call ask first')
        kept = self.messages[-self.message_retention :]
        first_with_contexts = len(kept) - self.context_retention
        *history, last = [m if i >= first_with_contexts else replace(m, contexts=()) for i, m in enumerate(kept)]
        return self.prompt.render(last.input, last.response, last.contexts, history)
