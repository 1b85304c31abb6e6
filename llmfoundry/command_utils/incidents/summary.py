"""The one summary of a run that ended badly, from its bundles: who failed first, where, doing what, why, and what to set. Pure functions."""

from __future__ import annotations

import os
from typing import Any, Mapping, Sequence

from llmfoundry.command_utils.incidents import procs
from llmfoundry.command_utils.incidents.classify import classify, first_bundle

__all__ = ['summarize']

_WIDTH = 100
_OTHERS_SHOWN = 8


def summarize(bundles: Sequence[Mapping[str, Any]], memory_killed: bool = False) -> str:
    """A block of some eight lines.

    Args:
        bundles: of one start, at least one.
        memory_killed: the kernel has killed a process for want of memory meanwhile.
    """
    first = first_bundle(bundles)
    cause = classify(bundles, memory_killed)
    fault = min((b['fault'] for b in bundles), key=lambda f: f['time'])
    world = first['world_size']
    name = procs.signal_name(fault['code'])
    who = f'rank {fault["rank"]} of {world} on {fault["host"]}' if world > 1 else f'the process on {fault["host"]}'
    doing = f'after step {first["progress"]["step"]}, in phase {first["phase"]}'
    if fault['rank'] != first['rank']:
        doing = f'noticed by rank {first["rank"]} {doing}'
    lines = [
        ' llmfoundry: this run failed '.center(_WIDTH, '='),
        f'first:   {who}, {doing}; exit code {fault["code"]}' + (f' ({name})' if name else ''),
        f'class:   {cause.kind}',
        f'seen:    {cause.sign}',
        f'to set:  {cause.setting}',
        *_others(bundles, fault['rank']),
        f'bundles: {_folders(bundles)}  (llmfoundry incident {_folders(bundles).split(", ")[0]})',
        '=' * _WIDTH,
    ]
    return '\n'.join(lines)


def _others(bundles: Sequence[Mapping[str, Any]], first: int) -> list[str]:
    others = [b for b in bundles if b['rank'] != first]
    lines = [f'         rank {b["rank"]}: after step {b["progress"]["step"]}, in phase {b["phase"]}' + (f', waiting in {b["waiting_in"].partition(",")[0]}' if b.get('waiting_in') else '') for b in others]
    shown = lines[:_OTHERS_SHOWN] + ([f'         and {len(lines) - _OTHERS_SHOWN} more ranks'] if len(lines) > _OTHERS_SHOWN else [])
    return [f'others: {shown[0][8:]}', *shown[1:]] if shown else []


def _folders(bundles: Sequence[Mapping[str, Any]]) -> str:
    return ', '.join(sorted({os.path.dirname(b['file']) for b in bundles if b.get('file')})) or 'none could be written'
