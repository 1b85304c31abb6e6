"""From samples of a text dataset to a batch: labels, and the numbers of the packed documents.

Labels are the inputs, not shifted (the model shifts), and are ignored where the attention mask is 0. The Hugging Face collator decides by comparing ids with the pad token instead, which silently
removes every end-of-text from the loss where pad and eos are the same token; it is used for masked language modelling only.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, Sequence

import torch
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from llmfoundry.data.batch_stats import CROSS_ENTROPY_IGNORE_INDEX, LossGeneratingTokensCollatorWrapper
from llmfoundry.errors import ConfigError, ConfigProblem

__all__ = ['CausalTextCollator', 'ConcatenatedSequenceCollatorWrapper', 'build_text_collator', 'sequence_ids']

Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


class CausalTextCollator:
    """Stacks samples of one length into ``input_ids``, ``attention_mask`` and ``labels``, each int64 ``(batch, seq)``."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        input_ids = torch.stack([torch.as_tensor(example['input_ids']) for example in examples]).to(torch.int64)
        attention_mask = torch.stack([torch.as_tensor(example['attention_mask']) for example in examples]).to(torch.int64)
        labels = input_ids.masked_fill(attention_mask == 0, CROSS_ENTROPY_IGNORE_INDEX)
        return {'input_ids': input_ids, 'attention_mask': attention_mask, 'labels': labels}


def sequence_ids(input_ids: torch.Tensor, separator_id: int, separator_starts: bool) -> torch.Tensor:
    """Which document of its row each token belongs to: the number of separators so far.

    Args:
        input_ids: ``(batch, seq)``.
        separator_id: the token between documents.
        separator_starts: True if it opens a document (bos), so that it counts for itself; False if it closes one (eos), so that it counts from the next token on.

    Returns:
        int64 ``(batch, seq)``, not decreasing along a row.
    """
    count = (input_ids == separator_id).cumsum(dim=-1)
    if separator_starts:
        return count
    return torch.cat([count.new_zeros((count.shape[0], 1)), count[:, :-1]], dim=-1)


class ConcatenatedSequenceCollatorWrapper:
    """Adds ``sequence_id`` to the batch of another collator, for rows that hold several documents.

    Args:
        base_collator: makes the batch.
        eos_token_id: the token that ends each document. Exactly one of it and ``bos_token_id`` is given.
        bos_token_id: the token that begins each document.

    Raises:
        ValueError: both or none are given.
    """

    def __init__(self, base_collator: Collator, eos_token_id: int | None = None, bos_token_id: int | None = None) -> None:
        if eos_token_id is None and bos_token_id is None:
            raise ValueError('to tell documents apart, give the id of the token between them: eos_token_id (ends a document) or bos_token_id (begins one); got neither')
        if eos_token_id is not None and bos_token_id is not None:
            raise ValueError(f'give only one of eos_token_id and bos_token_id, since one token separates documents; got {eos_token_id} and {bos_token_id}')
        self.base_collator = base_collator
        self.separator_id = eos_token_id if eos_token_id is not None else bos_token_id
        self.separator_starts = eos_token_id is None

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        batch = self.base_collator(examples)
        batch['sequence_id'] = self.get_sequence_id_from_batch(batch)
        return batch

    def get_sequence_id_from_batch(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``sequence_ids`` of ``batch['input_ids']``."""
        assert self.separator_id is not None
        return sequence_ids(batch['input_ids'], self.separator_id, self.separator_starts)


def build_text_collator(dataloader_cfg: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, dataset_batch_size: int) -> tuple[Collator, int]:
    """Registry entry ``text_collator``.

    Args:
        dataloader_cfg: the loader block; ``eos_token_id``, ``bos_token_id`` and ``mlm_probability`` of its ``dataset`` are used.
        tokenizer: the tokenizer.
        dataset_batch_size: rows of a batch.

    Returns:
        The collate function, and the number of samples that it takes (the same number here).

    Raises:
        ConfigError: (a ValueError) ids that are not the tokenizer's, or masked language modelling without a mask token.
    """
    dataset_cfg = dataloader_cfg.get('dataset') or {}
    mlm_probability = dataset_cfg.get('mlm_probability') or 0.0
    collator: Any = CausalTextCollator()
    if mlm_probability:
        if getattr(tokenizer, 'mask_token', None) is None:
            raise ConfigError([ConfigProblem('dataset.mlm_probability', f'{mlm_probability} asks for masked language modelling, but the tokenizer has no mask_token')])
        collator = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=True, mlm_probability=mlm_probability)
    eos_token_id, bos_token_id = dataset_cfg.get('eos_token_id'), dataset_cfg.get('bos_token_id')
    if eos_token_id is not None or bos_token_id is not None:
        collator = ConcatenatedSequenceCollatorWrapper(collator, eos_token_id=eos_token_id, bos_token_id=bos_token_id)
    return LossGeneratingTokensCollatorWrapper(collator), dataset_batch_size
