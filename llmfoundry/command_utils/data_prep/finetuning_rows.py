"""Rows of a finetuning data set -> encoded MDS samples: preprocess, check, tokenise if so wished, leave out what trains nothing.

The same code runs in this process and in the workers of ``pool``; the functions behind it are those of the finetuning loader, so that a converted data
set holds what the loader would have made of the rows.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np

from llmfoundry.data.finetuning.examples import get_example_type, messages_of, prompt_and_response, validate_chat_example, validate_prompt_response
from llmfoundry.data.finetuning.preprocessing import apply, resolve_preprocessing_fn
from llmfoundry.data.finetuning.tokenization import is_valid_ift_example, tokenize_batch
from llmfoundry.errors import DataError, UserError
from llmfoundry.tokenizers.build import build_tokenizer

__all__ = ['COLUMNS', 'ENCODER', 'EncodedRows', 'RowEncoder', 'RowSpec']

ENCODER = 'llmfoundry.command_utils.data_prep.finetuning_rows:RowEncoder'
COLUMNS = {
    'turns': {'turns': 'json'},
    'prompt_response': {'prompt': 'str', 'response': 'str'},
    'chat': {'messages': 'json'},
}
"""MDS columns of tokenised examples, of texts, and of chats."""
_SHOWN_CHARS = 300
_SIZE = np.dtype('<u4')


@dataclass(frozen=True)
class RowSpec:
    """What the workers are to do.

    Attributes:
        where: the data set and split, for messages.
        form: a key of ``COLUMNS``.
        dataset_name: its registered function is used where ``preprocessor`` is None.
        preprocessor: registered name, ``module:function`` or map of columns.
        skip_preprocessing: the rows are examples already.
        tokenizer, tokenizer_kwargs: None keeps the texts.
        max_seq_len, target_prompts, target_responses, decoder_only_format: which tokenised examples have something to train; see
            ``is_valid_ift_example``.
        search_path: where modules are looked for.
    """

    where: str
    form: str
    dataset_name: str
    preprocessor: Any = None
    skip_preprocessing: bool = False
    tokenizer: str | None = None
    tokenizer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    max_seq_len: int = 2048
    target_prompts: str = 'none'
    target_responses: str = 'last'
    decoder_only_format: bool = True
    search_path: tuple[str, ...] = ()


class EncodedRows(NamedTuple):
    """The answer to a block: encoded samples laid end to end, their sizes in bytes, their tokens, and how many rows were left out, by reason."""

    data: bytes
    sizes: np.ndarray
    tokens: int
    dropped: dict[str, int]


class RowEncoder:
    """Turns blocks ``(index of the first row, rows)`` into ``EncodedRows``."""

    facts = None

    def __init__(self, spec: RowSpec) -> None:
        sys.path += [folder for folder in spec.search_path if folder not in sys.path]
        self._spec = spec
        self._function = None if spec.skip_preprocessing else resolve_preprocessing_fn(spec.preprocessor, spec.dataset_name)
        self._tokenizer = None if spec.tokenizer is None else build_tokenizer(spec.tokenizer, spec.tokenizer_kwargs)

    def encode(self, number: int, block: tuple[int, Sequence[Mapping[str, Any]]]) -> EncodedRows:
        """Encodes block ``number``.

        Raises:
            DataError: (a ValueError) a row that cannot be used, with its index, the reason and the row.
        """
        first, rows = block
        examples = [self._example(row, first + i) for i, row in enumerate(rows)]
        samples, tokens, dropped = self._tokenized(examples, first) if self._tokenizer is not None else self._texts(examples, first)
        sizes = np.array([len(sample) for sample in samples], dtype=np.int64)
        return EncodedRows(b''.join(samples), sizes, tokens, dict(dropped))

    def _example(self, row: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        if self._function is None:
            return row
        try:
            return apply(self._function, row, self._tokenizer)
        except (UserError, ValueError) as e:
            raise self._error(e, index, row) from e

    def _tokenized(self, examples: list[Mapping[str, Any]], first: int) -> tuple[list[bytes], int, Counter[str]]:
        try:
            tokenized = tokenize_batch(examples, self._tokenizer)
        except (UserError, ValueError) as e:
            row = getattr(e, 'row', None)
            raise self._error(e, None if row is None else first + row, {} if row is None else examples[row]) from e
        spec, samples, tokens, dropped = self._spec, [], 0, Counter[str]()
        for example in tokenized:
            if is_valid_ift_example(spec.max_seq_len, spec.target_prompts, spec.target_responses, spec.decoder_only_format, example):
                samples.append(_sample(json.dumps(example['turns'], separators=(',', ':'))))
                tokens += sum(len(turn['input_ids']) + len(turn['labels']) for turn in example['turns'])
            else:
                dropped[_why_invalid(example['turns'], spec.max_seq_len)] += 1
        return samples, tokens, dropped

    def _texts(self, examples: list[Mapping[str, Any]], first: int) -> tuple[list[bytes], int, Counter[str]]:
        samples, dropped = [], Counter[str]()
        for i, example in enumerate(examples):
            try:
                values = self._checked(example)
            except (UserError, ValueError) as e:
                raise self._error(e, first + i, example) from e
            if not all(values):
                dropped['with an empty prompt or response'] += 1
                continue
            samples.append(_sample(*values))
        return samples, 0, dropped

    def _checked(self, example: Mapping[str, Any]) -> tuple[str, ...]:
        """The values of a sample's columns, in their order."""
        kind = get_example_type(example)
        if kind != self._spec.form:
            raise ValueError(f'a {kind} example, but the first row made a {self._spec.form} example; one data set has one form')
        if kind == 'chat':
            validate_chat_example(example)
            return (json.dumps(messages_of(example)),)
        validate_prompt_response(example)
        return prompt_and_response(example)

    def _error(self, error: Exception, index: int | None, row: Any) -> DataError:
        shown = repr(row)
        shown = shown if len(shown) <= _SHOWN_CHARS else shown[:_SHOWN_CHARS] + '...'
        text = str(error)
        text = text if len(text) <= 2 * _SHOWN_CHARS else text[: 2 * _SHOWN_CHARS] + '...'
        place = '' if index is None else f'row {index}: '
        return DataError(f'{place}{type(error).__name__}: {text.rstrip(".")}. The example: {shown}', file=self._spec.where)


def _sample(*values: str) -> bytes:
    """An MDS sample of variable-size columns: their sizes (uint32), then their bytes."""
    encoded = [value.encode('utf-8') for value in values]
    return b''.join((np.array([len(e) for e in encoded], dtype=_SIZE).tobytes(), *encoded))


def _why_invalid(turns: Sequence[Mapping[str, Any]], max_seq_len: int) -> str:
    if any(len(turn['input_ids']) == 0 or len(turn['labels']) == 0 for turn in turns):
        return 'with an empty prompt or response'
    return f'without a token to train on among the first {max_seq_len:,}'
