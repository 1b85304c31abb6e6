"""A path to a local checkpoint as a user writes it: what it leads to, and why it cannot be opened."""

from __future__ import annotations

import os

from llmfoundry import dist

__all__ = ['fill_ranks', 'follow', 'unreadable']


def fill_ranks(path: str) -> str:
    """``path`` with Composer's fields for ranks as on rank 0, which writes the checkpoints."""
    for field in ('rank', 'local_rank', 'node_rank'):
        path = path.replace(f'{{{field}}}', '0')
    return path


def follow(path: str) -> str:
    """Where a link, or the ``.symlink`` note that Composer writes in place of one, leads."""
    note = path if path.endswith('.symlink') else f'{path}.symlink'
    if path == note or not os.path.lexists(path):
        with open(note, encoding='utf-8') as f:
            target = f.read().strip()
        return target if os.path.isabs(target) else os.path.join(os.path.dirname(path), os.path.basename(target))
    return os.path.realpath(path)


def unreadable(path: str) -> str | None:
    """Why this rank cannot open ``path``, with what lies beside it; None if it can."""
    where = f'on rank {dist.get_global_rank()} (node {dist.get_node_rank()})'
    if not os.path.lexists(path) and not os.path.isfile(f'{path}.symlink'):
        folder = os.path.dirname(os.path.abspath(path))
        beside = sorted(os.listdir(folder))[:6] if os.path.isdir(folder) else None
        seen = f'{folder!r} does not exist' if beside is None else f'{folder!r} holds {", ".join(map(repr, beside)) or "nothing"}'
        return f'{path!r} does not exist {where}; {seen}. Correct the path; every node must see the file.'
    target = follow(path)
    if not os.path.exists(target):
        return f'{path!r} leads to {target!r}, which does not exist {where}. Name a checkpoint that does.'
    if not os.access(target, os.R_OK):
        return f'{target!r} may not be read by this user {where}. Correct its permissions.'
    return None
