"""A logger that writes one JSON object per step to a file: the record that plots, tests and shell tools read.

The alternatives are binary (TensorBoard), remote (W&B, MLflow) or text to be parsed again (console). A resumed run appends; lines of steps that are
trained again after a crash come later in the file, so that the last line of a step counts.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

__all__ = ['JSONLLogger']


class JSONLLogger(LoggerDestination):
    """Writes ``{"step": 3, "loss/train/total": 10.2, ...}`` lines on rank 0.

    Args:
        path: file to append to; ``{run_name}`` is replaced. Its folder is created.
    """

    def __init__(self, path: str = '{run_name}-metrics.jsonl') -> None:
        self.path = path
        self._file: Any = None

    def init(self, state: State, logger: Logger) -> None:
        del logger
        if dist.get_global_rank() == 0:
            path = Path(self.path.format(run_name=state.run_name))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open('a', encoding='utf-8')

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        values = {k: v for k, v in ((k, _number(v)) for k, v in metrics.items()) if v is not None}
        if self._file is not None and values:
            # A whole line per write, so that a killed run leaves no half line behind the flush.
            self._file.write(json.dumps({'step': step, **values}) + '\n')
            self._file.flush()

    def close(self, state: State, logger: Logger) -> None:
        del state, logger
        if self._file is not None:
            self._file.close()
            self._file = None


def _number(value: Any) -> float | None:
    """A finite float, or None for what is not a number (JSON has no NaN)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
