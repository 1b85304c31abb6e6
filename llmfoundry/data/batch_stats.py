"""How many tokens a batch holds, in all and in the loss.

Pure functions over a batch. The collator wrapper counts rows once, in the loader's worker, so that the training loop reads integers instead of waiting for the device.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, MutableMapping, Sequence

import torch

from llmfoundry.data.sample_ids import SAMPLE_IDS, ids_per_row, silence_idle_rows

__all__ = ['CROSS_ENTROPY_IGNORE_INDEX', 'LossGeneratingTokensCollatorWrapper', 'get_tokens_per_batch_func', 'loss_generating_tokens_per_row', 'total_tokens_per_row']

CROSS_ENTROPY_IGNORE_INDEX = -100

Batch = Mapping[str, Any]


def total_tokens_per_row(batch: Batch) -> torch.Tensor:
    """Tokens that are not padding, ``(batch,)``; all of them without an attention mask."""
    mask = batch.get('attention_mask')
    if mask is not None:
        return mask.sum(dim=-1).to(torch.int64)
    input_ids = batch['input_ids']
    return torch.full((input_ids.shape[0],), input_ids.shape[1], dtype=torch.int64, device=input_ids.device)


def loss_generating_tokens_per_row(labels: torch.Tensor, decoder_only: bool = True) -> torch.Tensor:
    """Labels in the loss, ``(batch,)``.

    Args:
        labels: ``(batch, seq)``, -100 where there is no loss.
        decoder_only: the model predicts the *next* token, so the first label of a row is never a target.
    """
    counted = labels[:, 1:] if decoder_only else labels
    return (counted != CROSS_ENTROPY_IGNORE_INDEX).sum(dim=-1).to(torch.int64)


def get_tokens_per_batch_func(decoder_only: bool = True) -> Callable[[Any], int | dict[str, int]]:
    """The function that a DataSpec counts tokens with.

    Args:
        decoder_only: False for encoder-decoder models, whose ``decoder_attention_mask`` is counted too.

    Returns:
        A function from a batch to its number of tokens, or to ``{'total': ..., 'loss_generating': ...}`` if it has labels.
    """

    def get_num_tokens_in_batch(batch: Any) -> int | dict[str, int]:
        if not isinstance(batch, Mapping) or not ('attention_mask' in batch or 'input_ids' in batch):
            raise ValueError(f'a batch must be a mapping with attention_mask or input_ids to count its tokens, got {_describe(batch)}')
        if not decoder_only and 'decoder_attention_mask' not in batch:
            raise ValueError(f'an encoder-decoder batch must have decoder_attention_mask to count its tokens, got {_describe(batch)}')
        if 'total_tokens' in batch:
            total = int(sum(batch['total_tokens']))
        else:
            total = int(total_tokens_per_row(batch).sum())
            if not decoder_only:
                total += int(batch['decoder_attention_mask'].sum())
        if 'loss_generating_tokens' in batch:
            return {'total': total, 'loss_generating': int(sum(batch['loss_generating_tokens']))}
        if batch.get('labels') is not None:
            return {'total': total, 'loss_generating': int(loss_generating_tokens_per_row(batch['labels'], decoder_only).sum())}
        return total

    return get_num_tokens_in_batch


def _describe(batch: Any) -> str:
    return f'keys {sorted(map(str, batch))}' if isinstance(batch, Mapping) else type(batch).__name__


class LossGeneratingTokensCollatorWrapper:
    """Adds ``total_tokens`` and ``loss_generating_tokens`` to a batch: one int for each row, so that they split with it into microbatches; and ``sample_ids`` where the examples know theirs.

    Args:
        base_collator: makes the batch.
        token_counting_func: as ``get_tokens_per_batch_func`` returns; applied to each row, so that custom counts keep holding for microbatches.
    """

    def __init__(self, base_collator: Callable[[Sequence[Any]], MutableMapping[str, Any]], token_counting_func: Callable[[Any], int | dict[str, int]] | None = None) -> None:
        self.base_collator = base_collator
        self.token_counting_func = token_counting_func

    def __call__(self, examples: Sequence[Any]) -> MutableMapping[str, Any]:
        batch = self.base_collator(examples)
        rows = ids_per_row(examples)
        if rows is not None:
            silence_idle_rows(batch, rows)
        if self.token_counting_func is None:
            totals = total_tokens_per_row(batch).tolist()
            losses = loss_generating_tokens_per_row(batch['labels']).tolist() if batch.get('labels') is not None else None
        else:
            totals, losses = self._count_rows(batch)
        batch['total_tokens'] = totals if rows is None else [total if ids else 0 for total, ids in zip(totals, rows, strict=True)]
        if losses is not None:
            batch['loss_generating_tokens'] = losses
        if rows is not None:
            batch[SAMPLE_IDS] = rows
        return batch

    def _count_rows(self, batch: MutableMapping[str, Any]) -> tuple[list[int], list[int] | None]:
        assert self.token_counting_func is not None
        num_rows = len(next(iter(batch.values())))
        rows = [{key: value[i : i + 1] for key, value in batch.items() if hasattr(value, '__getitem__')} for i in range(num_rows)]
        counts = [self.token_counting_func(row) for row in rows]
        if all(isinstance(count, Mapping) for count in counts):
            return [c['total'] for c in counts], [c['loss_generating'] for c in counts]
        return [int(c) for c in counts], None
