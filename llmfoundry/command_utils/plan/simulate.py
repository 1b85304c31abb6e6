"""Runs training steps of a config on fake tensors and logs every allocation: forward, loss, backward, accumulation, optimizer, evaluation, with the run's precision, checkpointing and sharding.

One microbatch stands for all: the gradients of those before it are there when it runs.
"""

from __future__ import annotations

import contextlib
import gc
import logging
from typing import Any, Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llmfoundry import builders
from llmfoundry.command_utils.plan.arithmetic import ddp_buckets
from llmfoundry.command_utils.plan.fake_model import Target, build_model, fake_weights, process_group_of, shard
from llmfoundry.command_utils.plan.storage_log import EventLog, StorageLog
from llmfoundry.config.train import TrainConfig
from llmfoundry.models import losses
from llmfoundry.models.cpu_autocast import wrap_forward

__all__ = ['simulate']

def simulate(cfg: TrainConfig, target: Target, tokenizer: Any, microbatch: int) -> EventLog:
    """The log of a step on one rank, in the middle of training: the optimizer has its state, and gradients of an earlier microbatch exist if there is more than one.

    Args:
        cfg: checked for ``target.devices`` ranks.
        microbatch: samples per forward pass.

    Raises:
        ConfigError: the model cannot be built, or sharded as asked.
    """
    log = EventLog()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _quiet(), _settings_of(target), process_group_of(target.devices):
        model = build_model(cfg, tokenizer)
        if cfg.precision == 'amp_bf16' and not target.on_cuda:
            model = wrap_forward(model)
        fake_weights(model, mode)
        storages = StorageLog(log, copies_in_collectives=not target.on_cuda and target.devices > 1)
        with mode, storages:
            _Run(cfg, target, model, storages).run(microbatch)
        del model
    gc.collect()
    return log


class _Run:
    """The loop over steps and microbatches."""

    def __init__(self, cfg: TrainConfig, target: Target, model: nn.Module, storages: StorageLog) -> None:
        self.cfg, self.target, self.model, self.storages = cfg, target, model, storages
        self.log = storages.log
        self.outputs: Any = None

    def run(self, microbatch: int) -> None:
        sharded = shard(self.cfg, self.model, self.target)
        for tensor in self.model.parameters():
            self.storages.track(tensor, 'parameter')
        for tensor in self.model.buffers():
            self.storages.track(tensor, 'buffer')
        self.log.mark('optimizer state')
        optimizer = builders.build_optimizer(self.model, *builders.split_name(self.cfg.optimizer, 'optimizer'))
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        if self.target.devices > 1 and not sharded:
            for size in ddp_buckets(p.numel() * p.element_size() for p in trainable):
                self.storages.allocate(size, 'communication')
        for p in trainable:
            p.grad = torch.zeros_like(p)
        self._optimizer_step(optimizer, trainable)
        if microbatch >= self.cfg.device_train_batch_size:
            optimizer.zero_grad()
        self.model.train()
        self._mark_loss()
        self._microbatch(microbatch)
        self.log.mark('optimizer step')
        self._optimizer_step(optimizer, trainable)

    def _optimizer_step(self, optimizer: Any, trainable: list[nn.Parameter]) -> None:
        for p in trainable:
            if p.grad is not None:
                self.storages.track(p.grad, 'gradient')
        optimizer.step()
        for state in optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    self.storages.track(value, 'optimizer')

    def _mark_loss(self) -> None:
        loss_fn = getattr(self.model, 'loss_fn', None)
        if loss_fn is None:
            return

        def marked(*args: Any, **kwargs: Any) -> Any:
            self.log.mark('loss')
            result = loss_fn(*args, **kwargs)
            self.log.mark('forward')
            return result

        self.model.loss_fn = marked

    def _microbatch(self, size: int) -> None:
        self.log.mark('forward')
        batch = fake_batch(size, self.cfg.max_seq_len)
        with self._autocast():
            self.outputs = self.model(batch)
            loss = self.model.loss(self.outputs, batch)
        total = loss['total'] if isinstance(loss, dict) else loss
        self.log.mark('backward')
        total.backward()

    def _autocast(self) -> Any:
        dtype = {'amp_bf16': torch.bfloat16, 'amp_fp16': torch.float16, 'amp_fp8': torch.bfloat16}.get(self.cfg.precision)
        if dtype is None or not self.target.on_cuda:
            return contextlib.nullcontext()
        return torch.autocast('cpu', dtype=dtype)


def fake_batch(size: int, seq_len: int) -> dict[str, torch.Tensor]:
    """Full rows: each token has a target."""
    ids = torch.zeros(size, seq_len, dtype=torch.long)
    return {'input_ids': ids, 'labels': ids.clone(), 'attention_mask': torch.ones(size, seq_len, dtype=torch.bool)}


@contextlib.contextmanager
def _settings_of(target: Target) -> Iterator[None]:
    """Fake tensors are on the CPU whatever is planned for; what our code decides by the device is set as on the target."""
    saved = dict(losses.DEFAULT_CHUNK_BYTES)
    losses.DEFAULT_CHUNK_BYTES['cpu'] = saved[target.device_type]
    try:
        yield
    finally:
        losses.DEFAULT_CHUNK_BYTES.update(saved)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Remarks of Composer and transformers on a model without tokenizer or weights do not concern a plan."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
