"""Packing: which examples share a row, decided from their lengths alone.

Best fit decreasing over a look-ahead window: of the rows that are open, an example goes to the one that it fills best. The remaining space of all open rows is one bitset (a Python integer),
so the best row is a shift and a lowest set bit, and a million examples take seconds. Every example gets a place; nothing is dropped. The alternative, public releases' first fit within one batch
with leftovers, fills 0.87 of the positions where this fills 0.99, and loses tokens when its rows run out. ``BinPackCollator`` keeps that interface for plug-ins.
"""

from __future__ import annotations

from typing import Any, Callable, Literal, Mapping, NamedTuple, Sequence

import numpy as np
import torch

from llmfoundry.data.batch_stats import CROSS_ENTROPY_IGNORE_INDEX
from llmfoundry.lazy import lazy_exports

_lazy_attribute, _, _LAZY = lazy_exports(__name__, {'auto_packing_ratio': 'llmfoundry.data.packing_profile', 'profile_packing': 'llmfoundry.data.packing_profile'})

__all__ = ['DEFAULT_WINDOW', 'BatchPacking', 'BinPackCollator', 'Bins', 'best_fit', 'best_fit_bins', 'choose_bins', 'pack_in_batches', *_LAZY]

# Examples sorted and packed together. Larger fills rows better and moves examples further from their place in an unshuffled data set; beyond this the fill gains less than 0.001.
DEFAULT_WINDOW = 1 << 16


def __getattr__(name: str) -> Any:
    return _lazy_attribute(name)


class Bins(NamedTuple):
    """Examples by row, in two arrays: row ``i`` holds ``order[offsets[i] : offsets[i + 1]]``.

    Attributes:
        order: int64 (examples,), each index once.
        offsets: int64 (rows + 1,).
    """

    order: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def bin(self, index: int) -> np.ndarray:
        """Examples of one row, in their order within it."""
        return self.order[self.offsets[index] : self.offsets[index + 1]]

    @classmethod
    def of_lists(cls, bins: Sequence[Sequence[int]]) -> Bins:
        """From one list of examples for each row."""
        sizes = np.fromiter((len(b) for b in bins), dtype=np.int64, count=len(bins))
        order = np.fromiter((i for b in bins for i in b), dtype=np.int64, count=int(sizes.sum()))
        return cls(order, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)]))

    @classmethod
    def singles(cls, num_examples: int) -> Bins:
        """One example in each row."""
        return cls(np.arange(num_examples, dtype=np.int64), np.arange(num_examples + 1, dtype=np.int64))


