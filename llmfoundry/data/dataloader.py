"""From a dataset to what Composer trains on: the torch loader, the DataSpec around it, and the choice of loader by name.

The loader is Streaming's, so that a checkpoint in the middle of an epoch resumes at the next sample. An error about the data that happens in a worker process arrives
as its own one text, instead of inside torch's traceback of the worker.
"""

from __future__ import annotations

import logging
import os
import re
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping

import torch
from composer.core import DataSpec
from streaming import StreamingDataLoader
from torch.utils.data import DataLoader

from llmfoundry.data.batch_stats import get_tokens_per_batch_func
from llmfoundry.data.elastic_streaming import ElasticStreamingDataset
from llmfoundry.data.sample_ids import without_sample_ids
from llmfoundry.errors import DataError
from llmfoundry.registry import construct_from_registry, dataloaders

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ['TextDataLoader', 'build_dataloader', 'get_data_spec', 'loader_arguments']

log = logging.getLogger(__name__)
_DATA_ERROR_IN_TRACEBACK = re.compile(r'^llmfoundry\.\S*Error: ', re.MULTILINE)


class TextDataLoader(StreamingDataLoader):
    """StreamingDataLoader whose data errors read the same with and without workers, and whose length does not depend on the number of ranks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._owner_pid = os.getpid()

    def __len__(self) -> int:
        length = super().__len__()
        return self.dataset.num_batches if isinstance(self.dataset, ElasticStreamingDataset) and self.dataset.is_elastic else length

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from super().__iter__()
        except DataError as e:
            own_text = _DATA_ERROR_IN_TRACEBACK.split(str(e))[-1].strip()
            raise DataError(own_text) from None

    def __del__(self) -> None:
        # Streaming's version fails noisily when the constructor failed, and in a worker process that inherited the object.
        if getattr(self, '_owner_pid', None) == os.getpid():
            super().__del__()


def loader_arguments(num_workers: int, pin_memory: bool, prefetch_factor: int | None, persistent_workers: bool, timeout: float) -> dict[str, Any]:
    """Arguments of a torch DataLoader that suit ``num_workers``.

    torch refuses ``prefetch_factor``, ``persistent_workers`` and ``timeout`` without workers, although they then mean nothing; so that one changed key (``num_workers: 0``)
    is enough to debug a YAML, they are left out.

    torch draws a seed for the workers whenever a loader is read from its start, from the generator of dropout unless the loader has one of its own. How often that happens depends on
    persistent workers and on evaluations, and dropout would with it; so it gets one.
    """
    if num_workers < 0:
        raise ValueError(f'num_workers must be 0 (load in the training process) or more, got {num_workers}')
    arguments: dict[str, Any] = {'num_workers': num_workers, 'pin_memory': pin_memory, 'generator': torch.Generator().manual_seed(torch.initial_seed() % 2**63)}
    if num_workers > 0:
        arguments.update(prefetch_factor=prefetch_factor, persistent_workers=persistent_workers, timeout=timeout)
    else:
        log.debug('num_workers is 0: prefetch_factor, persistent_workers and timeout have no effect')
    return arguments


def get_data_spec(dl: DataLoader, dataset_cfg: Mapping[str, Any]) -> DataSpec:
    """Registry entry ``data_spec``: a DataSpec that counts all tokens and those in the loss.

    Args:
        dl: the loader.
        dataset_cfg: the `dataset` block; not used here, but plug-ins may.
    """
    # Left out, Composer fills in methods of the DataSpec itself. In that reference cycle the garbage collector closes the workers' queues before the loader can
    # tell the workers to stop, and every loader takes 5 s per worker to go away.
    return DataSpec(
        dataloader=dl,
        batch_transforms=_unchanged,
        microbatch_transforms=without_sample_ids,
        get_num_samples_in_batch=_num_rows,
        get_num_tokens_in_batch=get_tokens_per_batch_func(),
    )


def _unchanged(batch: Any) -> Any:
    return batch


def _num_rows(batch: Mapping[str, Any]) -> int:
    return len(next(iter(batch.values())))


def build_dataloader(cfg: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, device_batch_size: int | float) -> DataSpec:
    """Builds the loader that a `train_loader` or `eval_loader` block describes. The block is not changed.

    Args:
        cfg: ``name`` and the arguments of the loader of that name.
        tokenizer: the tokenizer.
        device_batch_size: samples per device and step.
    """
    kwargs: dict[str, Any] = {**cfg, 'tokenizer': tokenizer, 'device_batch_size': device_batch_size}
    name = kwargs.pop('name', None)
    if name is None:
        raise ValueError(f'the loader has no name; choose one of {", ".join(dataloaders.names())}')
    build: Callable[..., DataSpec] = construct_from_registry(name, dataloaders, partial_function=True, kwargs=kwargs)
    return build()
