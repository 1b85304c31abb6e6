"""Preprocessing functions: from a row of a data set to a formatted example.

A function takes a row and returns a prompt/response or chat example, or takes a row and a tokenizer and returns ``tokenizer(text=..., text_target=...)``. It is named in a YAML by the name it is registered under, by
its import path, or as a map of columns. The functions of some public data sets are registered here under the name of the data set.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Callable, Mapping

from llmfoundry.errors import InvalidPromptResponseKeysError, UnableToProcessPromptResponseError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    'PreprocessingFn',
    'apply',
    'from_column_map',
    'from_name',
    'messages_format_preprocessor',
    'QA_format_preprocessor',
    'register',
    'registered_names',
    'resolve_preprocessing_fn',
]

log = logging.getLogger(__name__)

PreprocessingFn = Callable[..., Mapping[str, Any]]

_REGISTERED: dict[str, PreprocessingFn] = {}


def register(*names: str) -> Callable[[PreprocessingFn], PreprocessingFn]:
    """Decorator that registers a preprocessing function under every name given.

    Raises:
        ValueError: a name is taken.
    """

    def register_function(fn: PreprocessingFn) -> PreprocessingFn:
        for i, name in enumerate(names):
            if name in _REGISTERED or name in names[:i]:
                raise ValueError(f'A tokenization function has already been registered with {name=}.')
        _REGISTERED.update(dict.fromkeys(names, fn))
        return fn

    return register_function


def registered_names() -> list[str]:
    """Names of the registered functions, sorted."""
    return sorted(_REGISTERED)


def resolve_preprocessing_fn(fn: str | Mapping[str, str] | PreprocessingFn | None, dataset_name: str | None) -> PreprocessingFn | None:
    """The function that a ``preprocessing_fn`` setting names.

    Args:
        fn: a function, a map ``{prompt: column, response: column}``, a registered name, ``module:function``, or None.
        dataset_name: where ``fn`` is None, the function registered under this name is used.

    Returns:
        None where rows are taken as they are.

    Raises:
        ValueError: the text names nothing that can be imported and called.
    """
    if fn is None or isinstance(fn, str):
        return from_name(fn, dataset_name)
    if isinstance(fn, Mapping):
        return from_column_map(fn)
    if callable(fn):
        return fn
    raise ValueError(f'preprocessing_fn must be a registered name, "module:function", a map of columns or a function, got {fn!r}')


def from_name(name: str | None, dataset_name: str | None = None) -> PreprocessingFn | None:
    """The function registered as ``name``, else the one at the import path ``module:function``; where ``name`` is None, the one registered as ``dataset_name``, else None.

    Raises:
        ValueError: neither registered nor importable, with the cause.
    """
    if name is None:
        found = _REGISTERED.get(dataset_name) if dataset_name is not None else None
        if found is not None:
            log.info('No preprocessing_fn was given. Using the one registered for %s.', dataset_name)
        return found
    if name in _REGISTERED:
        return _REGISTERED[name]
    module_name, colon, attribute = name.partition(':')
    failed = f'Failed to import preprocessing function from string = {name}.'
    if not (colon and module_name and attribute):
        near = difflib.get_close_matches(name, registered_names(), 1)
        hint = f' Did you mean {near[0]!r}?' if near else ''
        raise ValueError(f'{failed}{hint} It is not registered, and an import path has the form package.module:function. Registered: {", ".join(registered_names())}')
    try:
        found = functools.reduce(getattr, attribute.split('.'), _import_module(module_name))
    except Exception as e:
        raise ValueError(f'{failed} {type(e).__name__}: {e}. Folders searched: the installed packages and {os.getcwd()}') from e
    if not callable(found):
        raise ValueError(f'{failed} {attribute!r} is a {type(found).__name__}, not a function')
    return found


def _import_module(name: str) -> Any:
    """Imports ``name``, from the working folder too: a console script does not search it, unlike ``python script.py``."""
    folder = os.getcwd()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        if folder in sys.path:
            raise
    sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        sys.path.remove(folder)
        raise


def from_column_map(mapping: Mapping[str, str]) -> PreprocessingFn:
    """A function that takes prompt and response from two columns, given as ``{prompt: column, response: column}``.

    Its first call raises InvalidPromptResponseKeysError where the keys are not these, in this order.
    """
    columns = {str(key): column for key, column in mapping.items()}

    def map_columns(row: Mapping[str, Any]) -> dict[str, Any]:
        if list(columns) != ['prompt', 'response']:
            raise InvalidPromptResponseKeysError(columns, row)
        missing = [column for column in columns.values() if column not in row]
        if missing:
            raise UnableToProcessPromptResponseError(row, f'preprocessing_fn names the column {missing[0]!r}, but the columns are {sorted(row)}')
        return {key: row[column] for key, column in columns.items()}

    return map_columns


def apply(fn: PreprocessingFn, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> Mapping[str, Any]:
    """Calls ``fn(row)``, or ``fn(row, tokenizer)`` where it takes two positional arguments.

    Raises:
        UserError: what the function itself raised, if it is one of these.
        UnableToProcessPromptResponseError: it raised anything else, which is named in the text and is the cause.
    """
    try:
        return fn(row, tokenizer) if takes_tokenizer(fn) else fn(row)
    except UserError:
        raise
    except Exception as e:
        raise UnableToProcessPromptResponseError(row, f'{function_name(fn)} raised {type(e).__name__}: {e}') from e


def takes_tokenizer(fn: PreprocessingFn) -> bool:
    """Whether ``fn`` wants the tokenizer as its second argument: it needs two, or calls the second one ``tokenizer``."""
    try:
        return _takes_tokenizer(fn)
    except TypeError:
        # A callable object that cannot be hashed.
        return _takes_tokenizer.__wrapped__(fn)


@functools.lru_cache(maxsize=64)
def _takes_tokenizer(fn: PreprocessingFn) -> bool:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except ValueError:
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) >= 2 and (positional[1].default is inspect.Parameter.empty or positional[1].name == 'tokenizer')


def function_name(fn: PreprocessingFn) -> str:
    """How messages name a function: ``module:function`` where it has these."""
    name = getattr(fn, '__qualname__', None) or type(fn).__qualname__
    return f'{getattr(fn, "__module__", None) or type(fn).__module__}:{name}'


def _reads_rows_or_says_so(fn: PreprocessingFn) -> PreprocessingFn:
    """Gives a preset the one error that all of them raise."""

    @functools.wraps(fn)
    def read(row: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return fn(row)
        except (AttributeError, KeyError, TypeError, ValueError) as e:
            raise UnableToProcessPromptResponseError(row) from e

    return read


@register('tatsu-lab/alpaca')
@_reads_rows_or_says_so
def alpaca_preprocessing_function(row: Mapping[str, Any]) -> dict[str, str]:
    """Splits ``text`` after the response header."""
    header = '### Response:'
    prompt, response = row['text'].split(header)
    return {'prompt': prompt + header, 'response': response}


@register('HuggingFaceH4/databricks_dolly_15k')
@_reads_rows_or_says_so
def dolly_preprocessing_function(row: Mapping[str, Any]) -> dict[str, str]:
    """Puts instruction and, if there is one, input into the instruction template."""
    instruction = row['instruction'] + (f'\n{row["input"]}' if row['input'] else '')
    prompt = (
        'Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n'
        f'### Instruction:\n{instruction}\n\n### Response:\n'
    )
    return {'prompt': prompt, 'response': row['output']}


@register('bigscience/P3')
def p3_preprocessing_function(row: Mapping[str, Any]) -> dict[str, str]:
    """Sets a colon after the inputs. Raises KeyError where a column is missing."""
    return {'prompt': row['inputs'] + ':', 'response': row['targets']}


@register('Muennighoff/P3', 'Muennighoff/flan')
@_reads_rows_or_says_so
def muennighoff_preprocessing_function(row: Mapping[str, Any]) -> dict[str, str]:
    """Separates inputs and targets by a space, unless there is whitespace between them or nothing to separate."""
    prompt, response = row['inputs'], row['targets']
    whitespace = (' ', '\n', '\t')
    if response and not prompt.endswith(whitespace) and not response.startswith(whitespace):
        response = ' ' + response
    return {'prompt': prompt, 'response': response}


@register('sam-mosaic/full-hh-rlhf-chatml', 'sam-mosaic/vicuna_alpaca_hc3_chatml')
@_reads_rows_or_says_so
def prompt_response_columns(row: Mapping[str, Any]) -> dict[str, str]:
    """Takes the columns ``prompt`` and ``response`` and leaves the others."""
    return {'prompt': row['prompt'], 'response': row['response']}


@register('teknium/OpenHermes-2.5')
@_reads_rows_or_says_so
def sharegpt_format_preprocessor(row: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Renames the roles and keys of the ShareGPT form: ``conversations`` of ``{from, value}``."""
    roles = {'human': 'user', 'gpt': 'assistant'}
    return {'messages': [{'role': roles.get(turn['from'], turn['from']), 'content': turn['value']} for turn in row['conversations']]}


@register('math-ai/StackMathQA')
@_reads_rows_or_says_so
def QA_format_preprocessor(row: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """Makes a chat of one question ``Q`` and its answer ``A``."""
    return {'messages': [{'role': 'user', 'content': row['Q']}, {'role': 'assistant', 'content': row['A']}]}


@register('AI-MO/NuminaMath-CoT')
@_reads_rows_or_says_so
def messages_format_preprocessor(row: Mapping[str, Any]) -> dict[str, Any]:
    """Takes the column ``messages`` and leaves the others."""
    return {'messages': row['messages']}
