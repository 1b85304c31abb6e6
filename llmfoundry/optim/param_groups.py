"""Which parameters an optimizer trains, and with which settings: the keys ``disable_grad`` and ``param_groups`` of the optimizer block.

Patterns are regular expressions, searched for anywhere in the parameter's name.
"""

from __future__ import annotations

import re
from typing import Any, Iterable, Mapping, Sequence

import torch

__all__ = ['build_param_groups', 'disable_grad', 'split_param_groups']

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]


def _compile(pattern: Any, path: str) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise ValueError(f'{path}: a regular expression is expected, got {pattern!r}')
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ValueError(f'{path}: {pattern!r} is not a regular expression: {e}') from e


def _no_match(path: str, pattern: str, names: Sequence[str]) -> ValueError:
    return ValueError(f'{path}: {pattern!r} is found in no parameter name, so it would do nothing. Names look like {", ".join(names[:3])}')


def disable_grad(named_parameters: NamedParameters, patterns: str | Sequence[str]) -> list[str]:
    """Sets ``requires_grad`` to False for parameters whose name a pattern is found in.

    Args:
        named_parameters: names and parameters of the model.
        patterns: one pattern or several.

    Returns:
        The names of the parameters that were frozen.

    Raises:
        ValueError: not a regular expression, or one that is found nowhere.
    """
    parameters = list(named_parameters)
    frozen: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns):
        compiled = _compile(pattern, 'optimizer.disable_grad')
        hits = [(name, param) for name, param in parameters if compiled.search(name)]
        if not hits:
            raise _no_match('optimizer.disable_grad', pattern, [name for name, _ in parameters])
        for name, param in hits:
            param.requires_grad_(False)
            frozen[name] = None
    return list(frozen)


def split_param_groups(named_parameters: NamedParameters, param_groups: Sequence[Mapping[str, Any]] | None) -> list[torch.nn.Parameter] | list[dict[str, Any]]:
    """Returns what a torch optimizer takes as ``params``.

    A parameter belongs to the first group whose ``param_str_match`` is found in its name. Those of no group form group 0, with the optimizer's own settings.

    Args:
        named_parameters: names and parameters of the model.
        param_groups: dicts of ``param_str_match`` and the settings that the group overrides (lr, weight_decay, ...); None or empty is no groups.

    Returns:
        A list of parameters without ``param_groups``, else a list of groups.

    Raises:
        ValueError: no or a wrong ``param_str_match``, one that is found nowhere or only where an earlier one is, or a ``params`` key.
    """
    parameters = list(named_parameters)
    if not param_groups:
        return [param for _, param in parameters]
    patterns = []
    for i, group in enumerate(param_groups):
        path = f'optimizer.param_groups[{i}]'
        if not isinstance(group, Mapping) or 'param_str_match' not in group:
            raise ValueError(f"{path}: the key 'param_str_match' is missing, got {group!r}")
        if 'params' in group:
            raise ValueError(f"{path}: the key 'params' is filled from 'param_str_match' and cannot be set")
        patterns.append(_compile(group['param_str_match'], f'{path}.param_str_match'))

    members: list[list[torch.nn.Parameter]] = [[] for _ in patterns]
    rest: list[torch.nn.Parameter] = []
    for name, param in parameters:
        owner = next((i for i, pattern in enumerate(patterns) if pattern.search(name)), None)
        (rest if owner is None else members[owner]).append(param)
    for i, params in enumerate(members):
        if not params:
            raise _no_match(f'optimizer.param_groups[{i}].param_str_match', patterns[i].pattern, [name for name, _ in parameters])
    overrides = [{key: value for key, value in group.items() if key != 'param_str_match'} for group in param_groups]
    groups = [{'params': params, **override} for params, override in zip(members, overrides, strict=True)]
    return [{'params': rest}, *groups] if rest else groups


def build_param_groups(
    model: torch.nn.Module,
    disable_grad_patterns: str | Sequence[str] | None = None,
    param_groups: Sequence[Mapping[str, Any]] | None = None,
) -> list[torch.nn.Parameter] | list[dict[str, Any]]:
    """Applies ``disable_grad`` and then ``split_param_groups`` to all parameters of ``model``.

    Frozen parameters stay in their group: optimizers skip what has no gradient, and Composer's tensor parallelism wants all parameters.
    """
    if disable_grad_patterns:
        disable_grad(model.named_parameters(), disable_grad_patterns)
    return split_param_groups(model.named_parameters(), param_groups)
