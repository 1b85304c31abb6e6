"""Changes what a run trains on while it is running: another loader in the state, and a data set put back to its first sample."""

from __future__ import annotations

from typing import Any

import numpy as np
from composer.core import State
from streaming import StreamingDataset

__all__ = ['release', 'rewind', 'set_train_loader']


def set_train_loader(state: State, loader: Any, subset_num_batches: int = -1) -> None:
    """Trains on ``loader`` from the next epoch or iteration on."""
    state.set_dataloader(loader, 'train', subset_num_batches)
    state.train_dataloader = state.dataloader


def rewind(dataset: Any) -> None:
    """Puts a data set at the first sample of its first epoch, whatever position a checkpoint gave it."""
    if isinstance(dataset, StreamingDataset):
        # Not its own state_dict, which would already hold the seed and the nodes of the checkpoint's data.
        dataset.load_state_dict({
            'epoch': 0, 'sample_in_epoch': 0, 'num_canonical_nodes': dataset.num_canonical_nodes, 'shuffle_seed': dataset.shuffle_seed, 'initial_physical_nodes': None,
        })  # fmt: skip
    elif hasattr(dataset, 'load_state_dict'):
        dataset.load_state_dict(None)


def release(loader: Any) -> None:
    """Ends the workers and threads of a loader that is no longer used, and lets another data set use its folders.

    Streaming frees the folders when the data set is collected; Composer's data spec keeps the first loader of a run alive.
    """
    iterator = getattr(loader, '_iterator', None)
    if hasattr(iterator, '_shutdown_workers'):
        iterator._shutdown_workers()
        loader._iterator = None
    dataset = loader.dataset
    if hasattr(dataset, '_iterator'):
        dataset._iterator.exit()
    if hasattr(dataset, '_locals_shm'):
        dataset._locals_shm.buf[:4] = np.int32(0).tobytes()
