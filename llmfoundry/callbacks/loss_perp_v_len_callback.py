"""Loss and perplexity by how much context a token had: whether a long-context model uses what it was given.

Our losses never hold all logits, so the numbers come from a forward pass of their own, without dropout and gradients, before the batch is trained: one pass in
``compute_batch_interval``. Where a row holds several documents, context is counted from the start of the document.
"""

from __future__ import annotations

from typing import Any, Iterator, Mapping

import torch
import torch.nn.functional as F
from composer.core import Callback, State
from composer.loggers import Logger, MLFlowLogger
from composer.utils import dist

from llmfoundry.experimental import experimental_class
from llmfoundry.models.losses import shift_labels
from llmfoundry.models.mpt.configuration_mpt import MPTConfig

__all__ = ['LossPerpVLen', 'context_lengths', 'losses_by_context']

COLUMNS = ('step', 'context_length', 'mean_loss', 'perplexity', 'num_targets')


@experimental_class('LossPerpVLen')
class LossPerpVLen(Callback):
    """Logs the table ``loss_perp_v_len`` to MLflow: a row for each context length, with the step, the mean loss, its perplexity and the number of targets behind it.

    Args:
        log_batch_interval: batches between tables.
        compute_batch_interval: batches between the passes that a table is made from.
        ignore_index: label of tokens that do not count.

    Raises:
        ValueError: ``compute_batch_interval`` above ``log_batch_interval``, or an interval below 1; at start, a model other than MPT, or no MLflow logger.
    """

    def __init__(self, log_batch_interval: int, compute_batch_interval: int, ignore_index: int = -100) -> None:
        if compute_batch_interval < 1 or compute_batch_interval > log_batch_interval:
            raise ValueError(
                f'loss_perp_v_len.compute_batch_interval must lie in 1..log_batch_interval={log_batch_interval}, got {compute_batch_interval}: a table without a pass would be empty',
            )
        self.log_batch_interval = log_batch_interval
        self.compute_batch_interval = compute_batch_interval
        self.ignore_index = ignore_index
        self._sums: torch.Tensor | None = None  # (2, seq): summed loss and number of targets

    def init(self, state: State, logger: Logger) -> None:
        model = _unwrapped(state)
        if not isinstance(getattr(model, 'config', None), MPTConfig):
            raise ValueError(f'callbacks.loss_perp_v_len works with MPT models only, got {type(model).__name__}. Remove the block.')
        if not any(isinstance(destination, MLFlowLogger) for destination in logger.destinations):
            raise ValueError('callbacks.loss_perp_v_len logs tables to MLflow, and loggers.mlflow is not set. Add the logger, or remove the block.')

    def batch_start(self, state: State, logger: Logger) -> None:
        del logger
        if (int(state.timestamp.batch) + 1) % self.compute_batch_interval:
            return
        model = _unwrapped(state)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                for rows in _split(state.batch, state.device_train_microbatch_size):
                    sums = losses_by_context(model, state.device.batch_to_device(rows), self.ignore_index).cpu()
                    self._sums = sums if self._sums is None else _add(self._sums, sums)
        finally:
            model.train(was_training)

    def batch_end(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step % self.log_batch_interval or self._sums is None:
            return
        sums = _over_ranks(self._sums, state)
        self._sums = None
        rows = [[step, n + 1, loss / count, float(torch.tensor(loss / count).exp()), int(count)] for n, (loss, count) in enumerate(sums.t().tolist()) if count]
        for destination in logger.destinations:
            if isinstance(destination, MLFlowLogger):
                destination.log_table(list(COLUMNS), rows, name='loss_perp_v_len', step=step)


def losses_by_context(model: Any, batch: Mapping[str, Any], ignore_index: int) -> torch.Tensor:
    """Summed loss and number of targets by context length: float64 (2, seq), where column n is a context of n + 1 tokens."""
    targets = shift_labels(batch['labels'], ignore_index)  # (batch, seq)
    logits = model.forward({key: value for key, value in batch.items() if key != 'labels'})['logits']
    sums = torch.zeros(2, targets.shape[1], dtype=torch.float64, device=targets.device)
    lengths = context_lengths(targets, batch.get('sequence_id'))
    for row in range(targets.shape[0]):  # one row's logits in float32 at a time
        kept = targets[row] != ignore_index
        losses = F.cross_entropy(logits[row][kept].float(), targets[row][kept], reduction='none').double()
        at = lengths[row][kept] - 1
        sums[0].index_add_(0, at, losses)
        sums[1].index_add_(0, at, torch.ones_like(losses))
    return sums


def context_lengths(tokens: torch.Tensor, sequence_id: torch.Tensor | None) -> torch.Tensor:
    """Tokens that each position sees, itself included: (batch, seq), counted from the start of its document."""
    place = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    if sequence_id is None:
        return place + 1
    begins = F.pad(sequence_id[:, 1:] != sequence_id[:, :-1], (1, 0), value=True)
    return place - torch.where(begins, place, 0).cummax(dim=1).values + 1


def _split(batch: Mapping[str, Any], rows: int | float | None) -> Iterator[dict[str, Any]]:
    size = max(1, int(rows or 1))
    for start in range(0, len(batch['input_ids']), size):
        yield {key: value[start : start + size] if isinstance(value, (torch.Tensor, list)) else value for key, value in batch.items()}


def _add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum, of batches that may have been cut to different lengths."""
    width = max(a.shape[1], b.shape[1])
    return F.pad(a, (0, width - a.shape[1])) + F.pad(b, (0, width - b.shape[1]))


def _over_ranks(sums: torch.Tensor, state: State) -> torch.Tensor:
    if dist.get_world_size() == 1:
        return sums
    width = torch.tensor([sums.shape[1]], device=state.device._device)
    dist.all_reduce(width, 'MAX')
    total = F.pad(sums, (0, int(width) - sums.shape[1])).to(state.device._device)
    dist.all_reduce(total, 'SUM')
    return total.cpu()


def _unwrapped(state: State) -> Any:
    return state.model.module if state.is_model_ddp else state.model
