"""From the `dataset` block of a loader to the arguments of a StreamingDataset.

StreamingDataset has about 30 arguments and Stream ten; they are passed through under their own names, checked against the signatures that the installed Streaming
has, so a new release needs no change here. Retyping them (as public releases did) loses whatever is not in the copy, silently.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import logging
import os
import tempfile
from typing import Any, Iterable, Mapping

from streaming import Stream, StreamingDataset
from streaming.base.shuffle import algos as shuffle_algos

from llmfoundry import dist
from llmfoundry.errors import ConfigError, ConfigProblem

__all__ = [
    'DEFAULT_NUM_CANONICAL_NODES', 'DEFAULT_SHUFFLE_BLOCK_SIZE', 'build_streams', 'default_cache_folder', 'is_local_only', 'order_problems', 'streaming_argument_names', 'stream_argument_names', 'unknown_key_problems',
    'validate_ds_replication', 'with_order_defaults',
]

log = logging.getLogger(__name__)

# Streaming's own default is the number of nodes, so the same YAML would give another order on another cluster. 1 is the only value that every
# number of nodes is a multiple of, and it keeps unshuffled data in the order in which they were written. Its cost: every node downloads every shard once; with a remote and
# many nodes, set it to the number of nodes.
DEFAULT_NUM_CANONICAL_NODES = 1
# Samples that are shuffled together. Streaming derives it from num_canonical_nodes; written down so that it is the same for all of them.
DEFAULT_SHUFFLE_BLOCK_SIZE = 1 << 18


def _argument_names(cls: type) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(cls.__init__).parameters if name != 'self')


def streaming_argument_names() -> tuple[str, ...]:
    """Arguments of the installed StreamingDataset."""
    return _argument_names(StreamingDataset)


def stream_argument_names() -> tuple[str, ...]:
    """Arguments of the installed Stream."""
    return _argument_names(Stream)


def unknown_key_problems(given: Iterable[str], known: Iterable[str], where: str) -> list[ConfigProblem]:
    """One problem for each key of ``given`` that is not in ``known``, with the nearest known one."""
    known = sorted(known)
    problems = []
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f'did you mean {near[0]!r}?' if near else f'known: {", ".join(known)}'
            problems.append(ConfigProblem(f'{where}.{key}', f'unknown key ({hint})'))
    return problems


def build_streams(streams: Mapping[str, Mapping[str, Any]], where: str = 'dataset.streams') -> list[Stream]:
    """One Stream for each entry of a `streams` block, in its order.

    Args:
        streams: name -> arguments of Stream (``local``, ``remote``, ``split``, ``proportion``, ``repeat``, ``choose``, ...).
        where: path of the block in error messages.

    Raises:
        ConfigError: (a ValueError) unknown keys, or values that Stream refuses.
    """
    if not isinstance(streams, Mapping) or not streams:
        raise ConfigError([ConfigProblem(where, f'expected a mapping of stream names to their settings, got {streams!r}')])
    problems: list[ConfigProblem] = []
    built = []
    for name, settings in streams.items():
        path = f'{where}.{name}'
        if not isinstance(settings, Mapping):
            problems.append(ConfigProblem(path, f'expected a mapping such as {{local: ..., split: train}}, got {settings!r}'))
            continue
        unknown = unknown_key_problems(settings, stream_argument_names(), path)
        problems += unknown
        if not unknown and not (settings.get('local') or settings.get('remote')):
            problems.append(ConfigProblem(path, 'needs `local`, `remote` or both'))
        elif not unknown:
            try:
                built.append(Stream(**with_cache_folder(settings)))
            except ValueError as e:
                problems.append(ConfigProblem(path, str(e)))
    if problems:
        raise ConfigError(problems)
    return built


def default_cache_folder(remote: str) -> str:
    """Where shards of ``remote`` are kept when no ``local`` is given: one folder per remote and user, reused by later runs."""
    name = hashlib.blake2s(remote.encode(), digest_size=8).hexdigest()
    return os.path.join(tempfile.gettempdir(), f'llmfoundry-cache-{os.getuid()}', name)


def with_cache_folder(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Fills in ``local`` where only ``remote`` is given. Streaming's own temporary folder stops the next run with a FileExistsError."""
    filled = dict(arguments)
    if filled.get('remote') and not filled.get('local'):
        filled['local'] = default_cache_folder(filled['remote'])
        log.info('No `local` given for %s: its shards are kept in %s', filled['remote'], filled['local'])
    return filled


def is_local_only(remote: str | None, local: str | None) -> bool:
    """Whether all files must be in ``local`` already."""
    return remote is None or (local is not None and os.path.abspath(local) == (remote if '://' in remote else os.path.abspath(remote)))


def with_order_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Fills in what the order of samples depends on, where the user left it out, so that it does not depend on the machine."""
    filled = dict(arguments)
    if filled.get('num_canonical_nodes') is None:
        filled['num_canonical_nodes'] = DEFAULT_NUM_CANONICAL_NODES
    block = filled.get('shuffle_block_size')
    if block is None:
        filled['shuffle_block_size'] = DEFAULT_SHUFFLE_BLOCK_SIZE
    elif isinstance(block, float):
        if block != int(block):
            raise ConfigError([ConfigProblem('dataset.shuffle_block_size', f'{block} is not a whole number of samples')])
        filled['shuffle_block_size'] = int(block)
    return filled


def order_problems(arguments: Mapping[str, Any], num_nodes: int | None = None) -> list[ConfigProblem]:
    """Settings of the order that Streaming refuses only in a worker, at the first sample.

    Args:
        arguments: arguments of StreamingDataset, after ``with_order_defaults``.
        num_nodes: number of machines; of this run by default.
    """
    problems = []
    algo = arguments.get('shuffle_algo', 'py1e')
    if algo not in shuffle_algos:
        problems.append(ConfigProblem('dataset.shuffle_algo', f'must be one of {", ".join(sorted(shuffle_algos))}, got {algo!r}'))
    nodes = num_nodes or max(1, dist.get_world_size() // dist.get_local_world_size())
    canonical = arguments['num_canonical_nodes']
    if not isinstance(canonical, int) or canonical < 1:
        problems.append(ConfigProblem('dataset.num_canonical_nodes', f'must be a whole number of at least 1, got {canonical!r}'))
    elif canonical % nodes and nodes % canonical:
        problems.append(ConfigProblem('dataset.num_canonical_nodes', f'{canonical} must divide the number of nodes, {nodes}, or be a multiple of it'))
    return problems


def validate_ds_replication(dataset_cfg: Mapping[str, Any], tokenizer: Any, device_batch_size: int | float) -> tuple[int, int]:
    """Registry entry ``dataset_replication_validator``: how many neighbouring ranks read the same samples, and the batch size of the dataset.

    Args:
        dataset_cfg: the `dataset` block; ``seq_parallel_replication`` may be in it.
        tokenizer: not used; validators of plug-ins may.
        device_batch_size: samples per device.

    Returns:
        ``(replication, dataset_batch_size)``.

    Raises:
        NotImplementedError: sequence parallelism, which text data do not support.
        ValueError: a batch size that is not whole.
    """
    replication = dataset_cfg.get('seq_parallel_replication') or 1
    if replication != 1:
        raise NotImplementedError(f'dataset.seq_parallel_replication is {replication}, but text data cannot be read in sequence parallel. Leave it out')
    if device_batch_size != int(device_batch_size):
        raise ValueError(f'the device batch size must be a whole number of samples, got {device_batch_size}. Choose global_train_batch_size as a multiple of the number of devices')
    return 1, int(device_batch_size)
