"""Turns an error that a user can mend into one readable block and an exit code.

A Python traceback of forty frames hides the one line that matters. So errors that name their own cause (config, data, checkpoints, registries) are printed without one; everything
else is a fault of ours or of a library and keeps it. ``LLMFOUNDRY_TRACEBACK=1`` shows tracebacks always.
"""

from __future__ import annotations

import os
import sys
from typing import Callable, TypeVar

from llmfoundry import dist
from llmfoundry.errors import BaseContextualError, CheckpointError, ConfigError, DataError
from llmfoundry.typed_registry import RegistryError

__all__ = ['EXPLAINED_ERRORS', 'exit_code_of', 'format_error', 'run_or_exit']

T = TypeVar('T')

EXPLAINED_ERRORS = (ConfigError, DataError, BaseContextualError, CheckpointError, RegistryError)
# What a command that reads and writes checkpoints raises about its arguments, files and packages.
_MENDABLE_ERRORS = (OSError, RuntimeError, ValueError, ImportError)
TRACEBACK_VARIABLE = 'LLMFOUNDRY_TRACEBACK'


def format_error(error: Exception) -> str:
    """The block that is printed: kind, message, and in which loader it happened."""
    location = getattr(error, 'location', None)
    where = f' in {location}' if location else ''
    rank = f' (rank {dist.get_global_rank()})' if dist.get_world_size() > 1 else ''
    return f'\nERROR{rank}: {type(error).__name__}{where}\n{error}\n(no traceback, since the cause is named above; {TRACEBACK_VARIABLE}=1 shows it)'


def run_or_exit(function: Callable[[], T]) -> T:
    """Calls ``function``; on an explained error prints it to stderr and exits with code 1.

    Raises:
        SystemExit: after an explained error.
    """
    try:
        return function()
    except EXPLAINED_ERRORS as e:
        if os.environ.get(TRACEBACK_VARIABLE, '') not in ('', '0'):
            raise
        print(format_error(e), file=sys.stderr, flush=True)
        sys.exit(1)


def exit_code_of(function: Callable[[], object]) -> int:
    """Calls ``function``; 0, or 1 after an error that a user can mend, which is printed to stderr as one message."""
    try:
        function()
    except _MENDABLE_ERRORS as e:
        print(f'{type(e).__name__}: {e}', file=sys.stderr)
        return 1
    return 0
