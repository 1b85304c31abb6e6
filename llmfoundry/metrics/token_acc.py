"""Share of tokens that the model would have predicted right, from the counts that the loss made or from logits."""

from __future__ import annotations

from typing import Any

import torch

from llmfoundry.metrics.language import TokenMetric

__all__ = ['MaskedAccuracy', 'TokenAccuracy']


class TokenAccuracy(TokenMetric):
    """Fraction (0 to 1) of tokens whose label has the highest logit.

    Args:
        ignore_index: label of tokens that do not count.
        dist_sync_on_step: synchronise over ranks at each step (torchmetrics).
    """

    def __init__(self, ignore_index: int = -100, dist_sync_on_step: bool = False) -> None:
        super().__init__(dist_sync_on_step=dist_sync_on_step, ignore_index=ignore_index)

    def _from_loss(self, loss: Any) -> torch.Tensor:
        if loss.num_correct is None:
            raise ValueError('This loss does not count correct tokens; set loss_fn: torch_crossentropy, or leave token_accuracy out of the train metrics.')
        return loss.num_correct

    def _from_logits(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return ((logits.argmax(-1) == target) & (target != self.ignore_index)).sum()


class MaskedAccuracy(TokenAccuracy):
    """The same figure under the name that encoder-decoder models have always logged. Composer's class of that name knows logits only, which would cost a second pass."""