class _OpenBins:
    """Bins with space left, found by the smallest space that suffices."""

    def __init__(self, capacity: int) -> None:
        self._with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
        self._spaces = 0  # bit s: some bin has exactly s tokens left

    def add(self, bin_id: int, space: int) -> None:
        if space > 0:
            self._with_space[space].append(bin_id)
            self._spaces |= 1 << space

    def take(self, length: int) -> tuple[int, int] | None:
        """Removes the bin that ``length`` fills best; returns it and its space, or None if none has that much."""
        fitting = self._spaces >> length
        if not fitting:
            return None
        space = length + (fitting & -fitting).bit_length() - 1
        bins = self._with_space[space]
        bin_id = bins.pop()
        if not bins:
            self._spaces ^= 1 << space
        return bin_id, space

    def keep_from(self, first_bin: int) -> None:
        """Closes the bins before ``first_bin``."""
        spaces = self._spaces
        while spaces:
            space = (spaces & -spaces).bit_length() - 1
            spaces &= spaces - 1
            kept = [b for b in self._with_space[space] if b >= first_bin]
            self._with_space[space] = kept
            if not kept:
                self._spaces ^= 1 << space


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int, window: int = DEFAULT_WINDOW) -> Bins:
    """Packs examples into as few bins as best fit decreasing needs.

    Examples are taken a window at a time, longest first. A bin stays open until the end of the window after the one in which it was begun, so no example moves further than that.

    Args:
        lengths: tokens of each example.
        capacity: tokens of a bin.
        window: examples looked at together.

    Returns:
        Bins in the order in which they were begun; within a bin, examples in their own order.

    Raises:
        ValueError: an example is longer than a bin, or negative; ``window`` or ``capacity`` below 1.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if capacity < 1 or window < 1:
        raise ValueError(f'capacity and window must be at least 1, got {capacity} and {window}')
    wrong = np.flatnonzero((sizes > capacity) | (sizes < 0))
    if len(wrong):
        raise ValueError(f'example {wrong[0]} has {sizes[wrong[0]]} tokens, but a row holds 0 to {capacity}. Truncate the examples first')
    bin_of = np.zeros(len(sizes), dtype=np.int64)
    open_bins, num_bins, window_begin = _OpenBins(capacity), 0, 0
    for start in range(0, len(sizes), window):
        open_bins.keep_from(window_begin)
        window_begin = num_bins
        chunk = sizes[start : start + window]
        longest_first = np.argsort(-chunk, kind='stable')
        places = []
        for length in chunk[longest_first].tolist():
            found = open_bins.take(length)
            if found is None:
                bin_id, space = num_bins, capacity
                num_bins += 1
            else:
                bin_id, space = found
            open_bins.add(bin_id, space - length)
            places.append(bin_id)
        bin_of[start + longest_first] = places
    order = np.argsort(bin_of, kind='stable')
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.bincount(bin_of, minlength=num_bins))])
    return Bins(order, offsets.astype(np.int64))


def best_fit_bins(lengths: Sequence[int] | np.ndarray, capacity: int, window: int = DEFAULT_WINDOW) -> list[list[int]]:
    """``best_fit`` as a list of example indices for each bin."""
    bins = best_fit(lengths, capacity, window)
    order, offsets = bins.order.tolist(), bins.offsets.tolist()
    return [order[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]


def choose_bins(lengths: Sequence[int], capacity: int, num_bins: int) -> tuple[list[list[int]], list[list[int]]]:
    """Packs the examples of one batch into ``num_bins`` bins.

    Returns:
        ``(chosen, rest)``: the fullest ``num_bins`` bins, and those that are left over. Where fewer would do, bins are split so that there are ``num_bins`` all the same,
        unless there are fewer examples than that.
    """
    bins = best_fit_bins(lengths, capacity, max(1, len(lengths)))
    while len(bins) < num_bins:
        most = max(range(len(bins)), key=lambda b: len(bins[b]), default=None)
        if most is None or len(bins[most]) < 2:
            break
        half = len(bins[most]) // 2
        bins[most : most + 1] = [bins[most][:half], bins[most][half:]]
    # Stable, so that bins of the same fill keep their order.
    bins.sort(key=lambda b: -sum(lengths[i] for i in b))
    return bins[:num_bins], bins[num_bins:]


class BatchPacking(NamedTuple):
    """What ``pack_in_batches`` decided.

    Attributes:
        bins: rows in the order of the batches.
        ratio: examples per row over the batches before the last one; lower than asked for if that many do not fit.
    """

    bins: Bins
    ratio: float


def pack_in_batches(lengths: Sequence[int] | np.ndarray, capacity: int, rows: int, ratio: float) -> BatchPacking:
    """Packs batch by batch: each takes the next ``int(rows * ratio)`` examples and what did not fit into the one before, and fills ``rows`` rows.

    Nothing is dropped: leftovers go on to the next batch, and there are more batches at the end. Once a batch full of tokens is left over, no new examples are taken, so leftovers stay bounded.

    Args:
        lengths: tokens of each example.
        capacity: tokens of a row.
        rows: rows of a batch over all devices.
        ratio: examples per row, at least 1.
    """
    sizes = np.asarray(lengths, dtype=np.int64).tolist()
    per_batch = max(rows, int(rows * ratio))
    bins: list[list[int]] = []
    carried: list[int] = []
    taken, full_batches, in_full_batches = 0, 0, 0
    while taken < len(sizes) or carried:
        if sum(sizes[i] for i in carried) < rows * capacity:
            pool = [*carried, *range(taken, min(len(sizes), taken + per_batch))]
            taken = min(len(sizes), taken + per_batch)
        else:
            pool = carried
        chosen, rest = choose_bins([sizes[i] for i in pool], capacity, rows)
        chosen_ids = [[pool[i] for i in b] for b in chosen]
        carried = sorted(pool[i] for b in rest for i in b)
        bins += chosen_ids
        if taken < len(sizes):
            full_batches += 1
            in_full_batches += sum(map(len, chosen_ids))
    effective = in_full_batches / (full_batches * rows) if full_batches else len(sizes) / max(1, len(bins))
    return BatchPacking(Bins.of_lists(bins), effective)


class BinPackCollator:
    """Packs the rows of another collator's batch; for plug-ins. The loaders of this package pack without it, and drop nothing.

    Args:
        collator: makes a batch with ``input_ids``, ``labels`` and ``attention_mask``, ``(batch, seq)`` each.
        target_batch_size: rows of a packed batch.
        max_seq_len: tokens of a packed row.
        pad_token_id: fills the rows.
        padding_side: ``left`` or ``right``.
        max_leftover_bins_to_keep: rows that may wait for the next batch, None for all. What does not fit is dropped and counted in ``waste``.
        is_profiling: only count; the batch is returned as it came.

    Raises:
        ValueError: a negative ``max_leftover_bins_to_keep``, or an unknown side.
    """

    def __init__(
        self,
        collator: Callable[[Any], Mapping[str, Any]],
        target_batch_size: int,
        max_seq_len: int,
        pad_token_id: int,
        padding_side: Literal['left', 'right'],
        max_leftover_bins_to_keep: int | None = None,
        is_profiling: bool = False,
    ) -> None:
        if max_leftover_bins_to_keep is not None and max_leftover_bins_to_keep < 0:
            raise ValueError(f'max_leftover_bins_to_keep must be 0 or more, got {max_leftover_bins_to_keep}')
        if padding_side not in ('left', 'right'):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        self.base_collator = collator
        self.out_size = int(target_batch_size)
        self.max_seq_len = int(max_seq_len)
        self.pad_token_id = int(pad_token_id)
        self.padding_side = padding_side
        self.max_leftover_bins_to_keep = max_leftover_bins_to_keep
        self.is_profiling = is_profiling
        self.n_packed_tokens = self.n_total_tokens = self.n_packed_examples = 0
        # Rows that wait: one list of examples for each.
        self._leftover_bins: list[list[dict[str, torch.Tensor]]] = []

    @property
    def waste(self) -> float:
        """Share of the tokens that were dropped."""
        return 1 - self.n_packed_tokens / max(1, self.n_total_tokens)

    @property
    def efficiency(self) -> float:
        """Share of the positions of packed rows that hold a token."""
        return self.n_packed_tokens / max(1, self.max_seq_len * self.n_packed_examples)

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """The packed batch of ``examples``."""
        return self.pack(self.base_collator(examples))

    def pack(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Packs a batch.

        Returns:
            ``input_ids``, ``labels``, ``attention_mask`` and ``sequence_id``, int64 ``(target_batch_size, max_seq_len)``; fewer rows if there are not enough examples.

        Raises:
            ValueError: a key is missing, or a row has more than ``max_seq_len`` tokens.
        """
        missing = {'input_ids', 'labels', 'attention_mask'} - set(batch)
        if missing:
            raise ValueError(f'to be packed, a batch must have input_ids, labels and attention_mask, but {", ".join(sorted(missing))} is missing')
        mask = torch.as_tensor(batch['attention_mask']).bool()
        new = [{key: batch[key][row, mask[row]] for key in ('input_ids', 'labels')} for row in range(len(mask))]
        self.n_total_tokens += int(mask.sum())
        pool = [example for waiting in self._leftover_bins for example in waiting] + new
        chosen, rest = choose_bins([len(e['input_ids']) for e in pool], self.max_seq_len, self.out_size)
        keep = len(rest) if self.max_leftover_bins_to_keep is None else self.max_leftover_bins_to_keep
        self._leftover_bins = [[pool[i] for i in bin_] for bin_ in rest[:keep]]
        self.n_packed_tokens += sum(len(pool[i]['input_ids']) for bin_ in chosen for i in bin_)
        self.n_packed_examples += len(chosen)
        if self.is_profiling:
            return dict(batch)
        rows = [self._row([pool[i] for i in bin_]) for bin_ in chosen]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def _row(self, examples: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """One packed row: the first label of each example is ignored, since the token before it belongs to another one."""
        lengths = torch.tensor([len(e['input_ids']) for e in examples])
        labels = [torch.cat([e['labels'].new_full((1,), CROSS_ENTROPY_IGNORE_INDEX), e['labels'][1:]]) if number else e['labels'] for number, e in enumerate(examples)]
        row = {
            'input_ids': (torch.cat([e['input_ids'] for e in examples]), self.pad_token_id),
            'labels': (torch.cat(labels), CROSS_ENTROPY_IGNORE_INDEX),
            'attention_mask': (torch.ones(int(lengths.sum()), dtype=torch.int64), 0),
            'sequence_id': (torch.repeat_interleave(torch.arange(len(examples)), lengths), -1),
        }
        missing = self.max_seq_len - int(lengths.sum())
        pad = (0, missing) if self.padding_side == 'right' else (missing, 0)
        return {key: torch.nn.functional.pad(value.to(torch.int64), pad, value=fill) for key, (value, fill) in row.items()}
