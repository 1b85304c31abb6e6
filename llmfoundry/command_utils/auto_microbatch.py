"""Finds ``device_train_microbatch_size: auto``: the largest microbatch that fits, searched before the first step.

Composer's own search guesses too much and halves when CUDA runs out of memory in the middle of training; it works on GPUs only, refuses FSDP2 and has hung ranks that did not run
out together. Ours runs forward and backward on a batch of the real shapes, doubles while it fits, then bisects; the ranks agree on every step by a minimum. Peak memory
grows linearly with the microbatch, so two measured sizes predict the next, and a size that would not fit is not tried, since on the CPU the kernel may kill a process that takes too much. A rank that
runs out of memory nevertheless makes the size too large for all of them (see ``oom_agreement``). The run itself is not touched: weights, gradients, optimizer, random state and data loader are as before.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any, Callable, Iterator, Mapping

import torch
from composer.utils import reproducibility
from torch import nn

from llmfoundry import dist
from llmfoundry.command_utils import memory
from llmfoundry.command_utils.oom_agreement import all_stay_within_memory
from llmfoundry.errors import ConfigError, ConfigProblem

__all__ = ['MicrobatchProbe', 'find_microbatch_size', 'largest_fitting', 'predict_peak', 'probe_batch']

log = logging.getLogger(__name__)

# Part of the free memory that the search may plan with; the rest is for fragmentation, evaluation and what other processes take later.
USABLE_FRACTION = {'cuda': 0.92, 'cpu': 0.8}
# A CPU's matrix products are saturated by a few thousand rows, so more tokens at a time cost memory and bring no speed.
CPU_TOKENS = 8192
# Adam keeps two values per weight, and has not allocated them before its first step.
OPTIMIZER_VALUES_PER_WEIGHT = 2
# On the CPU two measurements are enough, since a step there takes seconds and the growth is linear.
CPU_MEASUREMENTS = 2


def largest_fitting(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest size in 1..limit for which ``fits`` is true, 0 if there is none. Doubles, then bisects; ``fits`` must be monotone."""
    good, bad = 0, limit + 1
    size = 1
    while size <= limit and bad > limit:
        if fits(size):
            good, size = size, (size * 2 if size * 2 <= limit or size == limit else limit)
            if good == limit:
                return good
        else:
            bad = size
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def predict_peak(measured: Mapping[int, int], size: int, fixed: int = 0) -> int:
    """Bytes that a microbatch of ``size`` would need, from measured ``{size: bytes}``.

    0 without a measurement; with one, what exceeds ``fixed`` (the gradients) grows in proportion; with more, a line through the two largest.
    """
    if size in measured:
        return measured[size]
    points = sorted(measured.items())
    if not points:
        return 0
    if len(points) == 1:
        fixed = min(fixed, points[0][1])
        return fixed + (points[0][1] - fixed) * size // points[0][0]
    (s0, b0), (s1, b1) = points[-2:]
    return int(b1 + max(b1 - b0, 0) / (s1 - s0) * (size - s1))


def probe_batch(data_spec: Any, size: int, seq_len: int) -> dict[str, torch.Tensor]:
    """A microbatch of ``size`` copies of the first sample, as the loader collates it, stretched to ``seq_len`` tokens, the worst case.

    Reads the dataset by index, so that the loader's position does not move. A dataset that cannot be indexed gives a batch of zeros.
    """
    dataset, collate = getattr(data_spec.dataloader, 'dataset', None), getattr(data_spec.dataloader, 'collate_fn', None)
    batch = None
    if callable(getattr(dataset, '__getitem__', None)) and callable(collate):
        with contextlib.suppress(NotImplementedError, TypeError, KeyError, IndexError):
            batch = dict(collate([dataset[0]] * size))
    if batch is None or 'input_ids' not in batch:
        ids = torch.zeros(size, seq_len, dtype=torch.long)
        return {'input_ids': ids, 'labels': ids.clone(), 'attention_mask': torch.ones_like(ids)}
    missing = seq_len - batch['input_ids'].shape[1]
    if missing <= 0:
        return batch
    length = batch['input_ids'].shape[1]
    return {
        k: torch.cat([v, v[:, -1:].expand(-1, missing)], dim=1) if torch.is_tensor(v) and v.ndim == 2 and v.shape[1] == length else v
        for k, v in batch.items()
    }


