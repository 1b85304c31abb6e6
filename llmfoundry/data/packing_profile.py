"""How many examples per row fit: profiles packing ratios on the lengths of real examples.

The loaders need it only for streaming data, where a whole number of examples per row keeps the batches the same for any number of ranks; data sets that lie in a token store are packed by best fit
without a ratio. ``auto_packing_ratio`` and ``profile_packing`` keep the interface of public releases for plug-ins and ``scripts/misc/profile_packing.py``.
"""

from __future__ import annotations

import logging
from itertools import islice
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from composer.utils import reproducibility
from transformers import PreTrainedTokenizerBase

from llmfoundry import dist
from llmfoundry.data.packing import BinPackCollator, best_fit, choose_bins
from llmfoundry.registry import dataloaders

__all__ = ['PackingProfile', 'auto_packing_ratio', 'example_lengths', 'integer_ratio', 'profile_packing', 'profile_ratio']

log = logging.getLogger(__name__)

_BATCHES_PER_PROFILE = 100
_PACKING_KEYS = ('packing', 'packing_ratio', 'max_leftover_bins_to_keep', 'auto_packing_replication')
_SMALLEST_MEAN_EXAMPLE = 100


class PackingProfile(NamedTuple):
    """One packing ratio: positions that are padding, and tokens that did not fit, in percent; None where there was no batch to try it on."""

    packing_ratio: float
    padding_percent: float | None
    waste_percent: float | None


def integer_ratio(lengths: Sequence[int] | np.ndarray, rows: int, capacity: int) -> int:
    """The most examples per row, a whole number, for which no batch of the profile needs more rows than it has.

    Args:
        lengths: tokens of each example, in an order like that of training.
        rows: of a device batch.
        capacity: tokens of a row.
    """
    sizes = np.minimum(np.asarray(lengths), capacity)
    ratio = 1
    while len(sizes) >= rows * (ratio + 1):
        per_batch = rows * (ratio + 1)
        if any(len(best_fit(sizes[start : start + per_batch], capacity, per_batch)) > rows for start in range(0, len(sizes) - per_batch + 1, per_batch)):
            break
        ratio += 1
    return ratio


def profile_ratio(lengths: Sequence[int] | np.ndarray, rows: int, capacity: int, ratio: float, max_leftover_bins: int | None = None) -> PackingProfile:
    """What ``BinPackCollator`` would fill and drop at one ratio, from lengths alone."""
    per_batch = int(rows * ratio)
    sizes = np.asarray(lengths).tolist()
    waiting: list[list[int]] = []
    packed_tokens = total_tokens = packed_rows = 0
    for start in range(0, len(sizes) - per_batch + 1, per_batch):
        new = sizes[start : start + per_batch]
        total_tokens += sum(new)
        pool = [size for bin_ in waiting for size in bin_] + new
        chosen, rest = choose_bins(pool, capacity, rows)
        waiting = [[pool[i] for i in bin_] for bin_ in rest[:max_leftover_bins]]
        packed_tokens += sum(pool[i] for bin_ in chosen for i in bin_)
        packed_rows += len(chosen)
    if not total_tokens:
        return PackingProfile(ratio, None, None)
    return PackingProfile(ratio, 100 * (1 - packed_tokens / (packed_rows * capacity)), 100 * (1 - packed_tokens / total_tokens))


