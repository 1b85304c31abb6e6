"""Checks of formatted examples: each fault has its error and its text."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from llmfoundry import errors
from llmfoundry.data.finetuning.examples import get_example_type, mark_row, validate_chat_example, validate_prompt_response

USER, ASSISTANT = {'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}
FORMS = "For prompt and response finetuning, the valid prompt keys are ['prompt'] and the valid response keys are ['completion', 'response']. For chat finetuning, the allowed keys are ['messages']."


def unknown(*keys: str) -> str:
    return f'Found keys {list(keys)} in dataset. Unknown example type. {FORMS}'


BAD = [
    (['a'], errors.InvalidExampleTypeError, "Expected example to be a Mapping, but found <class 'list'>"),
    ('text', errors.InvalidExampleTypeError, "Expected example to be a Mapping, but found <class 'str'>"),
    (None, errors.InvalidExampleTypeError, "Expected example to be a Mapping, but found <class 'NoneType'>"),
    ({}, errors.UnknownExampleTypeError, unknown()),
    ({'prompt': 'a'}, errors.UnknownExampleTypeError, unknown('prompt')),
    ({'prompt': 'a', 'answer': 'b'}, errors.UnknownExampleTypeError, unknown('answer', 'prompt')),
    ({'prompt': 'a', 'response': 'b', 'source': 'c'}, errors.UnknownExampleTypeError, unknown('prompt', 'response', 'source')),
    ({'prompt': 'a', 'response': 'b', 'completion': 'c'}, errors.UnknownExampleTypeError, unknown('completion', 'prompt', 'response')),
    ({'response': 'b', 'completion': 'c'}, errors.UnknownExampleTypeError, unknown('completion', 'response')),
    ({'messages': [USER, ASSISTANT], 'id': 1}, errors.UnknownExampleTypeError, unknown('id', 'messages')),
    ({'prompt': None, 'response': 'b'}, errors.InvalidPromptTypeError, "Expected prompt to be a string, but found <class 'NoneType'>"),
    ({'prompt': 1, 'response': 2}, errors.InvalidPromptTypeError, "Expected prompt to be a string, but found <class 'int'>"),
    ({'prompt': 'a', 'response': None}, errors.InvalidResponseTypeError, "Expected response to be a string, but found <class 'NoneType'>"),
    ({'prompt': 'a', 'completion': ['b']}, errors.InvalidResponseTypeError, "Expected response to be a string, but found <class 'list'>"),
    ({'messages': 'a'}, errors.InvalidMessageTypeError, "Expected message to be a Mapping, but found <class 'str'>"),
    ({'messages': None}, errors.InvalidMessageTypeError, "Expected message to be a Mapping, but found <class 'NoneType'>"),
    ({'messages': ['a', ASSISTANT]}, errors.InvalidMessageTypeError, "Expected message to be a Mapping, but found <class 'str'>"),
    ({'messages': []}, errors.NotEnoughChatDataError, 'Chat example must have at least two messages'),
    ({'messages': [ASSISTANT]}, errors.NotEnoughChatDataError, 'Chat example must have at least two messages'),
    ({'messages': [ASSISTANT, USER]}, errors.InvalidLastChatMessageRoleError, "Last message role must be one of ['assistant'], but got user"),
    ({'messages': [USER, USER, ASSISTANT]}, errors.ConsecutiveRepeatedChatRolesError, 'Conversation roles must alternate but found user repeated consecutively.'),
    ({'messages': [USER, ASSISTANT, ASSISTANT]}, errors.ConsecutiveRepeatedChatRolesError, 'Conversation roles must alternate but found assistant repeated consecutively.'),
    ({'messages': [{'role': 'human', 'content': 'a'}, ASSISTANT]}, errors.InvalidRoleError, "Expected role to be one of ['assistant', 'system', 'tool', 'user'] but found: human"),
    ({'messages': [{'role': None, 'content': 'a'}, ASSISTANT]}, errors.InvalidRoleError, "Expected role to be one of ['assistant', 'system', 'tool', 'user'] but found: None"),
    ({'messages': [{'role': ['user'], 'content': 'a'}, ASSISTANT]}, errors.InvalidRoleError, "Expected role to be one of ['assistant', 'system', 'tool', 'user'] but found: ['user']"),
    ({'messages': [{**USER, 'name': 'x'}, ASSISTANT]}, errors.IncorrectMessageKeyQuantityError, "Expected 2 keys in message, but found 3 keys: ['role', 'content', 'name']"),
    ({'messages': [{'role': 'user'}, ASSISTANT]}, errors.UnknownExampleTypeError, unknown('role')),
    ({'messages': [{'role': 'user', 'text': 'a'}, ASSISTANT]}, errors.UnknownExampleTypeError, unknown('role', 'text')),
    ({'messages': [{'role': 'user', 'content': None}, ASSISTANT]}, errors.InvalidContentTypeError, "Expected content to be a string or a list, but found <class 'NoneType'>"),
    ({'messages': [{'role': 'user', 'content': 3}, ASSISTANT]}, errors.InvalidContentTypeError, "Expected content to be a string or a list, but found <class 'int'>"),
]


def check(example: Any) -> str:
    kind = get_example_type(example)
    (validate_chat_example if kind == 'chat' else validate_prompt_response)(example)
    return kind


@pytest.mark.parametrize(('example', 'error', 'text'), BAD, ids=[f'{i}-{b[1].__name__}' for i, b in enumerate(BAD)])
def test_faults(example: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(errors.UserError) as e:
        check(example)
    assert type(e.value) is error
    assert str(e.value) == text


GOOD = [
    ({'prompt': 'a', 'response': 'b'}, 'prompt_response'),
    ({'completion': '', 'prompt': ''}, 'prompt_response'),
    ({'messages': [USER, ASSISTANT]}, 'chat'),
    ({'messages': ({'role': 'system', 'content': [{'type': 'text', 'text': 'a'}]}, USER, ASSISTANT, {'role': 'tool', 'content': ''}, ASSISTANT)}, 'chat'),
    ({'messages': [{'role': 'system', 'content': 's'}, ASSISTANT]}, 'chat'),
    ({'messages': [{**USER, 'name': None, 'tool_calls': None}, ASSISTANT]}, 'chat'),
]


@pytest.mark.parametrize(('example', 'kind'), GOOD, ids=range(len(GOOD)))
def test_forms(example: Any, kind: str) -> None:
    assert check(example) == kind


@pytest.mark.parametrize('error', [errors.InvalidPromptTypeError(int), ValueError('no'), errors.InvalidConversationError()], ids=lambda e: type(e).__name__)
def test_the_row_travels_between_processes(error: Exception) -> None:
    mark_row(error, 17)
    again = pickle.loads(pickle.dumps(error))
    assert (again.row, str(again)) == (17, str(error))
