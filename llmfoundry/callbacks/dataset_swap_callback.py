"""``dataset_swap``: a resumed run that goes on with other data.

Streaming's position in the old data means nothing in the new, so raising ``dataset_index`` drops it and begins the epoch anew. Weights, optimizer, schedule and the
counts of batches and tokens go on.
"""

from __future__ import annotations

import datetime
import logging
from typing import Any

from composer.core import State
from composer.loggers import Logger

from llmfoundry.callbacks.train_loader_swap import rewind
from llmfoundry.errors import ConfigError, ConfigProblem
from llmfoundry.experimental import experimental_class
from llmfoundry.interfaces.callback_with_config import CallbackWithConfig

__all__ = ['DatasetSwap']

log = logging.getLogger(__name__)


@experimental_class('DatasetSwap')
class DatasetSwap(CallbackWithConfig):
    """Restarts the epoch with the data of this config when ``dataset_index`` is higher than in the checkpoint.

    Args:
        train_config: the config of the run.
        dataset_index: counts the data sets of the run: 0 for the first, one more each time that ``train_loader.dataset`` is changed.

    Raises:
        ConfigError: (a ValueError) a negative index; when loading, an index lower than the checkpoint's, or the same index with another data set.
    """

    def __init__(self, train_config: dict[str, Any], dataset_index: int) -> None:
        super().__init__(train_config)
        if dataset_index < 0:
            raise ConfigError([ConfigProblem('callbacks.dataset_swap.dataset_index', f'must be 0 or more, got {dataset_index}')])
        self.dataset_index = dataset_index
        self.dataset = (train_config.get('train_loader') or {}).get('dataset')
        self._swaps = False

    def state_dict(self) -> dict[str, Any]:
        return {'dataset_index': self.dataset_index, 'dataset': self.dataset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before = state['dataset_index']
        path = 'callbacks.dataset_swap.dataset_index'
        if self.dataset_index < before:
            raise ConfigError([ConfigProblem(path, f'{self.dataset_index} is lower than that of the checkpoint, {before}. Raise it with each new data set, never lower it.')])
        self._swaps = self.dataset_index > before
        if not self._swaps and state.get('dataset') != self.dataset:
            raise ConfigError([ConfigProblem(path, f'{self.dataset_index} is that of the checkpoint, but train_loader.dataset has changed. Set it to {before + 1} to begin the epoch anew with the new data, or restore the block.')])

    def after_load(self, state: State, logger: Logger) -> None:
        del logger
        if not self._swaps:
            return
        self._swaps = False
        state.timestamp = state.timestamp.copy(batch_in_epoch=0, sample_in_epoch=0, token_in_epoch=0, epoch_wct=datetime.timedelta(0))
        rewind(state.train_dataloader.dataset)
        log.info('dataset_swap: data set %d from batch %d on; the epoch begins anew', self.dataset_index, int(state.timestamp.batch))
