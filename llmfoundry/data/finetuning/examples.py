"""The two forms of a formatted example, prompt/response and chat, and the checks of each.

The checks raise the typed errors of ``llmfoundry.errors.examples`` at the first fault, before any tokenizer sees the example: a template given a wrong role would render something, and the fault
would be trained. ``mark_row`` adds which row it was, in a way that survives the trip between processes.
"""

from __future__ import annotations

from typing import Any, Literal, Mapping, Sequence

from llmfoundry.errors import (
    BaseContextualError,
    ConsecutiveRepeatedChatRolesError,
    IncorrectMessageKeyQuantityError,
    InvalidContentTypeError,
    InvalidExampleTypeError,
    InvalidLastChatMessageRoleError,
    InvalidMessageTypeError,
    InvalidPromptTypeError,
    InvalidResponseTypeError,
    InvalidRoleError,
    NotEnoughChatDataError,
    UnknownExampleTypeError,
)
from llmfoundry.errors.examples import ALLOWED_MESSAGES_KEYS, ALLOWED_PROMPT_KEYS, ALLOWED_RESPONSE_KEYS

__all__ = ['ExampleType', 'get_example_type', 'mark_row', 'messages_of', 'prompt_and_response', 'validate_chat_example', 'validate_prompt_response']

ExampleType = Literal['prompt_response', 'chat']

_ROLES = ('user', 'assistant', 'system', 'tool')
_LAST_ROLE = 'assistant'
_MESSAGE_KEYS = {'role', 'content'}


def get_example_type(example: Mapping[str, Any]) -> ExampleType:
    """Which form the example has.

    Raises:
        InvalidExampleTypeError: it is not a mapping.
        UnknownExampleTypeError: its keys are neither exactly ``prompt`` with ``response`` or ``completion``, nor exactly ``messages``.
    """
    if not isinstance(example, Mapping):
        raise InvalidExampleTypeError(type(example))
    keys = set(example)
    if len(keys) == 2 and keys & ALLOWED_PROMPT_KEYS and keys & ALLOWED_RESPONSE_KEYS:
        return 'prompt_response'
    if len(keys) == 1 and keys & ALLOWED_MESSAGES_KEYS:
        return 'chat'
    raise UnknownExampleTypeError(example.keys())


def prompt_and_response(example: Mapping[str, Any]) -> tuple[Any, Any]:
    """The two values of a prompt/response example, unchecked."""
    return example['prompt'], example['response'] if 'response' in example else example['completion']


def validate_prompt_response(example: Mapping[str, Any]) -> None:
    """Checks that both values are text.

    Raises:
        InvalidPromptTypeError, InvalidResponseTypeError: one of them is not a string.
    """
    prompt, response = prompt_and_response(example)
    if not isinstance(prompt, str):
        raise InvalidPromptTypeError(type(prompt))
    if not isinstance(response, str):
        raise InvalidResponseTypeError(type(response))


def validate_chat_example(example: Mapping[str, Any]) -> None:
    """Checks the messages of a chat: a list of at least two ``{role, content}``, the last one from the assistant, no role twice in a row.

    Raises:
        InvalidMessageTypeError: ``messages`` is not a list, or a message is not a mapping.
        NotEnoughChatDataError: fewer than two messages.
        UnknownExampleTypeError: a message lacks ``role`` or ``content``.
        IncorrectMessageKeyQuantityError: a message has a value under another key.
        InvalidRoleError: a role other than user, assistant, system, tool.
        ConsecutiveRepeatedChatRolesError: two messages in a row have one role.
        InvalidContentTypeError: content is neither text nor a list.
        InvalidLastChatMessageRoleError: the last message is not the assistant's, so it would train nothing.
    """
    messages: Sequence[Any] = example['messages']
    if not isinstance(messages, (list, tuple)):
        raise InvalidMessageTypeError(type(messages))
    if len(messages) < 2:
        raise NotEnoughChatDataError()
    previous_role = None
    for message in messages:
        role = _check_message(message)
        if role == previous_role:
            raise ConsecutiveRepeatedChatRolesError(role)
        previous_role = role
    if previous_role != _LAST_ROLE:
        raise InvalidLastChatMessageRoleError(str(previous_role), _LAST_ROLE)


def messages_of(example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Role and content of each message of a chat that passed its checks."""
    return [{'role': message['role'], 'content': message['content']} for message in example['messages']]


def _check_message(message: Any) -> str:
    """The role of a message that passed its own checks."""
    if not isinstance(message, Mapping):
        raise InvalidMessageTypeError(type(message))
    if not _MESSAGE_KEYS <= set(message):
        raise UnknownExampleTypeError(message.keys())
    # Arrow gives every message the keys that any message of the data set has, with None for the values.
    if any(message[key] is not None for key in message if key not in _MESSAGE_KEYS):
        raise IncorrectMessageKeyQuantityError(list(message))
    role, content = message['role'], message['content']
    if role not in _ROLES:
        raise InvalidRoleError(role, _ROLES)
    if not isinstance(content, (str, list)):
        raise InvalidContentTypeError(type(content))
    return role


def mark_row(error: Exception, row: int) -> None:
    """Notes on ``error`` that row ``row`` (0-based) caused it: ``error.row``."""
    error.row = row  # type: ignore[attr-defined]
    if isinstance(error, BaseContextualError):
        # The context is what such an error is rebuilt from in another process.
        error.context['row'] = row
