"""The arithmetic of a memory plan: pure functions over numbers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Iterable, Mapping

from llmfoundry.command_utils.plan.storage_log import EventLog

__all__ = ['KINDS', 'Peak', 'ddp_buckets', 'extrapolate', 'format_bytes', 'largest_microbatch', 'parse_bytes', 'peak']

KINDS = ('parameter', 'gradient', 'optimizer', 'buffer', 'communication', 'activations')

UNITS = {'': 1, 'b': 1, 'k': 10**3, 'kb': 10**3, 'm': 10**6, 'mb': 10**6, 'g': 10**9, 'gb': 10**9, 't': 10**12, 'tb': 10**12, 'kib': 2**10, 'mib': 2**20, 'gib': 2**30, 'tib': 2**40}
# DistributedDataParallel's bucket_cap_mb, and its smaller first bucket.
DDP_BUCKET, DDP_FIRST_BUCKET = 25 * 2**20, 2**20


@dataclass(frozen=True)
class Peak:
    """Most bytes in use.

    Attributes:
        in_use: bytes at that moment.
        phase: forward, loss, backward or optimizer step.
        division: kind -> bytes at that moment; ``activations`` are what has no other kind: activations, their gradients and temporaries.
        activations_kept: bytes that the forward pass keeps for the backward pass, before the loss.
        loss_bytes: highest bytes that logits and loss add to that.
    """

    in_use: int
    phase: str
    division: dict[str, int]
    activations_kept: int = 0
    loss_bytes: int = 0


def parse_bytes(text: str) -> int:
    """``80GB``, ``24 GiB``, ``512m`` or a plain number as bytes; GB are 10**9, GiB 2**30.

    Raises:
        ValueError: anything else, or nothing above zero.
    """
    match = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*', text)
    unit = UNITS.get(match[2].lower()) if match else None
    if unit is None or float(match[1]) <= 0:
        raise ValueError(f'{text!r} is no amount of memory; write for example 80GB or 24GiB')
    return int(float(match[1]) * unit)


def format_bytes(size: int) -> str:
    """Decimal units with three digits: 1.39 GB."""
    for unit, value in (('TB', 10**12), ('GB', 10**9), ('MB', 10**6), ('kB', 10**3)):
        if abs(size) >= value:
            shown = size / value
            return f'{shown:.{max(0, 2 - int(math.log10(abs(shown))))}f} {unit}'
    return f'{size} B'


def ddp_buckets(gradient_bytes: Iterable[int]) -> list[int]:
    """Sizes of the flat buffers through which DDP reduces gradients, made in reverse order of the parameters; a gradient is never split."""
    buckets, current = [], 0
    for size in reversed(list(gradient_bytes)):
        current += size
        if current >= (DDP_BUCKET if buckets else DDP_FIRST_BUCKET):
            buckets.append(current)
            current = 0
    return [*buckets, current] if current else buckets


def peak(log: EventLog) -> Peak:
    """The moment of most bytes in use, and how they divide."""
    sizes: dict[int, int] = {}
    marks = dict(log.marks)
    phase, now, kept, loss_start, loss_bytes = 'start', 0, 0, 0, 0
    highest: tuple[int, int, str] = (0, 0, 'start')
    for index, event in enumerate(log.events):
        if index in marks:
            phase = marks[index]
            if phase == 'loss':
                loss_start = now
                kept = now - sum(size for block, size in sizes.items() if block in log.kinds)
        now -= sizes.pop(event.block, 0)
        if event.size:
            sizes[event.block] = event.size
            now += event.size
        if phase == 'loss':
            loss_bytes = max(loss_bytes, now - loss_start)
        if now > highest[0]:
            highest = (now, index, phase)
    return Peak(highest[0], highest[2], _division(log, highest[1]), kept, loss_bytes)


def _division(log: EventLog, last: int) -> dict[str, int]:
    """Bytes in use after event ``last``, by kind."""
    sizes: dict[int, int] = {}
    for event in log.events[:last + 1]:
        sizes.pop(event.block, None)
        if event.size:
            sizes[event.block] = event.size
    division = dict.fromkeys(KINDS, 0)
    for block, size in sizes.items():
        division[log.kinds.get(block, 'activations')] += size
    return division


def extrapolate(low: Peak, high: Peak, depths: tuple[int, int], depth: int) -> Peak:
    """The peak of a model of ``depth`` equal layers, from those of two shallower ones: every amount is linear in the depth."""
    def at(a: int, b: int) -> int:
        return round(b + (b - a) * (depth - depths[1]) / (depths[1] - depths[0]))

    division = {kind: at(low.division[kind], high.division[kind]) for kind in KINDS}
    return Peak(sum(division.values()), high.phase, division, at(low.activations_kept, high.activations_kept), at(low.loss_bytes, high.loss_bytes))


def largest_microbatch(measured: Mapping[int, int], budget: int, limit: int) -> int:
    """The largest microbatch of at most ``limit`` whose peak fits into ``budget`` on the line through two measured ``{microbatch: bytes}``; 0 if none does."""
    (small, low), (large, high) = sorted(measured.items())
    slope = (high - low) / (large - small)
    if low > budget and slope <= 0:
        return 0
    if slope <= 0:
        return limit
    return max(0, min(limit, math.floor(small + (budget - low) / slope)))
