"""One rank of a training run through our ``train``, which afterwards writes what it took: peak memory, and the seconds of each step.

    composer -n 2 run_worker.py CONFIG.yaml OUT_FOLDER [key=value ...]

Memory is the kernel's high-water mark of this very process (VmHWM), from its first import on. The resource module's maximum would not do: it is inherited from the launcher.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from measure import peak_rss_bytes


def main() -> None:
    """Trains as the command line does, with one callback more."""
    from llmfoundry.command_utils import host_memory

    host_memory.ask_for_huge_pages()
    from composer import Callback

    from llmfoundry import dist
    from llmfoundry.command_utils import train_parts
    from llmfoundry.command_utils.train import train
    from llmfoundry.config.load import load_train_config

    class Clock(Callback):
        """Ends of steps, and the peak so far at each."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.peaks: list[int] = []

        def fit_start(self, state, logger) -> None:
            self.began, self.fit_start_peak = time.perf_counter(), peak_rss_bytes()

        def batch_end(self, state, logger) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.began)
            self.began = now
            self.peaks.append(peak_rss_bytes())

    clock = Clock()
    build_callbacks = train_parts.build_callbacks
    train_parts.build_callbacks = lambda *args: [*build_callbacks(*args), clock]
    import_peak = peak_rss_bytes()
    trainer = train(load_train_config(sys.argv[1], sys.argv[3:]))
    import torch

    rank = dist.get_global_rank()
    figures = {
        'rank': rank, 'peak_bytes': peak_rss_bytes(), 'import_peak_bytes': import_peak, 'fit_start_peak_bytes': clock.fit_start_peak, 'step_peak_bytes': clock.peaks,
        'step_seconds': clock.seconds, 'threads': torch.get_num_threads(), 'loss': float(trainer.state.loss) if not isinstance(trainer.state.loss, dict) else None,
    }
    Path(sys.argv[2], f'rank{rank}.json').write_text(json.dumps(figures))
    trainer.close()


if __name__ == '__main__':
    main()
