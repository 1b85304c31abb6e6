"""Iterable datasets that turn documents into pre-training samples in this process: ``ConcatTokensDataset`` and ``NoConcatDataset``.

They are the plain form of what the converters of ``command_utils/data_prep`` do on all cores: simple to put before a writer or a DataLoader of
one's own, and slower. Both share the cutting rules of ``token_concat``.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any, Iterable, Iterator

import numpy as np
from torch.utils.data import IterableDataset

from llmfoundry.data.token_concat import TOKEN_DTYPE, cut_unwrapped, cut_wrapped, empty_tokens, separator_warnings

__all__ = ['AbstractConcatTokensDataset', 'ConcatTokensDataset', 'NoConcatDataset']


class NoConcatDataset(IterableDataset):
    """Yields ``{'text': utf-8 bytes}`` for each row that has a ``text``."""

    def __init__(self, hf_dataset: Iterable[dict[str, Any]]) -> None:
        self.hf_dataset = hf_dataset

    def __iter__(self) -> Iterator[dict[str, bytes]]:
        for sample in self.hf_dataset:
            yield {'text': sample['text'].encode('utf-8')}


class AbstractConcatTokensDataset(ABC, IterableDataset):
    """The common part of datasets that concatenate tokens: separators and their warnings.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens in a sample.
        bos_text: text put before each document, '' for none.
        eos_text: text put after each document, '' for none.
        no_wrap: drop what is left of a document at each cut instead of starting the next sample with it.

    Raises:
        ValueError: ``max_length`` is not a positive integer.
    """

    def __init__(self, tokenizer: Any, max_length: int, bos_text: str = '', eos_text: str = '', no_wrap: bool = False) -> None:
        if not isinstance(max_length, int) or max_length < 1:
            raise ValueError(f'max_length must be a positive integer, got {max_length!r}')
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.bos_text, self.eos_text = bos_text, eos_text
        self.should_wrap = not no_wrap
        self.bos_tokens = self._separator(bos_text)
        self.eos_tokens = self._separator(eos_text)
        probe = tokenizer('test', truncation=False, padding=False)['input_ids']
        adds_bos = bool(probe) and probe[0] == tokenizer.bos_token_id
        adds_eos = bool(probe) and probe[-1] == tokenizer.eos_token_id
        for message in separator_warnings(bos_text, eos_text, self.bos_tokens, self.eos_tokens, adds_bos, adds_eos):
            warnings.warn(message)

    def _separator(self, text: str) -> list[int]:
        return list(self.tokenizer(text, truncation=False, padding=False, add_special_tokens=False)['input_ids']) if text else []

    @abstractmethod
    def _documents(self) -> Iterator[np.ndarray]:
        """Token ids of each document, separators included."""

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        leftover = empty_tokens()
        for document in self._documents():
            if self.should_wrap:
                samples, leftover = cut_wrapped(leftover, document, self.max_length)
            else:
                samples, leftover = cut_unwrapped(leftover, document, np.array([len(document)]), self.max_length)
            for sample in samples:
                yield {'tokens': sample}


class ConcatTokensDataset(AbstractConcatTokensDataset):
    """Yields ``{'tokens': int32 array (max_length,)}`` from rows with a ``text``.

    Each document becomes bos_text + ids + eos_text; documents are laid end to end and cut every ``max_length`` tokens. The tail of the data set
    that does not fill a sample is dropped.

    Args:
        hf_dataset: rows with a ``text``; a Hugging Face dataset or any iterable that may be iterated more than once.
        tokenizer: see ``AbstractConcatTokensDataset``, as are the other arguments.
    """

    def __init__(
        self,
        hf_dataset: Iterable[dict[str, Any]],
        tokenizer: Any,
        max_length: int,
        bos_text: str = '',
        eos_text: str = '',
        no_wrap: bool = False,
    ) -> None:
        self.hf_dataset = hf_dataset
        super().__init__(tokenizer, max_length, bos_text, eos_text, no_wrap)

    def _documents(self) -> Iterator[np.ndarray]:
        for sample in self.hf_dataset:
            ids = self.tokenizer(sample['text'], truncation=False, padding=False)['input_ids']
            yield np.array([*self.bos_tokens, *ids, *self.eos_tokens], dtype=TOKEN_DTYPE)
