"""Which modules are recomputed in the backward pass instead of kept (``activation_checkpointing_target``), and which ones FSDP shards as a unit.

Parsing is pure: target -> {module name: block indices}. The choice is then written as an attribute on the chosen modules, since Composer asks
module by module and a module does not know its block. Attributes survive ``deepcopy`` and sharding, a set of ids would not.
"""

from __future__ import annotations

import re
from typing import Any, Iterable, Mapping, Sequence

from torch import nn

from llmfoundry.layers_registry import attention_classes, ffns, ffns_with_megablocks, ffns_with_norm, norms

__all__ = [
    'mark_activation_checkpointing',
    'parse_activation_checkpointing_target',
    'parse_target_blocks',
    'should_checkpoint',
    'should_wrap_fsdp',
]

Target = str | Sequence[str] | Mapping[str, Any] | None

_MARK = '_recompute_activations'
_RANGE = re.compile(r'(first|last|middle)-(\d+)|range-(\d+)-(\d+)')
_KEY = 'activation_checkpointing_target'


def parse_target_blocks(target_blocks: Any, n_layers: int, path: str = _KEY) -> list[int]:
    """Returns the ascending block indices that a value of the dict form names.

    Args:
        target_blocks: n (the first n blocks), or ``first-n``, ``last-n``, ``middle-n``, ``range-i-j`` (blocks i to j - 1), or several of these joined
            by commas, or a list of block indices and such strings. n beyond the depth means every block.
        n_layers: number of blocks.
        path: key path for error texts.

    Raises:
        ValueError: anything else, or a block index that does not exist.
    """
    if isinstance(target_blocks, bool):
        raise _blocks_error(target_blocks, path)
    if isinstance(target_blocks, int):
        return _span('first', target_blocks, n_layers)
    if isinstance(target_blocks, str):
        target_blocks = [part.strip() for part in target_blocks.split(',')]
    elif not isinstance(target_blocks, Sequence):
        raise _blocks_error(target_blocks, path)
    blocks: set[int] = set()
    for item in target_blocks:
        blocks.update(_parse_item(item, n_layers, path))
    return sorted(blocks)


def _parse_item(item: Any, n_layers: int, path: str) -> list[int]:
    if isinstance(item, int) and not isinstance(item, bool):
        if not 0 <= item < n_layers:
            raise ValueError(f'{path}: block {item} does not exist, the model has blocks 0 to {n_layers - 1}')
        return [item]
    if isinstance(item, str) and ',' in item:
        return parse_target_blocks(item, n_layers, path)
    match = _RANGE.fullmatch(item) if isinstance(item, str) else None
    if match is None:
        raise _blocks_error(item, path)
    kind, count, start, end = match.groups()
    if kind is not None:
        return _span(kind, int(count), n_layers)
    if int(end) > n_layers or int(start) >= int(end):
        raise ValueError(f'{path}: {item!r} must name blocks i to j - 1 with 0 <= i < j <= {n_layers} (the number of layers)')
    return list(range(int(start), int(end)))


