"""Reads the files that the ``jsonl`` logger writes, without Composer."""

from __future__ import annotations

import json
import os
from pathlib import Path

__all__ = ['read_metrics']


def read_metrics(path: str | os.PathLike, key: str) -> list[tuple[int, float]]:
    """(step, value) pairs of one metric, in order of step; of a step that was trained twice, the later value. A torn last line is ignored."""
    points: dict[int, float] = {}
    for line in Path(path).read_text(encoding='utf-8').splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if key in row:
            points[int(row['step'])] = row[key]
    return sorted(points.items())
