"""Logs every allocation and release of tensor memory while code runs on fake tensors, which have shapes and no data.

The model's own code runs, so whatever it keeps, copies or recomputes is counted; nothing is known here of any layer. The log is read by ``arithmetic.peak``.
torch's ``MemTracker`` was tried and dropped: it sorts memory by module, and does not tell what was in use at the moment of the peak.
"""

from __future__ import annotations

import contextlib
import weakref
from dataclasses import dataclass, field
from typing import Any, Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ['Event', 'EventLog', 'StorageLog', 'local_tensor']

c10d = torch.ops.c10d


@dataclass(frozen=True)
class Event:
    """``size`` bytes appear under ``block``; 0 bytes: the block is released."""

    block: int
    size: int


@dataclass
class EventLog:
    """What happened, in order.

    Attributes:
        events: allocations and releases.
        marks: (index of the next event, name of the phase that begins there).
        kinds: block -> parameter, gradient, optimizer, buffer, communication; others are activations and temporaries.
    """

    events: list[Event] = field(default_factory=list)
    marks: list[tuple[int, str]] = field(default_factory=list)
    kinds: dict[int, str] = field(default_factory=dict)

    def mark(self, name: str) -> None:
        self.marks.append((len(self.events), name))


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    return getattr(tensor, '_local_tensor', tensor)


class StorageLog(TorchDispatchMode):
    """Fills an ``EventLog`` while it is active.

    Operators whose result depends on data get the answer of full rows: every position has a target, every mask is all true.

    Args:
        log: what is filled.
        copies_in_collectives: whether collectives need a copy of what they send (gloo does, NCCL does not).
    """

    def __init__(self, log: EventLog, copies_in_collectives: bool = False) -> None:
        super().__init__()
        self.log = log
        self.copies_in_collectives = copies_in_collectives
        self._blocks: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._next_block = 0

    def __enter__(self) -> StorageLog:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_watch_resizes(self._gathered))
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()
        super().__exit__(*exc)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return True if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):
            out = torch.empty((args[0].numel(), args[0].dim()), dtype=torch.int64, device=args[0].device)
        else:
            out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.track(leaf)
        if self.copies_in_collectives:
            self._copy_of_collective(func, args)
        return out

    def track(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        """Logs the memory behind ``tensor`` if it is new, and names what it is for."""
        tensor = local_tensor(tensor)
        if not isinstance(tensor, FakeTensor):
            return
        block = self.track_storage(tensor.untyped_storage())
        if kind is not None:
            self.log.kinds.setdefault(block, kind)

    def track_storage(self, storage: torch.UntypedStorage) -> int:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._blocks:
            self._blocks[key] = self._allocate(size)
            weakref.finalize(storage, self._forget, key).atexit = False
        elif self._sizes[self._blocks[key]] != size:
            block = self._blocks[key]
            self._release(block)
            self._sizes[block] = size
            if size:
                self.log.events.append(Event(block, size))
        return self._blocks[key]

    def _gathered(self, storage: torch.UntypedStorage) -> None:
        self.log.kinds.setdefault(self.track_storage(storage), 'communication')

    def allocate(self, size: int, kind: str) -> int:
        """Logs memory that no tensor of the traced code stands for, such as the buckets of DDP."""
        block = self._allocate(size)
        self.log.kinds[block] = kind
        return block

    def _allocate(self, size: int) -> int:
        block, self._next_block = self._next_block, self._next_block + 1
        self._sizes[block] = size
        if size:
            self.log.events.append(Event(block, size))
        return block

    def _release(self, block: int) -> None:
        if self._sizes[block]:
            self.log.events.append(Event(block, 0))
            self._sizes[block] = 0

    def _forget(self, key: int) -> None:
        self._release(self._blocks.pop(key))

    def _copy_of_collective(self, func: Any, args: tuple) -> None:
        # gloo gathers into one flat tensor, and reduces a clone of its input.
        if func in (c10d._allgather_base_.default, c10d._reduce_scatter_base_.default):
            sent = args[0] if func is c10d._allgather_base_.default else args[1]
            self._release(self.allocate(sent.untyped_storage().nbytes(), 'communication'))


@contextlib.contextmanager
def _watch_resizes(gathered: Any) -> Iterator[None]:
    """FSDP2 frees and refills gathered weights by resizing their storage, which no operator shows."""
    resize = torch.UntypedStorage.resize_

    def watched(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        gathered(storage)
        return result

    torch.UntypedStorage.resize_ = watched
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize
