"""Errors about one finetuning example: unknown keys, wrong types, wrong order of roles."""

from __future__ import annotations

from typing import Any, Iterable, Sequence

from llmfoundry.errors.base import UserError

ALLOWED_PROMPT_KEYS = {'prompt'}
ALLOWED_RESPONSE_KEYS = {'response', 'completion'}
ALLOWED_MESSAGES_KEYS = {'messages'}


class UnknownExampleTypeError(UserError):
    """The keys of an example match no format."""

    def __init__(self, example_keys: Any) -> None:
        keys = sorted(map(str, example_keys))
        super().__init__(
            f'Found keys {keys} in dataset. Unknown example type. For prompt and response finetuning, the valid prompt keys are {sorted(ALLOWED_PROMPT_KEYS)} and the valid '
            f'response keys are {sorted(ALLOWED_RESPONSE_KEYS)}. For chat finetuning, the allowed keys are {sorted(ALLOWED_MESSAGES_KEYS)}.',
            example_keys=keys,
        )


class _WrongTypeError(UserError):
    """Shared form of the errors about a value of the wrong Python type."""

    template = 'Expected another type, got {}.'

    def __init__(self, wrong_type: Any) -> None:
        super().__init__(self.template.format(wrong_type), wrong_type=str(wrong_type))


class InvalidExampleTypeError(_WrongTypeError):
    """An example that is not a mapping."""

    template = 'Expected example to be a Mapping, but found {}'


class InvalidMessageTypeError(_WrongTypeError):
    """A message that is not a mapping."""

    template = 'Expected message to be a Mapping, but found {}'


class InvalidContentTypeError(_WrongTypeError):
    """Message content of the wrong type."""

    template = 'Expected content to be a string or a list, but found {}'


class InvalidPromptTypeError(_WrongTypeError):
    """A prompt that is not text."""

    template = 'Expected prompt to be a string, but found {}'


class InvalidResponseTypeError(_WrongTypeError):
    """A response that is not text."""

    template = 'Expected response to be a string, but found {}'


class NotEnoughChatDataError(UserError):
    """A chat of fewer than two messages."""

    def __init__(self) -> None:
        super().__init__('Chat example must have at least two messages')


class ConsecutiveRepeatedChatRolesError(UserError):
    """The same role twice in a row."""

    def __init__(self, repeated_role: str) -> None:
        super().__init__(f'Conversation roles must alternate but found {repeated_role} repeated consecutively.', repeated_role=repeated_role)


class InvalidLastChatMessageRoleError(UserError):
    """A chat that does not end with the assistant."""

    def __init__(self, last_role: str, expected_role: Iterable[str] | str = ('assistant',)) -> None:
        expected = [expected_role] if isinstance(expected_role, str) else sorted(expected_role)
        super().__init__(f'Last message role must be one of {expected}, but got {last_role}', last_role=last_role, expected_role=expected)


class IncorrectMessageKeyQuantityError(UserError):
    """A message with other keys than role and content."""

    def __init__(self, keys: Sequence[str]) -> None:
        super().__init__(f'Expected 2 keys in message, but found {len(keys)} keys: {list(keys)}', keys=list(keys))


class InvalidRoleError(UserError):
    """A role outside the allowed ones."""

    def __init__(self, role: str, valid_roles: Iterable[str]) -> None:
        super().__init__(f'Expected role to be one of {sorted(valid_roles)} but found: {role}', role=role, valid_roles=sorted(valid_roles))


class InvalidConversationError(UserError):
    """A template that rewrites earlier turns."""

    def __init__(self, reason: str = 'the chat template does not render earlier turns as a prefix of later ones') -> None:
        super().__init__(f'Invalid conversation: {reason}.', reason=reason)


class ChatTemplateError(UserError):
    """A chat template that failed."""

    def __init__(self, template: str | None, sample: Any, inner_message: str) -> None:
        super().__init__(f'Failed to process sample {sample} with template {template}. {inner_message}', template=template, sample=sample, inner_message=inner_message)
