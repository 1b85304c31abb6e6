"""Ends a process that hangs after training has finished (in an upload or a collective that nobody answers), so that its GPUs are given back."""

from __future__ import annotations

import logging
import os
import signal
import threading

from composer.core import Callback, State
from composer.loggers import Logger

from llmfoundry import phases

__all__ = ['RunTimeoutCallback']

log = logging.getLogger(__name__)

_UNHEARD_S = 10.0


class RunTimeoutCallback(Callback):
    """Sends SIGINT to its own process when that has not ended in time after the last batch.

    The training command's watchdog ends one that waits in native code, where SIGINT is not heard, a few seconds later, and leaves its stacks.

    Args:
        timeout: seconds from the end of training.

    Raises:
        ValueError: a timeout that is not positive.
    """

    def __init__(self, timeout: int = 1800) -> None:
        if timeout <= 0:
            raise ValueError(f'run_timeout.timeout must be a positive number of seconds, got {timeout}')
        self.timeout = timeout
        self.timer: threading.Timer | None = None

    def fit_end(self, state: State, logger: Logger) -> None:
        del state, logger
        if self.timer is not None:
            self.timer.cancel()
        phases.limits['end'] = self.timeout + _UNHEARD_S
        self.timer = threading.Timer(self.timeout, self._interrupt)
        # A process that ends in time is not kept alive by its own alarm.
        self.timer.daemon = True
        self.timer.start()

    def _interrupt(self) -> None:
        log.error('run_timeout: the process has not ended %s s after the end of training; interrupting it.', self.timeout)
        os.kill(os.getpid(), signal.SIGINT)
