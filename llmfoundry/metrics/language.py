"""Cross entropy and perplexity per token, from a loss that is already there or from logits.

In training the loss function has summed the loss and counted the tokens; these metrics add those numbers up. A second pass over the logits, as
most trainers make, would cost memory of the size that the fused loss saves. Sums are kept in float64: float32 loses tokens after 2^24.
"""

from __future__ import annotations

from typing import Any, Mapping

import torch
import torch.nn.functional as F
from torchmetrics import Metric

__all__ = ['LanguageCrossEntropy', 'LanguagePerplexity', 'TokenMetric', 'split_output']


def split_output(output: Any) -> tuple[Any, torch.Tensor | None]:
    """Finds (summed loss, logits) in what a model returned; each may be None.

    A summed loss is anything with ``loss_sum``, ``num_targets`` and ``num_correct`` (``llmfoundry.models.losses.LossOutput``).

    Raises:
        TypeError: there is neither a summed loss nor logits in ``output``.
    """
    if hasattr(output, 'loss_sum'):
        return output, None
    if isinstance(output, torch.Tensor):
        return None, output
    if isinstance(output, Mapping):
        loss, logits = output.get('loss'), output.get('logits')
        if hasattr(loss, 'loss_sum') or logits is not None:
            return (loss if hasattr(loss, 'loss_sum') else None), logits
    raise TypeError(f'A token metric needs logits, a summed loss, or a mapping with one of them; got {type(output).__name__}.')


class TokenMetric(Metric):
    """Base of metrics that are a sum over tokens divided by their number, exact over any split into batches and ranks.

    Args:
        dist_sync_on_step: synchronise over ranks at each step (torchmetrics).
        ignore_index: label of tokens that do not count.
    """

    full_state_update = False
    accepts_loss_output = True

    def __init__(self, dist_sync_on_step: bool = False, ignore_index: int = -100) -> None:
        super().__init__(dist_sync_on_step=dist_sync_on_step)
        self.ignore_index = ignore_index
        self.add_state('total', default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx='sum')
        self.add_state('total_items', default=torch.tensor(0), dist_reduce_fx='sum')

    def update(self, output: Any, target: torch.Tensor | None = None) -> None:
        """Adds one batch.

        Args:
            output: a summed loss, logits (..., vocab), or a mapping with ``loss`` or ``logits``.
            target: (...) labels aligned with the logits (already shifted); not needed with a summed loss.
        """
        loss, logits = split_output(output)
        if loss is not None:
            amount, items = self._from_loss(loss), loss.num_targets
        else:
            if target is None:
                raise ValueError(f'{type(self).__name__} got logits but no labels to compare them with.')
            target = target.reshape(-1)
            amount, items = self._from_logits(logits.reshape(target.shape[0], -1), target), (target != self.ignore_index).sum()
        self.total += amount.detach().to(self.total)
        self.total_items += items.to(self.total_items)

    def compute(self) -> torch.Tensor:
        """Mean over tokens as float32; NaN if there was none."""
        return (self.total / self.total_items).float()

    def _from_loss(self, loss: Any) -> torch.Tensor:
        raise NotImplementedError(f'{type(self).__name__} does not say what it takes from a summed loss.')

    def _from_logits(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError(f'{type(self).__name__} does not say what it computes from logits (tokens, vocab).')


class LanguageCrossEntropy(TokenMetric):
    """Mean cross entropy per token, in nats."""

    def _from_loss(self, loss: Any) -> torch.Tensor:
        return loss.loss_sum

    def _from_logits(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float(), target, ignore_index=self.ignore_index, reduction='sum')


class LanguagePerplexity(LanguageCrossEntropy):
    """exp of the mean cross entropy per token."""

    def compute(self) -> torch.Tensor:
        return torch.exp(super().compute())
