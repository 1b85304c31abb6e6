"""News between nodes: a thread of local rank 0 tells the others what its node does, and learns which node has fallen silent, through the key-value store of the process group.

It has a client of its own, since a call of the training thread may be what hangs, and a thread of its own, since a call to a master that has vanished may never return. One value per
node, not per rank, keeps a thousand ranks cheap for the master. What was learnt goes to a file in the live folder, where the node's other ranks read it. Runs on one node have none of this.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmfoundry import dist
from llmfoundry.command_utils.incidents.faults import Fault, first_fault, publish
from llmfoundry.command_utils.incidents.record import read_records, write_whole

__all__ = ['Courier', 'interval_for', 'remote_ranks']

_NEWS = 'news.json'
_KEY = 'llmfoundry/incidents'
_CALL_TIMEOUT = datetime.timedelta(seconds=5)
_SILENT_INTERVALS = 4
_LEAST_SILENCE_S = 5.0


def interval_for(timeout_s: float) -> float:
    """Seconds between messages: twenty within the time limit, but no more than one per second and no less than one per ten."""
    return min(10.0, max(1.0, timeout_s / 20))


class Courier(threading.Thread):
    """Exchanges news until the process ends.

    Args:
        folder: the live folder.
        timeout_s: ``dist_timeout``.
    """

    def __init__(self, folder: Path, timeout_s: float) -> None:
        super().__init__(name='llmfoundry-courier', daemon=True)
        self.folder = folder
        self.interval_s = interval_for(timeout_s)
        self.nodes = [n for n in range(max(1, dist.get_world_size() // max(1, dist.get_local_world_size()))) if n != dist.get_node_rank()]
        self._wake, self._done = threading.Event(), threading.Event()
        self._store: Any = None
        self._seen: dict[int, tuple[int, float, list[dict[str, Any]]]] = {}
        self._number = 0
        self._heard = time.time()

    def run(self) -> None:
        while not dist.is_initialized():
            time.sleep(self.interval_s)
        while True:
            with contextlib.suppress(RuntimeError, ValueError, OSError):  # the master is gone, or slow; the file's age says so
                self._exchange()
                self._heard = time.time()
            self._write()
            self._done.set()
            self._wake.wait(self.interval_s)
            self._wake.clear()

    def exchange_now(self, seconds: float) -> None:
        """Has news exchanged at once and waits for it, but not long."""
        self._done.clear()
        self._wake.set()
        self._done.wait(seconds)

    def _exchange(self) -> None:
        from torch.distributed import TCPStore

        if self._store is None:
            self._store = TCPStore(os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=False, timeout=_CALL_TIMEOUT, wait_for_workers=False)
        self._number += 1
        self._store.set(f'{_KEY}/{dist.get_node_rank()}', json.dumps([self._number, [s.summary() for s in read_records(self.folder)]]))
        for node in self.nodes:
            key = f'{_KEY}/{node}'
            if node in self._seen or self._store.check([key]):
                number, ranks = json.loads(self._store.get(key))
                if number != self._seen.get(node, (None,))[0]:
                    self._seen[node] = (number, time.time(), ranks)
        own = first_fault(self.folder)
        if own is not None:
            self._store.compare_set(f'{_KEY}/fault', '', json.dumps(asdict(own)))
        elif self._store.check([f'{_KEY}/fault']):
            publish(self.folder, Fault(**json.loads(self._store.get(f'{_KEY}/fault'))))

    def _write(self) -> None:
        write_whole(self.folder / _NEWS, json.dumps({
            'heard': self._heard, 'interval_s': self.interval_s, 'nodes': {str(node): {'changed': changed, 'ranks': ranks} for node, (_, changed, ranks) in self._seen.items()},
        }))  # fmt: skip


def remote_ranks(folder: Path) -> list[dict[str, Any]]:
    """What is known of the ranks of other nodes; ``lost`` marks those of a node that has fallen silent, ``silent_s`` says for how long.

    While the store itself does not answer, nothing is known of any node but the one that holds it: that one is lost.
    """
    try:
        news = json.loads((folder / _NEWS).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return []
    limit_s = max(_LEAST_SILENCE_S, _SILENT_INTERVALS * news['interval_s'])
    store_silent_s = time.time() - news['heard']
    found = []
    for node, known in news['nodes'].items():
        silent_s = time.time() - known['changed']
        lost = silent_s > limit_s and (store_silent_s <= limit_s or node == '0')
        left = all(r['ended'] for r in known['ranks'])
        found += [{**r, 'silent_s': round(silent_s, 1), 'lost': lost and not left} for r in known['ranks']]
    return sorted(found, key=lambda r: r['rank'])