def _unpacked(dataloader_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The loader block without packing and workers, in a block of its own."""
    dataset = {key: value for key, value in dataloader_cfg['dataset'].items() if key not in _PACKING_KEYS}
    kept = {key: value for key, value in dataloader_cfg.items() if key not in ('name', 'drop_last', 'num_workers', 'prefetch_factor', 'persistent_workers', 'timeout', 'pin_memory')}
    return {**kept, 'dataset': dataset, 'drop_last': False, 'num_workers': 0, 'pin_memory': False}


def _example_batches(dataloader_cfg: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, batch_size: int, num_examples: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of unpacked rows, up to about ``num_examples`` rows. The random numbers of the process are left as they were."""
    state = reproducibility.get_rng_state()
    try:
        build = dataloaders.get(dataloader_cfg.get('name', 'finetuning'))
        loader = build(tokenizer=tokenizer, device_batch_size=batch_size, **_unpacked(dataloader_cfg)).dataloader
        yield from islice(loader, max(1, num_examples // batch_size))
    finally:
        reproducibility.load_rng_state(state)


def _profiled_batches(dataloader_cfg: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, device_batch_size: int, max_ratio: float) -> list[dict[str, torch.Tensor]]:
    # Ten times as many rows per loader batch only to have fewer of them.
    return list(_example_batches(dataloader_cfg, tokenizer, 10 * device_batch_size, int(_BATCHES_PER_PROFILE * device_batch_size * max_ratio)))


def example_lengths(dataloader_cfg: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, device_batch_size: int, max_ratio: float) -> list[int]:
    """Tokens of each of the first examples of a loader, as many as ``profile_packing`` looks at."""
    return [int(n) for batch in _profiled_batches(dataloader_cfg, tokenizer, device_batch_size, max_ratio) for n in batch['attention_mask'].sum(-1)]


def profile_packing(
    dataloader_cfg: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    min_ratio: float,
    max_ratio: float,
    num_packing_ratios: int,
    device_batch_size: int,
    packing_collator_cls: type[BinPackCollator] = BinPackCollator,
    inner_collator: Callable[[Any], Any] = lambda batch: batch,
) -> Iterable[PackingProfile]:
    """Tries packing ratios on the first examples of a loader.

    Args:
        dataloader_cfg: the loader block; its packing is left aside.
        tokenizer: the tokenizer.
        min_ratio: the lowest ratio, at least 1.
        max_ratio: the highest ratio.
        num_packing_ratios: how many, evenly spaced.
        device_batch_size: rows of a batch.
        packing_collator_cls: what packs; a subclass of BinPackCollator is run as it is.
        inner_collator: applied to each batch of examples before it is packed.

    Returns:
        One profile for each ratio, from the lowest on.

    Raises:
        ValueError: ``min_ratio`` below 1, or ``max_ratio`` below ``min_ratio``.
    """
    if min_ratio < 1:
        raise ValueError(f'the lowest packing ratio must be at least 1, got {min_ratio}')
    if max_ratio < min_ratio:
        raise ValueError(f'the highest packing ratio must be at least the lowest, {min_ratio}, got {max_ratio}')
    dataset = dataloader_cfg['dataset']
    capacity, leftovers = int(dataset.get('max_seq_len', 2048)), dataset.get('max_leftover_bins_to_keep')
    ratios = sorted({float(ratio) for ratio in np.round(np.linspace(min_ratio, max_ratio, num_packing_ratios), 2)})
    if packing_collator_cls is BinPackCollator:
        lengths = example_lengths(dataloader_cfg, tokenizer, device_batch_size, ratios[-1])
        return [profile_ratio(lengths, device_batch_size, capacity, ratio, leftovers) for ratio in ratios]
    batches = _profiled_batches(dataloader_cfg, tokenizer, device_batch_size, ratios[-1])
    rows = [{key: batch[key][i] for key in ('input_ids', 'labels', 'attention_mask')} for batch in batches for i in range(len(batch['input_ids']))]
    return [_run_collator(rows, tokenizer, device_batch_size, capacity, ratio, packing_collator_cls, inner_collator) for ratio in ratios]


def _run_collator(
    rows: Sequence[Mapping[str, torch.Tensor]], tokenizer: PreTrainedTokenizerBase, device_batch_size: int, capacity: int, ratio: float,
    packing_collator_cls: type[BinPackCollator], inner_collator: Callable[[Any], Any],
) -> PackingProfile:  # fmt: skip
    """One ratio through a plug-in's collator."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    packer = packing_collator_cls(inner_collator, device_batch_size, capacity, pad, tokenizer.padding_side, is_profiling=True)
    per_batch = int(device_batch_size * ratio)
    starts = range(0, len(rows) - per_batch + 1, per_batch)
    for start in starts:
        packer.pack({key: torch.stack([row[key] for row in rows[start : start + per_batch]]) for key in rows[0]})
    return PackingProfile(ratio, 100 * (1 - packer.efficiency), 100 * packer.waste) if starts else PackingProfile(ratio, None, None)


def auto_packing_ratio(
    dataloader_cfg: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    device_batch_size: int,
    num_packing_ratios: int = 20,
    max_ratio: float | None = None,
    packing_collator_cls: type[BinPackCollator] = BinPackCollator,
    inner_collator: Callable[[Any], Any] = lambda batch: batch,
) -> float:
    """The highest packing ratio, of those tried, before the first at which tokens would be dropped; the lowest over all ranks.

    Args:
        dataloader_cfg: the loader block.
        tokenizer: the tokenizer.
        device_batch_size: rows of a batch.
        num_packing_ratios: how many are tried, from 1 to ``max_ratio``.
        max_ratio: ``max_seq_len / 100`` by default.
        packing_collator_cls: see ``profile_packing``.
        inner_collator: see ``profile_packing``.
    """
    max_seq_len = int(dataloader_cfg['dataset'].get('max_seq_len', 2048))
    if max_seq_len <= _SMALLEST_MEAN_EXAMPLE:
        return 1
    found = 1.0
    limit = max_ratio or max_seq_len / _SMALLEST_MEAN_EXAMPLE
    for profile in profile_packing(dataloader_cfg, tokenizer, 1, limit, num_packing_ratios, device_batch_size, packing_collator_cls, inner_collator):
        if profile.waste_percent is None or profile.waste_percent > 0:
            break
        found = profile.packing_ratio
    # Collectives carry whole numbers.
    return dist.all_reduce_min(round(found * 1000)) / 1000
