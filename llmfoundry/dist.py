"""Ranks, barriers and process-group start: the only home of rank logic.

Reads the launcher's environment variables without importing torch, so that config code may ask for the world size.
"""

from __future__ import annotations

import os


def _env_int(name: str, default: int) -> int:
    return int(os.environ.get(name) or default)


def get_world_size() -> int:
    """Number of processes in the run: from the process group if there is one, else what the launcher promised, else 1."""
    return _env_int('WORLD_SIZE', 1)


def get_global_rank() -> int:
    """Index of this process in the run, 0-based."""
    return _env_int('RANK', 0)


def get_local_rank() -> int:
    """Index of this process on its node, 0-based."""
    return _env_int('LOCAL_RANK', 0)


def get_local_world_size() -> int:
    """Number of processes on this node."""
    return _env_int('LOCAL_WORLD_SIZE', 1)


def get_node_rank() -> int:
    """Index of this node, 0-based."""
    return _env_int('NODE_RANK', 0)
