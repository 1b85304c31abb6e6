"""From bundles to a cause: the class of the failure, what was seen, and the one setting that would address it. Pure functions over the contents of bundles.

Texts of gloo, torch, Composer and the object stores were measured where the tests make them happen; those of CUDA and NCCL are written from their sources and documentation and are
unmeasured here.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Any, Iterable, Mapping, Sequence

from llmfoundry.command_utils.incidents import procs

__all__ = ['CLASSES', 'Cause', 'classify', 'is_lost_connection']

Bundle = Mapping[str, Any]

# Class -> the setting that addresses it. ``{...}`` are filled from the bundle.
CLASSES = {
    'out of memory': 'device_train_microbatch_size: auto, or a smaller number (then fsdp_config.activation_checkpointing: true)',
    'out of host memory': 'train_loader.num_workers: a smaller number (each worker holds its own prefetched batches); then more memory for the job',
    'shared memory full': 'train_loader.num_workers: 0, or a larger /dev/shm (docker run --shm-size)',
    'data stall': 'train_loader.dataset.download_timeout and predownload for slow storage; dist_timeout: more seconds, if such a wait is normal here',
    'bad data': 'train_loader.dataset: the file or sample named above',
    'mismatched collective': 'the code at {place}: every rank must make the same collective calls in the same order',
    'node lost': 'autoresume: true with a save_folder, and start again without that node',
    'killed': 'autoresume: true with a save_folder, and start again; if it was a scheduler, its memory or time limit',
    'stopped': 'nothing to mend: somebody asked it to stop; autoresume: true continues from the newest checkpoint',
    'launcher gone': 'start again with autoresume: true; run the launcher under nohup, tmux or a scheduler if a closed terminal took it along',
    'disk full': 'save_num_checkpoints_to_keep: a small number, or save_folder on a larger disk',
    'NaN': 'optimizer.lr: lower, or algorithms.gradient_clipping',
    'loss': 'optimizer.lr: lower',
    'network or object store': 'train_loader.dataset.download_retry and download_timeout; credentials and endpoint of the store',
    'bad checkpoint': 'load_path: another checkpoint, or autoresume: true, which skips damaged ones',
    'config': 'the keys named above',
    'hang': 'the code at {place}; dist_timeout: more seconds, if it is only slow',
    'slow storage': 'save_folder on faster storage, or dist_timeout: more seconds',
    'native crash': 'the stacks in the bundle name the native call; try without model.attn_config.attn_impl: flash or compile_config',
    'user code': 'the code at {place}',
    'left early': 'the code of rank {rank} that ended the process; ranks must end together',
    'unknown': 'the traceback in the bundle; please report it',
}

_MEMORY_ERRORS = {'MemoryError', 'OutOfMemoryError'}
_DEVICE_MEMORY = re.compile(r'CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED|HIP out of memory|cuda error: out of memory', re.IGNORECASE)
_HOST_MEMORY = re.compile(r"can't allocate memory|Cannot allocate memory|not enough memory|std::bad_alloc", re.IGNORECASE)
_WORKER_KILLED = re.compile(r'DataLoader worker \(pid.*?(is killed by signal: Killed|exited unexpectedly)', re.DOTALL)
_SHARED_MEMORY = re.compile(r'insufficient shared memory|killed by signal: Bus error|No space left on device.*?/dev/shm|unable to (open|allocate) shared memory', re.DOTALL)
# torch's own writer of zip files says no more than that it could not write.
_DISK_FULL = re.compile(r'No space left on device|Disk quota exceeded|\bENOSPC\b|\bEDQUOT\b|PytorchStreamWriter failed writing|enforce fail at inline_container.*unexpected pos')
_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT}
_MISMATCH = re.compile(
    r'op\.preamble\.length <= op\.nbytes|preamble.*nbytes|Detected mismatch between collectives|Collectives differ|Mismatch between collective operation types|tensor shapes? mismatch'
    r'|unpickling stack underflow',  # objects sent by two different calls
)
# A peer or its node went away: first gloo and the key-value store, then NCCL.
_LOST_CONNECTION = re.compile(
    r'Connection closed by peer|Connection reset by peer|Connection refused|Broken pipe|Timed out waiting \d+ms|Read timeout|Write timeout|Socket closed|No route to host|Host is unreachable'
    r'|Network is unreachable|Connection timed out|Software caused connection abort|\[.*gloo/transport/tcp|failed to recv, got \d+ bytes|Failed to recv|Wait timeout after|wait timeout'
    r'|client socket has (timed out|failed)|The client socket has|Socket Timeout|socketStartConnect'
    r'|Watchdog caught collective operation timeout|ncclRemoteError|ncclSystemError|ncclInternalError|NCCL communicator was aborted|remote process exited|Connection was likely closed'
    r'|Monitored Barrier|monitoredBarrier|Timed out after waiting|DistNetworkError|DistStoreError|Broken Pipe',
)
_COMMUNICATION_TYPES = {'DistBackendError', 'DistNetworkError', 'DistStoreError', 'DistError'}
_NETWORK_MODULES = ('botocore', 'boto3', 'urllib3', 'requests', 'httpx', 'aiohttp', 'google.', 'oci.', 'azure.', 'huggingface_hub', 's3transfer', 'fsspec')
_NETWORK_TYPES = {
    'NetworkError', 'RemoteStoreError', 'ConnectionError', 'ConnectionResetError', 'ConnectionRefusedError', 'ConnectTimeout', 'ReadTimeout', 'HTTPError', 'URLError', 'gaierror', 'EndpointConnectionError',
    'ObjectStoreTransientError', 'ClientError', 'NoCredentialsError', 'IncompleteRead',
}  # fmt: skip
_STORE_MODULES = ('composer.utils.object_store', 'streaming.base.storage', 'llmfoundry.checkpoint.remote_store')
_EXPLAINED = {
    'NaNLossError': 'NaN', 'LossSpikeError': 'loss', 'HighLossError': 'loss', 'NetworkError': 'network or object store', 'CheckpointUploadError': 'network or object store',
    'CheckpointError': 'bad checkpoint', 'ConfigError': 'config', 'RegistryError': 'config', 'DataError': 'bad data', 'PackingNotSupportedError': 'config', 'PackingSelfTestError': 'config',
}  # fmt: skip
# Less than this part of the limit left free: a process that was killed was most likely killed for it.
_NEAR_LIMIT = 0.05
_HANGS = {'data': 'data stall', 'checkpoint': 'slow storage'}


@dataclass(frozen=True)
class Cause:
    """What ended a run: ``kind`` is one of ``CLASSES``, ``sign`` a sentence with what was seen, ``setting`` what to change."""

    kind: str
    sign: str
    setting: str
    rank: int


def classify(bundles: Sequence[Bundle], memory_killed: bool = False) -> Cause:
    """The cause, from the bundles of one start.

    Args:
        bundles: at least one; each names the first fault as its rank knew it.
        memory_killed: the kernel has killed a process for want of memory meanwhile.
    """
    first = first_bundle(bundles)
    kind, sign = _kind_and_sign(first, bundles, memory_killed)
    error = first.get('error') or {}
    places = [_place_of_hang(b) for b in [first, *bundles]] if kind == 'mismatched collective' else [_place_of_hang(first)]
    place = error.get('place') or next((p for p in places if p and not _is_library(p)), places[0]) or 'the top of the stack in the bundle'
    return Cause(kind, sign, CLASSES[kind].format(place=place, rank=first['rank']), first['rank'])


def first_bundle(bundles: Sequence[Bundle]) -> Bundle:
    """The bundle of the rank whose fault it was, by the earliest fault that any bundle names; where that rank left none, the earliest bundle."""
    fault = min((b['fault'] for b in bundles), key=lambda f: f['time'])
    own = [b for b in bundles if b['rank'] == fault['rank']]
    return own[0] if own else min(bundles, key=lambda b: b['time'])


def _kind_and_sign(first: Bundle, bundles: Sequence[Bundle], memory_killed: bool) -> tuple[str, str]:
    fault, error = min((b['fault'] for b in bundles), key=lambda f: f['time']), first.get('error')
    if fault['rank'] != first['rank']:  # of another node, whose bundle is there
        kind = fault['cause'] or (fault['kind'] if fault['kind'] in CLASSES else 'node lost')
        return kind, fault['note'] or f'rank {fault["rank"]} on {fault["host"]} left no word'
    if fault['kind'] == 'hang':
        return _hang(first, bundles)
    if fault['kind'] == 'killed':
        return _killed(first, fault, memory_killed)
    if fault['kind'] == 'crashed':
        name = procs.signal_name(fault['code']) or f'code {fault["code"]}'
        if name == 'SIGBUS':
            return 'shared memory full', 'the process died of SIGBUS, as one does that writes to shared memory for which there is no space'
        if name == 'SIGABRT' and first.get('waiting_in'):  # gloo aborts the process when the sizes of two ranks differ
            return 'mismatched collective', f'the communication library aborted the process in {first["waiting_in"]}, as it does when another rank makes another call; its message is in the output'
        return 'native crash', f'the process died of {name}'
    if fault['kind'] in CLASSES:  # stopped, launcher gone, node lost, left early
        return fault['kind'], fault['note'] or fault['kind']
    if error is None:
        return 'unknown', f'the process ended with code {fault["code"]} and left no word'
    return _error(error, first, bundles)


def _killed(first: Bundle, fault: Mapping[str, Any], memory_killed: bool) -> tuple[str, str]:
    memory = first.get('memory') or {}
    how = 'killed from outside (SIGKILL)' if not fault['note'] else f'killed, most likely from outside ({fault["note"]})'
    if memory_killed:
        return 'out of host memory', 'killed by the kernel for want of memory (its counter of such kills has grown)'
    for name, free, total in (
        ('the machine', memory.get('machine_available'), memory.get('machine_total')),
        ('the cgroup', None if memory.get('cgroup_used') is None else memory['cgroup_limit'] - memory['cgroup_used'], memory.get('cgroup_limit')),
    ):
        if free is not None and total and free < _NEAR_LIMIT * total:
            return 'out of host memory', f'{how}, with {free / 2**30:.1f} of {total / 2**30:.1f} GiB of {name} left: most likely for want of memory'
    return 'killed', f'{how}; memory was not short'


def _hang(first: Bundle, bundles: Sequence[Bundle]) -> tuple[str, str]:
    seconds = first['seconds_in_phase']
    waiting = {b['rank']: b.get('waiting_in') for b in bundles}
    lost = [p for b in bundles for p in b.get('peers', []) if p.get('lost')]
    if lost and all(waiting.values()):
        return 'node lost', f'nothing has been heard of rank {lost[0]["rank"]} on {lost[0]["host"]} for {lost[0]["silent_s"]:.0f} s'
    if len(bundles) > 1 and len(bundles) == first['world_size'] and all(waiting.values()):
        if len(set(waiting.values())) == 1 and len({b.get('node_rank') for b in bundles}) > 1:
            return 'node lost', f'all ranks of all nodes wait in the same call, {first["waiting_in"]}: what they send does not arrive'
        calls = '; '.join(f'rank {rank} waits in {call}' for rank, call in sorted(waiting.items()))
        return 'mismatched collective', f'all ranks wait for each other: {calls}'
    kind = _HANGS.get(first['phase'], 'hang')
    if kind == 'data stall':
        return kind, f'no batch for {seconds:.0f} s, {_loader_position(first)}'
    doing = f'{first["waiting_in"]}' if first.get('waiting_in') else _place_of_hang(first)
    note = f'; {first["fault"]["note"]}' if first['fault']['note'] else ''
    return kind, f'no progress for {seconds:.0f} s in phase {first["phase"]}' + (f', in {doing}' if doing else '') + note


def _loader_position(bundle: Bundle) -> str:
    progress, reading = bundle['progress'], bundle.get('reading') or {}
    text = f'at epoch {progress["epoch"]}, batch {progress["batch_in_epoch"]} (sample {progress["sample_in_epoch"]} of the epoch)'
    if reading:
        text += ', reading ' + ', '.join(f'{name.removesuffix("_id")} {value}' for name, value in reading.items())
    return text + (f' of {progress["source"]}' if progress.get('source') else '')


def _place_of_hang(bundle: Bundle) -> str | None:
    """The innermost frame that is neither a library's nor Python's own."""
    waiting = bundle.get('waiting_in') or ''
    if ', called at ' in waiting:
        return waiting.partition(', called at ')[2]
    return next((frame for frame in bundle.get('main_stack', []) if not _is_library(frame) and '/llmfoundry/' not in frame), None)


def _is_library(frame: str) -> bool:
    return 'site-packages' in frame or '/lib/python' in frame or frame.startswith('<')


def _error(error: Mapping[str, Any], first: Bundle, bundles: Sequence[Bundle]) -> tuple[str, str]:
    chain = error['chain']
    texts = [f'{e["type"]}: {e["message"]}' for e in chain]
    text = '\n'.join(texts)
    sign = _one_line(texts[0])
    names = {error['type'], *error['bases']}
    # A disk or memory that ran out shows up as errors of many kinds, also explained ones; so these come first.
    if _SHARED_MEMORY.search(text):
        return 'shared memory full', sign
    if any(e.get('errno') in _DISK_ERRNOS for e in chain) or _DISK_FULL.search(text):
        return 'disk full', sign
    if _DEVICE_MEMORY.search(text) or 'OutOfMemoryError' in names:
        return 'out of memory', sign
    if _MEMORY_ERRORS & {e['type'] for e in chain} or _HOST_MEMORY.search(text) or _WORKER_KILLED.search(text) or any(e.get('errno') == errno.ENOMEM for e in chain):
        return 'out of host memory', sign
    for name in [error['type'], *error['bases']]:
        if name in _EXPLAINED:
            kind = _EXPLAINED[name]
            return ('network or object store' if kind in ('bad checkpoint', 'bad data') and _is_network(chain) else kind), sign
    if _MISMATCH.search(text):
        return 'mismatched collective', _one_line(f'{sign} ({_waiting_of(bundles)})')
    if _is_network(chain):
        return 'network or object store', sign
    if is_lost_connection(error):
        lost = [p for b in bundles for p in b.get('peers', []) if p.get('lost')]
        who = f'nothing has been heard of rank {lost[0]["rank"]} on {lost[0]["host"]} for {lost[0]["silent_s"]:.0f} s; ' if lost else ''
        return 'node lost', who + sign
    if error['in_user_code']:
        return 'user code', sign
    return ('bad data' if error['explained'] and getattr(error, 'location', None) else 'config' if error['explained'] else 'unknown'), sign


def _waiting_of(bundles: Iterable[Bundle]) -> str:
    return '; '.join(f'rank {b["rank"]} in {(b.get("error") or {}).get("place") or b.get("waiting_in") or "phase " + b["phase"]}' for b in bundles)


def _is_network(chain: Sequence[Mapping[str, Any]]) -> bool:
    return any(e['module'].startswith((*_NETWORK_MODULES, *_STORE_MODULES)) or (e['type'] in _NETWORK_TYPES and not e['module'].startswith('torch')) for e in chain)


def is_lost_connection(error: Mapping[str, Any]) -> bool:
    """Whether an error (as ``describe_error`` says it) is that of a rank whose peer, or connection to it, has gone: mostly the consequence of another rank's end."""
    last = error['chain'][-1] if error['chain'] else error
    if error['type'] in _COMMUNICATION_TYPES:
        return True
    from_torch = '/torch/' in (error.get('innermost') or '') or '/llmfoundry/' in (error.get('innermost') or '')
    return last['type'] == 'RuntimeError' and from_torch and bool(_LOST_CONNECTION.search(last['message']))


def _one_line(text: str, limit: int = 500) -> str:  # long enough for an explained error with a long path, whose end says what to do
    line = ' '.join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + '...'
