"""Examples that arrive as token ids: from a user's tokenisation function, from files prepared elsewhere, or as turns.

Ids that the tokenizer does not have would index past the embedding, which on a GPU ends in an error that names neither row nor cause; so every id is checked here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping

import numpy as np

from llmfoundry.data.finetuning.targets import IGNORE_INDEX
from llmfoundry.errors import DataError
from llmfoundry.tokenizers.build import num_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ['is_pretokenized', 'labels_of_columns', 'pretokenized_turns', 'turn_of_ids', 'without_second_bos']


def is_pretokenized(example: Any) -> bool:
    """Whether an example holds ids: ``input_ids`` and ``labels``, or ``turns`` of these."""
    return isinstance(example, Mapping) and ('turns' in example or {'input_ids', 'labels'} <= set(example))


def labels_of_columns(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of a data set, whose columns ``input_ids`` and ``labels`` stand side by side where they are equal: everything is trained.

    Without a -100 such a row could be taken for a prompt and a response that repeats it, and would be trained twice as long. So the first label, which nothing predicts, becomes -100.
    """
    if set(row) & {'turns'} or not {'input_ids', 'labels'} <= set(row):
        return row
    ids, labels = np.asarray(row['input_ids']), np.asarray(row['labels'])
    if ids.ndim != 1 or not len(ids) or not np.array_equal(ids, labels):
        return row
    return {**row, 'labels': [IGNORE_INDEX, *labels[1:].tolist()]}


def pretokenized_turns(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, list[int]]]:
    """The turns of an example that holds ids, as lists.

    Raises:
        DataError: (a ValueError) values that are not lists of whole numbers, or ids that the tokenizer does not have.
    """
    turns = example['turns'] if 'turns' in example else [example]
    if not isinstance(turns, (list, tuple, np.ndarray)) or not all(isinstance(turn, Mapping) and {'input_ids', 'labels'} <= set(turn) for turn in turns):
        raise DataError(f'turns must be a list of mappings with input_ids and labels, got {str(turns)[:200]}')
    result = []
    for turn in turns:
        prompt, response = _without_padding(_ids(turn['input_ids'], 'input_ids', tokenizer), _ids(turn['labels'], 'labels', tokenizer), turn.get('attention_mask'))
        result.append(turn_of_ids(prompt, response if 'turns' in example else without_second_bos(prompt, response, tokenizer.bos_token_id)))
    return result


def turn_of_ids(prompt: list[int], response: list[int]) -> dict[str, list[int]]:
    """A turn: ids of the prompt, all of them attended to, and ids of the response."""
    return {'input_ids': prompt, 'attention_mask': [1] * len(prompt), 'labels': response}


def without_second_bos(prompt: list[int], response: list[int], bos_token_id: int | None) -> list[int]:
    """The response without the BOS that a tokenizer put before it, where the prompt has one already."""
    doubled = bos_token_id is not None and prompt[:1] == [bos_token_id] == response[:1]
    return response[1:] if doubled else response


def _without_padding(ids: list[int], labels: list[int], attention_mask: Any) -> tuple[list[int], list[int]]:
    """Both without the places that the mask hides: rows that were filled up before they were saved hold ids there which are no text."""
    mask = np.asarray([] if attention_mask is None else attention_mask).reshape(-1) != 0
    if len(mask) != len(ids) or mask.all():
        return ids, labels
    if len(labels) == len(ids):
        labels = np.asarray(labels)[mask].tolist()
    return np.asarray(ids)[mask].tolist(), labels


def _ids(value: Any, column: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A plain list of ids, from a list, an array, or the batch of one that ``return_tensors`` makes."""
    ids = np.asarray(value)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or (len(ids) and not np.issubdtype(ids.dtype, np.integer)):
        raise DataError(f'{column}: expected one list of whole numbers, got shape {ids.shape} of {ids.dtype}')
    if not len(ids):
        return []
    checked = ids[ids != IGNORE_INDEX] if column == 'labels' else ids
    # Adding up the whole vocabulary is slow, and mostly not needed: added tokens come after it.
    if len(checked) and (checked.min() < 0 or checked.max() >= tokenizer.vocab_size):
        num_ids = num_token_ids(tokenizer)
        wrong = checked[(checked < 0) | (checked >= num_ids)]
        if len(wrong):
            raise DataError(f'{column}: token id {wrong[0]} is outside the {num_ids} ids of the tokenizer. Use the tokenizer that the data were prepared with')
    return ids.tolist()
