"""One optimiser step of a real Composer Trainer, and what it computed."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from llmfoundry.data.batch_stats import get_tokens_per_batch_func

__all__ = ['one_step', 'padded_rows', 'token_mean']

IGNORE = -100


def padded_rows(num_rows: int, seq_len: int, vocab_size: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Rows of random tokens with right padding of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(num_rows):
        length = 2 + (index * 7) % (seq_len - 1)
        input_ids = torch.randint(0, vocab_size, (seq_len,), generator=generator)
        mask = torch.arange(seq_len) < length
        rows.append({'input_ids': input_ids, 'attention_mask': mask, 'labels': torch.where(mask, input_ids, IGNORE)})
    return rows


def token_mean(model: Any, rows: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Mean cross entropy over all tokens of all rows, row by row from logits: what a step should minimise."""
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = model.model(input_ids=row['input_ids'][None], attention_mask=row['attention_mask'][None]).logits[0, :-1]
        targets = row['labels'][1:]
        total = total + torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction='sum')
        count += int((targets != IGNORE).sum())
    return total / count


def one_step(model: Any, rows: list[dict[str, torch.Tensor]], microbatch: int, **trainer_options: Any) -> dict[str, Any]:
    """Trains one batch of all rows (over all ranks) with SGD at learning rate 0; returns the loss, the metrics and the gradients.

    Args:
        model: a ComposerModel; its parameters do not change.
        rows: the global batch, in order.
        microbatch: ``device_train_microbatch_size``.
    """
    from composer import Callback, DataSpec, Trainer
    from composer.utils import dist

    found: dict[str, Any] = {}

    class Capture(Callback):
        def after_train_batch(self, state: Any, logger: Any) -> None:
            found['gradients'] = {name.replace('module.', ''): p.grad.detach().clone() for name, p in state.model.named_parameters() if p.grad is not None}

        def batch_end(self, state: Any, logger: Any) -> None:
            found['loss'] = state.total_loss_dict['loss/train/total']

        def epoch_end(self, state: Any, logger: Any) -> None:
            found['metrics'] = {name: float(value) for name, value in state.train_metric_values.items()}

    world_size = dist.get_world_size()
    sampler = DistributedSampler(rows, world_size, dist.get_global_rank(), shuffle=False) if world_size > 1 else None  # type: ignore[arg-type]
    loader = DataLoader(rows, batch_size=len(rows) // world_size, sampler=sampler)  # type: ignore[arg-type]
    trainer = Trainer(
        model=model, train_dataloader=DataSpec(loader, get_num_tokens_in_batch=get_tokens_per_batch_func()), optimizers=torch.optim.SGD(model.parameters(), lr=0.0),
        max_duration='1ba', device='cpu', device_train_microbatch_size=microbatch, accumulate_train_batch_on_tokens=True, callbacks=[Capture()], progress_bar=False,
        log_to_console=False, **trainer_options,
    )
    trainer.fit()
    trainer.close()
    return found
