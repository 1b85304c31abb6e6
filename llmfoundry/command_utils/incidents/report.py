"""What ``llmfoundry incident`` prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llmfoundry.command_utils.incidents.bundle import read_bundles
from llmfoundry.command_utils.incidents.summary import summarize

__all__ = ['find_folder', 'report']

# Shown apart, as text, and not among the fields.
_LONG_FIELDS = ('error', 'main_stack', 'peers', 'file')


def find_folder(folder: Path) -> Path | None:
    """The folder with bundles: ``folder`` itself, or the newest one below it."""
    if any(folder.glob('rank*.json')):
        return folder
    found = [p for pattern in ('*/rank*.json', 'incidents/*/rank*.json') for p in folder.glob(pattern) if p.parent.name != 'older']
    return max(found, key=lambda p: p.stat().st_mtime).parent if found else None


def report(folder: str, rank: int | None) -> int:
    """Prints the summary, or one rank's bundle.

    Args:
        folder: an incident folder, or a save folder.
        rank: whose bundle to print.

    Returns:
        0, or 1 when nothing was found.
    """
    place = find_folder(Path(folder))
    bundles = read_bundles([place]) if place is not None else []
    if not bundles:
        print(f'{folder}: no bundles (rank*.json) here or in incidents/ below it. A run that ends well leaves none; the summary of one that does not names its folder.', file=sys.stderr)
        return 1
    if rank is None:
        print(summarize(bundles))
        return 0
    chosen = [b for b in bundles if b['rank'] == rank]
    if not chosen:
        print(f'{place}: rank {rank} left no bundle; there are those of {", ".join(str(b["rank"]) for b in bundles)}', file=sys.stderr)
        return 1
    _print_bundle(chosen[0])
    return 0


def _print_bundle(bundle: dict[str, Any]) -> None:
    for name, value in bundle.items():
        if name not in _LONG_FIELDS:
            print(f'{name}: {value if isinstance(value, str) else json.dumps(value)}')
    if bundle['error'] is not None:
        print(f'\n{bundle["error"]["traceback"]}')
    stacks = Path(bundle['file']).with_suffix('.stacks.txt')
    if stacks.exists():
        print(stacks.read_text(encoding='utf-8', errors='replace'))
