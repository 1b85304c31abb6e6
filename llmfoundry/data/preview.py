"""Prints the first batches of a loader, to look at the data before training on them."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Callable, Iterable, Mapping

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ['print_batches']


def print_batches(batches: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, num_batches: int = 5, write: Callable[[str], None] = print) -> int:
    """Prints shapes and types of the first batches and the text of their rows.

    Returns:
        How many batches were printed.
    """
    printed = 0
    for index, batch in enumerate(islice(batches, num_batches)):
        write('')
        write(f'{"#" * 20} Batch {index} {"#" * 20}')
        for key, value in batch.items():
            write(f'{key} {value.shape} {value.dtype}' if hasattr(value, 'shape') else f'{key} {value}')
        for row, tokens in enumerate(batch['input_ids']):
            write(f'{"-" * 20} Sample {row} {"-" * 20}')
            write(tokenizer.decode(tokens))
        printed += 1
    return printed
