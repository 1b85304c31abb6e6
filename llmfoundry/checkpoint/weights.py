"""Writes weights as safetensors, one shard in memory at a time, and finds the ones that a model shares.

``save_pretrained`` needs the whole model in memory in the output precision; a 30B checkpoint then needs more memory than its own size. Here shards are planned from
shapes, and each is filled, written and dropped before the next.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Mapping

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from llmfoundry.checkpoint.reader import LazyTensor
from llmfoundry.errors import CheckpointError

__all__ = ['DTYPES', 'cast', 'drop_tied', 'parse_size', 'plan_shards', 'write_safetensors']

DTYPES = {
    'fp32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16,
    'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16,
}
_UNITS = {'': 1, 'B': 1, 'KB': 10**3, 'MB': 10**6, 'GB': 10**9, 'TB': 10**12, 'KIB': 2**10, 'MIB': 2**20, 'GIB': 2**30, 'TIB': 2**40}
_LIST_AT_MOST = 8


def parse_size(size: str | int) -> int:
    """Bytes of ``'5GB'``, ``'200 MiB'`` or a number.

    Raises:
        ValueError: another form, or not positive.
    """
    match = re.fullmatch(r'\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*', str(size))
    if match is None or match.group(2).upper() not in _UNITS or float(match.group(1)) <= 0:
        raise ValueError(f"max_shard_size: {size!r} is not a size; write a positive number and a unit, such as '5GB' or '500MiB'")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in ``dtype`` if it is a floating-point one, contiguous.

    Raises:
        CheckpointError: a finite value does not fit the range of fp16.
    """
    tensor = tensor.detach()
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor.contiguous()
    converted = tensor.to(dtype).contiguous()
    if dtype == torch.float16 and not torch.isfinite(converted).all() and torch.isfinite(tensor).all():
        raise CheckpointError(f'{name!r} holds {tensor.abs().max().item():.4g}, beyond the largest fp16 number 65504; export in bf16 or fp32')
    return converted


def drop_tied(model: nn.Module, weights: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The weights without the second names of parameters that the model shares (``lm_head.weight`` of a tied model).

    Args:
        model: the model of the export, already tied; may be on the meta device.

    Raises:
        CheckpointError: two names that the model shares hold different values.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    kept = dict(weights)
    for names in groups.values():
        present = [n for n in names if n in kept]
        for name in present[1:]:
            first, second = kept[present[0]], kept[name]
            same = first.storage is not None and first.storage == second.storage
            if not same and not torch.equal(first.load(), second.load()):
                raise CheckpointError(f'{present[0]!r} and {name!r} are one tensor in this model, but the checkpoint holds different values; was tie_word_embeddings changed?')
            del kept[name]
    return kept


def plan_shards(bytes_by_name: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names grouped in order so that each group is at most ``max_shard_bytes``, or holds one tensor that is larger."""
    shards: list[list[str]] = []
    room = 0
    for name, size in bytes_by_name.items():
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def write_safetensors(folder: Path, weights: Mapping[str, LazyTensor], dtype: torch.dtype, max_shard_size: str | int = '5GB') -> list[Path]:
    """Writes ``model.safetensors``, or numbered shards and their index, into ``folder``; returns the files of weights."""
    sizes = {n: w.numel * (dtype if w.dtype.is_floating_point else w.dtype).itemsize for n, w in weights.items()}
    shards = plan_shards(sizes, parse_size(max_shard_size))
    total = len(shards)
    written, weight_map = [], {}
    with tqdm(total=sum(sizes.values()), unit='B', unit_scale=True, desc='Writing weights', disable=None) as progress:
        for i, names in enumerate(shards, start=1):
            path = folder / ('model.safetensors' if total == 1 else f'model-{i:05d}-of-{total:05d}.safetensors')
            tensors = {n: cast(n, weights[n].load(), dtype) for n in names}
            save_file(_unshared(tensors), path, metadata={'format': 'pt'})
            written.append(path)
            weight_map.update(dict.fromkeys(names, path.name))
            progress.update(sum(sizes[n] for n in names))
    if total > 1:
        index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map}
        (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')
    return written


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies tensors that share memory with another or are views of a larger one, which safetensors refuses."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        is_view = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
        separate[name] = tensor.clone() if is_view or pointer in seen else tensor
        seen.add(pointer)
    return separate


def name_list(names: list[str]) -> str:
    """Up to eight names, and how many more there are."""
    more = f' and {len(names) - _LIST_AT_MOST} more' if len(names) > _LIST_AT_MOST else ''
    return ', '.join(names[:_LIST_AT_MOST]) + more