class MicrobatchProbe:
    """Tries microbatch sizes on a built Composer trainer.

    Args:
        trainer: its model is wrapped and loaded, no step has been made.
        seq_len: tokens per sample in the worst case.
    """

    def __init__(self, trainer: Any, seq_len: int) -> None:
        self.state = trainer.state
        self.data_spec = trainer._train_data_spec
        # DDP's wrapper adds collectives and no memory that is not allocated by now.
        self.model: nn.Module = trainer._original_model
        self.seq_len = seq_len
        self.device_type = 'cuda' if next(self.model.parameters()).is_cuda else 'cpu'
        self.measured: dict[int, int] = {}
        self.meter = memory.PeakMeter(self.device_type)
        self.gradient_bytes = sum(memory.local_bytes(p) for p in self.model.parameters() if p.requires_grad)
        optimizer_bytes = 0 if any(o.state for o in self.state.optimizers) else OPTIMIZER_VALUES_PER_WEIGHT * self.gradient_bytes
        self.budget = int(self.meter.available() * USABLE_FRACTION[self.device_type]) - optimizer_bytes

    def fits(self, size: int) -> bool:
        """Whether ``size`` fits on every rank. Collective: ranks measure the same sizes, whatever they find."""
        predicted = predict_peak(self.measured, size, self.gradient_bytes)
        if not dist.all_reduce_min(int(predicted <= self.budget)):
            log.info('auto microbatch: %d would need %s of %s bytes', size, f'{predicted:,}', f'{self.budget:,}')
            return False
        if self.device_type == 'cpu' and len(self.measured) >= CPU_MEASUREMENTS:
            return True
        needed = self._run(size)
        if needed is None:
            log.info('auto microbatch: %d ran out of memory on a rank', size)
            return False
        self.measured[size] = needed
        log.info('auto microbatch: %d needs %s of %s bytes', size, f'{needed:,}', f'{self.budget:,}')
        return bool(dist.all_reduce_min(int(needed <= self.budget)))

    def _run(self, size: int) -> int | None:
        """Peak bytes of one forward and backward; None, on every rank, if any ran out of memory."""
        self.meter.reset()
        try:
            enough = all_stay_within_memory(lambda: self._forward_backward(size), self.model)
            return self.meter.peak() if enough else None
        finally:
            for p in self.model.parameters():
                p.grad = None
            self.meter.release()

    def _forward_backward(self, size: int) -> None:
        from composer.core.precision import get_precision_context

        batch = self.state.device.batch_to_device(probe_batch(self.data_spec, size, self.seq_len))
        batch = self.data_spec.microbatch_transforms(batch)
        with get_precision_context(self.state.precision, self.state.precision_config):
            loss = self.model.loss(self.model(batch), batch)
        total = loss['total'] if isinstance(loss, dict) else sum(loss) if isinstance(loss, (tuple, list)) else loss
        total.backward()


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Random state, buffers and train/eval mode are afterwards as before; compiled code is not made for the probe's shapes."""
    rng = reproducibility.get_rng_state()
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    was_training = model.training
    model.train()
    try:
        with torch.compiler.set_stance('force_eager'):
            yield
    finally:
        model.train(was_training)
        with torch.no_grad():
            for name, b in model.named_buffers():
                if name in buffers:
                    b.copy_(buffers[name])
        reproducibility.load_rng_state(rng)


def find_microbatch_size(trainer: Any, device_batch_size: int | float, seq_len: int) -> int:
    """The largest microbatch that every rank can train with. Collective.

    Args:
        trainer: built, before its first step.
        device_batch_size: samples per process and step, the upper limit.
        seq_len: tokens per sample.

    Raises:
        ConfigError: not even one sample fits, or the run is tensor parallel.
    """
    if trainer.state.tp_config is not None:
        raise ConfigError([_problem('auto cannot be searched with tp_config, whose ranks exchange activations in the middle of a layer. Give a number.')])
    limit = max(int(device_batch_size), 1)
    probe = MicrobatchProbe(trainer, seq_len)
    if probe.device_type == 'cpu':
        limit = min(limit, max(CPU_TOKENS // seq_len, 1))
    with _untouched(probe.model):
        size = largest_fitting(limit, probe.fits)
    if size == 0:
        needed = max(probe.measured.values(), default=0)
        raise ConfigError([_problem(
            f'auto found no size that fits: one sample of {seq_len} tokens needs {needed:,} bytes and {max(probe.budget, 0):,} are usable on this {probe.device_type}. '
            'Use a smaller model or max_seq_len, activation checkpointing, or more devices with fsdp_config.',
        )])
    return size


def _problem(message: str) -> ConfigProblem:
    return ConfigProblem('device_train_microbatch_size', message)
