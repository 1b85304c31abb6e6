"""The command line of training: ``train.py CONFIG.yaml [key=value ...]``.

The config is read and checked before torch and Composer are imported, so that a typo is reported within two seconds. Everything runs under a ``Guard``, so that whatever ends the run leaves
its cause behind.
"""

from __future__ import annotations

import sys
from typing import Sequence

from llmfoundry import dist
from llmfoundry.command_utils import host_memory
from llmfoundry.command_utils.incidents.guard import Guard
from llmfoundry.config.load import load_train_config
from llmfoundry.typed_registry import resolve_target

__all__ = ['main']

TRAIN = 'llmfoundry.command_utils.train:train'
USAGE = 'usage: train.py CONFIG.yaml [key=value ...]\nexample: composer train.py yamls/pretrain/mpt-125m.yaml train_loader.dataset.split=train_small'
USAGE_EXIT_CODE = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Trains; prints explained errors without a traceback and exits with code 1, or 2 when no config is named.

    Args:
        argv: the arguments, by default those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ('-h', '--help'):
        print(USAGE, file=sys.stderr if not arguments else sys.stdout)
        sys.exit(0 if arguments else USAGE_EXIT_CODE)
    dist.complete_environment()
    host_memory.ask_for_huge_pages()
    with Guard() as guard:
        cfg = guard.run(lambda: load_train_config(arguments[0], arguments[1:]))
        guard.watch(cfg.save_folder, cfg.run_name, cfg.dist_timeout)
        guard.run(lambda: resolve_target(TRAIN)(cfg))