def _span(kind: str, count: int, n_layers: int) -> list[int]:
    """``count`` blocks at the start, end or middle, at most all of them."""
    count = max(0, min(count, n_layers))
    start = {'first': 0, 'last': n_layers - count, 'middle': (n_layers - count) // 2}[kind]
    return list(range(start, start + count))


def _blocks_error(value: Any, path: str) -> ValueError:
    return ValueError(f'{path}: blocks must be a number n, a list of block indices, first-n, last-n, middle-n or range-i-j, got {value!r}')


def _known_names() -> list[str]:
    return ['mptblock', 'norm_attn_norm', 'ffn', *attention_classes.names(), *_ffn_names(), *norms.names()]


def _ffn_names() -> list[str]:
    return [*ffns.names(), *ffns_with_norm.names(), *ffns_with_megablocks.names()]


def parse_activation_checkpointing_target(target: Target, n_layers: int) -> dict[str, list[int]]:
    """Returns {module name: ascending indices of the blocks in which it is checkpointed}.

    Args:
        target: None or empty (whole blocks), a name, a list of names (in every block), or a dict of name and blocks as ``parse_target_blocks`` takes them.
        n_layers: number of blocks.

    Raises:
        ValueError: an unknown name, blocks that cannot be read, or a block that two names of a dict share. A module that contains another one
            (``mptblock`` and anything) cannot be listed with it either: its activations would be recomputed twice.
    """
    if not target:
        return {'mptblock': list(range(n_layers))}
    if isinstance(target, str):
        target = [target]
    if isinstance(target, Mapping):
        parsed = {name.lower(): parse_target_blocks(blocks, n_layers, f'{_KEY}.{name}') for name, blocks in target.items()}
    else:
        parsed = {name.lower(): list(range(n_layers)) for name in target}
    for name in parsed:
        if name not in _known_names():
            raise ValueError(f'{_KEY}: unknown module {name!r}. Available: {", ".join(_known_names())}')
    if isinstance(target, Mapping):
        _check_overlap(parsed)
    elif 'mptblock' in parsed and len(parsed) > 1:
        raise ValueError(f'{_KEY}: mptblock contains {", ".join(name for name in parsed if name != "mptblock")}; list one or the other')
    return parsed


def _check_overlap(parsed: Mapping[str, Iterable[int]]) -> None:
    owner: dict[int, str] = {}
    for name, blocks in parsed.items():
        for block in blocks:
            if block in owner:
                raise ValueError(f'{_KEY}: block {block} is named by both {owner[block]!r} and {name!r}; each block may have one target')
            owner[block] = name


def _matches(name: str, block: nn.Module) -> list[nn.Module]:
    """The modules of one block that ``name`` stands for."""
    if name == 'mptblock':
        return [block]
    if name == 'norm_attn_norm':
        # The three modules one by one: a module around them would change the names of released weights. Only their two short outputs are kept more.
        return [module for part in ('norm_1', 'attn', 'norm_2') if (module := getattr(block, part, None)) is not None]
    if name == 'ffn' or name in _ffn_names():
        return [module for path, module in block.named_modules() if path.rpartition('.')[2] == 'ffn']
    cls = attention_classes.get(name) if name in attention_classes else norms.get(name)
    return [module for module in block.modules() if isinstance(cls, type) and isinstance(module, cls)]


def mark_activation_checkpointing(blocks: Sequence[nn.Module], target: Target) -> None:
    """Marks the modules that ``should_checkpoint`` then answers True for. Earlier marks are removed.

    Args:
        blocks: the transformer blocks in order.
        target: as ``parse_activation_checkpointing_target`` takes it.

    Raises:
        ValueError: as there, or a name that no module of its blocks answers to.
    """
    parsed = parse_activation_checkpointing_target(target, len(blocks))
    for block in blocks:
        for module in block.modules():
            module.__dict__.pop(_MARK, None)
    for name, indices in parsed.items():
        for index in indices:
            chosen = _matches(name, blocks[index])
            if not chosen:
                raise ValueError(f'{_KEY}: block {index} ({type(blocks[index]).__name__}) has no module {name!r}, so nothing of it would be checkpointed')
            for module in chosen:
                setattr(module, _MARK, True)


def should_checkpoint(module: nn.Module) -> bool:
    """The answer of a model's ``activation_checkpointing_fn(module)``."""
    return bool(getattr(module, _MARK, False))


def should_wrap_fsdp(module: nn.Module, block_cls: type[nn.Module]) -> bool | dict[str, Any]:
    """The answer of a model's ``fsdp_wrap_fn(module)``: its blocks, and what asks for it by ``_fsdp_wrap`` or ``_fsdp_kwargs_dict``.

    Returns:
        A bool, or the dict of FSDP arguments that the module brings.
    """
    if hasattr(module, '_fsdp_kwargs_dict'):
        return module._fsdp_kwargs_dict
    if hasattr(module, '_fsdp_wrap'):
        return bool(module._fsdp_wrap)
    return isinstance(module, block_cls)
