"""What a process tells the others before the first collective, and what follows from all of it.

``gather_facts`` looks at this process; ``compare`` and ``describe`` are pure functions over what all ranks told, so that every message can be tested without a cluster.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import torch

from llmfoundry import dist
from llmfoundry._version import __version__
from llmfoundry.command_utils.save_folder import local_folder
from llmfoundry.config.train import TrainConfig

__all__ = ['CLOCK_BOUND_S', 'LOW_DISK_BYTES', 'Facts', 'compare', 'config_values', 'describe', 'differing_keys', 'gather_facts', 'pack', 'package_versions', 'ranks_text', 'unpack']

Facts = Mapping[str, Any]

PACKAGES = {'composer': 'mosaicml', 'streaming': 'mosaicml-streaming', 'transformers': 'transformers'}
# Signed requests to object stores are refused from 5 minutes on; logs of several nodes cannot be put in order long before that.
CLOCK_BOUND_S = 5.0
LOW_DISK_BYTES = 2 * 1024**3
FULL_DISK_BYTES = 1024**2
MISSING = 'missing'
SHOWN_HOSTS = 16


def gather_facts(cfg: TrainConfig) -> dict[str, Any]:
    """Everything about this process that has to agree with the others, or that an operator wants to see once per node."""
    folder = local_folder(cfg.save_folder, cfg.run_name)
    return {
        'rank': dist.get_global_rank(), 'local_rank': dist.get_local_rank(), 'node_rank': dist.get_node_rank(), 'world_size': dist.get_world_size(),
        'local_world_size': dist.get_local_world_size(), 'host': socket.gethostname(), 'device': device_facts(dist.get_local_rank()), 'disk': disk_facts(folder),
        'versions': package_versions(), 'config': _digest(json.dumps(config_values(cfg), sort_keys=True).encode()), 'indexes': index_digests(cfg),
        'address': dist.gloo_address(),
    }


def package_versions() -> dict[str, str]:
    """Versions of what computes."""
    versions = {'python': '.'.join(map(str, sys.version_info[:3])), 'torch': torch.__version__, 'llmfoundry': __version__}
    for name, distribution in PACKAGES.items():
        try:
            versions[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:  # imported from a source folder
            versions[name] = 'not installed'
    return versions


def device_facts(local_rank: int) -> dict[str, Any]:
    """Kind, name and memory of the device that this process will use; ``count`` is how many of them it can see."""
    if not torch.cuda.is_available():
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
        return {'kind': 'cpu', 'name': f'{os.cpu_count()} cores', 'memory_bytes': memory, 'count': os.cpu_count(), 'id': None}
    count = torch.cuda.device_count()
    if local_rank >= count:
        return {'kind': 'cuda', 'name': 'none', 'memory_bytes': 0, 'count': count, 'id': None}
    properties = torch.cuda.get_device_properties(local_rank)
    identity = getattr(properties, 'uuid', None)
    return {'kind': 'cuda', 'name': properties.name, 'memory_bytes': properties.total_memory, 'count': count, 'id': None if identity is None else str(identity)}


def disk_facts(folder: Path | None) -> dict[str, Any] | None:
    """Free space of the disk that the save folder lies on or will lie on."""
    if folder is None:
        return None
    existing = next((p for p in (folder.absolute(), *folder.absolute().parents) if p.exists()), Path('/'))
    return {'folder': str(folder), 'free_bytes': shutil.disk_usage(existing).free}


def config_values(cfg: TrainConfig) -> dict[str, str]:
    """The resolved config as dotted key -> JSON of the value."""
    return dict(_flat(cfg.to_dict(), ''))


def _flat(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f'{path}.{key}' if path else str(key))
    else:
        yield path, json.dumps(value, default=str, sort_keys=True)


def index_digests(cfg: TrainConfig) -> dict[str, str]:
    """``index.json`` of each local data folder that the loaders name -> its hash, or 'missing'.

    A folder that is only the cache of a remote may be empty on one node and filled on another, so what is missing there says nothing and is left out.
    """
    digests = {}
    loaders = [cfg.train_loader, cfg.eval_loader, *(cfg.eval_loaders or ())]
    for loader in loaders:
        for local, split, remote in _folders((loader or {}).get('dataset') or {}):
            index = Path(local) / (split or '') / 'index.json'
            try:
                digests[str(index)] = _digest(index.read_bytes())
            except FileNotFoundError:
                if remote is None:
                    digests[str(index)] = MISSING
            except OSError as e:
                digests[str(index)] = f'unreadable ({e.strerror})'
    return digests


def _folders(dataset: Mapping[str, Any]) -> Iterator[tuple[str, str | None, str | None]]:
    streams = dataset.get('streams')
    for block in [dataset, *(streams.values() if isinstance(streams, Mapping) else ())]:
        if isinstance(block, Mapping) and isinstance(block.get('local'), str):
            yield block['local'], block.get('split', dataset.get('split')), block.get('remote', dataset.get('remote'))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def compare(reports: Sequence[Facts]) -> tuple[list[str], list[str]]:
    """What stops the run, and what is only worth a warning.

    Args:
        reports: the facts of every rank, in the order of ranks; each with the ``clock`` (seconds) that it read at a common moment.

    Returns:
        Problems and warnings, one sentence or block each.
    """
    problems = [*_disagreements(reports), *_device_problems(reports), *_disk(reports, 0, FULL_DISK_BYTES)]
    return problems, [*_device_warnings(reports), *_disk(reports, FULL_DISK_BYTES, LOW_DISK_BYTES), *_clock_warnings(reports)]


def _disagreements(reports: Sequence[Facts]) -> Iterator[str]:
    yield from _groups(reports, 'WORLD_SIZE', lambda r: r['world_size'], 'Give every node the same WORLD_SIZE (or --world_size).')
    yield from _groups(reports, 'kind of device', lambda r: r['device']['kind'], 'A rank without its GPU cannot join the others: look at the driver and CUDA_VISIBLE_DEVICES of its node.')
    for name in sorted({name for r in reports for name in r['versions']}):
        yield from _groups(reports, f'version of {name}', lambda r, name=name: r['versions'].get(name), 'Install the same versions on every node.')
    yield from _groups(reports, 'resolved config', lambda r: f'hash {r["config"]}', 'Start every node with the same YAML and overrides.')
    for path in sorted({path for r in reports for path in r['indexes']}):
        remedy = 'The nodes would train on different data: copy or download it anew, or name a folder that all nodes share.'
        yield from _groups([r for r in reports if path in r['indexes']], f'data index {path}', lambda r, path=path: r['indexes'][path], remedy)


def _groups(reports: Sequence[Facts], what: str, value: Callable[[Facts], Any], remedy: str) -> Iterator[str]:
    """One problem if the ranks do not all have one value: who says what."""
    found: dict[Any, list[Facts]] = {}
    for report in reports:
        found.setdefault(value(report), []).append(report)
    if len(found) > 1:
        said = '; '.join(f'{v} on {ranks_text(group)}' for v, group in found.items())
        yield f'{what}: {said}. {remedy}'


def _device_problems(reports: Sequence[Facts]) -> Iterator[str]:
    owners: dict[tuple[str, str], list[Facts]] = {}
    for report in reports:
        device = report['device']
        if device['kind'] == 'cuda' and report['local_rank'] >= device['count']:
            yield f'device: {ranks_text([report])} is local rank {report["local_rank"]} but sees {device["count"]} GPU(s). Start as many processes per node as it has GPUs (composer -n).'
        if device['id'] is not None:
            owners.setdefault((report['host'], device['id']), []).append(report)
    for (_, identity), group in owners.items():
        if len(group) > 1:
            yield f'device: {ranks_text(group)} use the same GPU {identity}, which NCCL refuses. Look at LOCAL_RANK and CUDA_VISIBLE_DEVICES.'
    loopback = [r for r in reports if _is_loopback(r['address'])]
    several_nodes = len({r['node_rank'] for r in reports}) > 1
    if several_nodes and reports[0]['device']['kind'] == 'cpu' and 0 < len(loopback) < len(reports):
        yield (
            f'network: {ranks_text(loopback)} would tell the other nodes to connect to {loopback[0]["address"]}, which is each machine itself. Use the address of node 0 as MASTER_ADDR on '
            'every node, or set GLOO_SOCKET_IFNAME to the interface of the cluster network.'
        )


def _is_loopback(address: str | None) -> bool:
    return address is not None and (address.startswith('127.') or address == '::1')


def _device_warnings(reports: Sequence[Facts]) -> Iterator[str]:
    if {r['device']['kind'] for r in reports} == {'cuda'}:
        remedy = 'The slowest device sets the pace and the smallest memory the microbatch.'
        yield from _groups(reports, 'device', lambda r: f'{r["device"]["name"]} ({_gib(r["device"]["memory_bytes"])})', remedy)


def _disk(reports: Sequence[Facts], from_bytes: int, to_bytes: int) -> Iterator[str]:
    """Save folders with free space in a range; ranks that see the same disk are named together."""
    low: dict[tuple[str, str], list[Facts]] = {}
    for report in reports:
        disk = report['disk']
        if disk is not None and from_bytes <= disk['free_bytes'] < to_bytes:
            low.setdefault((report['host'], disk['folder']), []).append(report)
    for (_, folder), group in low.items():
        free = min(r['disk']['free_bytes'] for r in group)
        yield f'disk: save_folder {folder!r} has {free:,} bytes free on {ranks_text(group)}. Checkpoints need space: free some, choose another folder, or set save_num_checkpoints_to_keep.'


def _clock_warnings(reports: Sequence[Facts]) -> Iterator[str]:
    clocks = [r['clock'] for r in reports]
    if max(clocks) - min(clocks) > CLOCK_BOUND_S:
        ahead = sorted((r for r in reports if r['clock'] - min(clocks) > CLOCK_BOUND_S), key=lambda r: r['rank'])
        yield (
            f'clock: {ranks_text(ahead)} up to {max(clocks) - min(clocks):.1f} s ahead of the others (bound {CLOCK_BOUND_S:g} s). Run NTP or chrony on every node: object stores refuse signed '
            'requests of a clock that is minutes off, and logs cannot be put in order.'
        )


def differing_keys(first: Mapping[str, str], other: Mapping[str, str], limit: int = 8) -> list[str]:
    """``key: value here / value there`` of two flattened configs."""
    keys = [key for key in sorted({*first, *other}) if first.get(key) != other.get(key)]
    lines = [f'{key}: {_short(first.get(key))} / {_short(other.get(key))}' for key in keys[:limit]]
    return lines + ([f'and {len(keys) - limit} more keys'] if len(keys) > limit else [])


def _short(value: str | None, width: int = 60) -> str:
    return 'not set' if value is None else value if len(value) <= width else f'{value[: width - 3]}...'


def describe(reports: Sequence[Facts]) -> list[str]:
    """What the ranks agree on in one line, then one line per host."""
    hosts: dict[tuple[int, str], list[Facts]] = {}
    for report in reports:
        hosts.setdefault((report['node_rank'], report['host']), []).append(report)
    versions = ', '.join(f'{name} {version}' for name, version in reports[0]['versions'].items())
    lines = [f'pre-flight: {len(reports)} ranks on {len(hosts)} node(s) agree: {versions}; config {reports[0]["config"]}; {len(reports[0]["indexes"])} data index(es)']
    for (node, host), group in list(hosts.items())[:SHOWN_HOSTS]:
        device, disk = group[0]['device'], group[0]['disk']
        space = '' if disk is None else f', {_gib(disk["free_bytes"])} free for {disk["folder"]}'
        lines.append(f'  node {node} ({host}): {_numbers(r["rank"] for r in group)}: {device["kind"]} {device["name"]}, {_gib(device["memory_bytes"])}{space}')
    return lines + ([f'  and {len(hosts) - SHOWN_HOSTS} more nodes'] if len(hosts) > SHOWN_HOSTS else [])


def ranks_text(reports: Iterable[Facts]) -> str:
    """``ranks 0-7 (node-a), 8-15 (node-b)``."""
    hosts: dict[str, list[int]] = {}
    for report in reports:
        hosts.setdefault(report['host'], []).append(report['rank'])
    return ', '.join(f'{_numbers(ranks)} ({host})' for host, ranks in hosts.items())


def _numbers(ranks: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 0-3, 8``."""
    ordered = sorted(ranks)
    spans: list[list[int]] = []
    for rank in ordered:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ', '.join(str(a) if a == b else f'{a}-{b}' for a, b in spans)
    return f'rank {text}' if len(ordered) == 1 else f'ranks {text}'


def _gib(count: int) -> str:
    return f'{count / 1024**3:.1f} GiB'


def pack(value: Any) -> bytes:
    """JSON, compressed: what goes through the store."""
    return zlib.compress(json.dumps(value).encode())


def unpack(data: bytes) -> Any:
    """The reverse of ``pack``."""
    return json.loads(zlib.decompress(data))
