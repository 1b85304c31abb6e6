"""Remembers in the checkpoint which microbatch ``auto`` found.

A resumed run that searched again on a machine with other free memory could find another size, and its losses would differ from the uninterrupted run's in
the last bits. So the size is kept for as long as the device batch is the same.
"""

from __future__ import annotations

from typing import Any

from composer.core import Callback

__all__ = ['MicrobatchMemory']


class MicrobatchMemory(Callback):
    """Holds the microbatch found for a device batch.

    Args:
        device_batch_size: samples per process and step of this run.
    """

    def __init__(self, device_batch_size: int | float) -> None:
        self.device_batch_size = device_batch_size
        self.size: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {'device_batch_size': self.device_batch_size, 'size': self.size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get('device_batch_size') == self.device_batch_size:
            self.size = state.get('size')
