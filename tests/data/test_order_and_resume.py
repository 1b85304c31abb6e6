"""The order of samples: the same for any number of ranks, nodes and workers, and continued exactly after an interruption."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from streaming.base.batching import generate_work
from streaming.base.world import World

from llmfoundry.data.text_data import StreamingTextDataset, build_text_dataloader
from tests.helpers.mds import numbered_samples, write_token_mds

ROOT = Path(__file__).resolve().parents[2]
GLOBAL_BATCH = 8


def global_batches(dataset: StreamingTextDataset, nodes: int, ranks_per_node: int, workers: int) -> list[list[int]]:
    """The sample ids of each global batch, as that many ranks would draw them."""
    dataset.batch_size = GLOBAL_BATCH // (nodes * ranks_per_node)
    work = generate_work('random', dataset, World(nodes, ranks_per_node, workers, 0), 0, 0)
    # (nodes, ranks, workers, batches, batch): a rank takes batches from its workers in turn.
    in_turn = work.transpose(3, 2, 0, 1, 4).reshape(-1, GLOBAL_BATCH)
    return [sorted(batch) for batch in in_turn.tolist() if min(batch) >= 0]


@pytest.mark.parametrize('shuffle', [False, True])
def test_global_batches_do_not_depend_on_ranks_nodes_and_workers(gpt2: Any, tmp_path: Path, shuffle: bool) -> None:
    # 96 samples, so that every layout fills all of its batches.
    write_token_mds(tmp_path, numbered_samples(96))
    dataset = StreamingTextDataset(gpt2, 16, local=str(tmp_path), batch_size=8, shuffle=shuffle)
    expected = global_batches(dataset, 1, 1, 1)
    assert len(expected) == 12 and (expected[0] == list(range(8))) == (not shuffle)
    for nodes, ranks_per_node, workers in [(1, 2, 1), (1, 4, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (1, 2, 2), (1, 1, 3), (2, 2, 2)]:
        assert global_batches(dataset, nodes, ranks_per_node, workers) == expected, (nodes, ranks_per_node, workers)


def loader(tokenizer: Any, root: Path, num_workers: int) -> Any:
    dataset = {'local': str(root), 'split': 'train', 'max_seq_len': 16, 'shuffle': True}
    return build_text_dataloader(tokenizer, 4, dataset, drop_last=True, num_workers=num_workers, pin_memory=False).dataloader


def ids(batches: Any) -> list[list[int]]:
    return [batch['input_ids'][:, 0].tolist() for batch in batches]


@pytest.mark.parametrize(('workers_before', 'workers_after'), [(0, 0), (2, 0), (2, 3)])
def test_resuming_in_mid_epoch_continues_with_the_next_batch(gpt2: Any, shared_tokens: Path, workers_before: int, workers_after: int) -> None:
    whole = loader(gpt2, shared_tokens, 0)
    first_epoch, second_epoch = ids(whole), ids(whole)
    assert first_epoch != second_epoch and sorted(sum(first_epoch, [])) == sorted(sum(second_epoch, []))

    interrupted = loader(gpt2, shared_tokens, workers_before)
    seen = []
    for batch in interrupted:
        seen.append(batch['input_ids'][:, 0].tolist())
        if len(seen) == 7:
            state = interrupted.state_dict()
            break
    assert state['sample_in_epoch'] == 28

    resumed = loader(gpt2, shared_tokens, workers_after)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert seen + ids(resumed) == first_epoch
    assert ids(resumed) == second_epoch


RANK_SCRIPT = """
import json, sys
from llmfoundry.data.text_data import build_text_dataloader
from llmfoundry.tokenizers import build_tokenizer
import torch.distributed as dist
dist.init_process_group('gloo')
dataset = {'local': sys.argv[1], 'split': 'train', 'max_seq_len': 16, 'shuffle': True}
tokenizer = build_tokenizer('llmfoundry://gpt2', {})
try:
    loader = build_text_dataloader(tokenizer, 2, dataset, True, 0, pin_memory=False).dataloader
    print('IDS', json.dumps([b['input_ids'][:, 0].tolist() for b in loader]))
    build_text_dataloader(tokenizer, 2, {**dataset, 'split': 'nope'}, True, 0)
except ValueError as e:
    print('ERROR', e, flush=True)
# Not destroy_process_group, which can deadlock in torch 2.7: see tests/helpers/processes.py.
dist.barrier()
import atexit, os
atexit._run_exitfuncs()
os._exit(0)
"""


@pytest.mark.slow
def test_two_processes_share_the_batches_and_meet_the_same_error(gpt2: Any, shared_tokens: Path) -> None:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    env = {**os.environ, 'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'NODE_RANK': '0', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port), 'OMP_NUM_THREADS': '1'}
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', RANK_SCRIPT, str(shared_tokens)], env={**env, 'RANK': str(r), 'LOCAL_RANK': str(r)}, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for r in (0, 1)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs[0][1] + outputs[1][1]
    per_rank = [json.loads(next(line for line in out.splitlines() if line.startswith('IDS'))[4:]) for out, _ in outputs]
    together = [sorted(a + b) for a, b in zip(*per_rank, strict=True)]
    assert together == [sorted(batch) for batch in ids(loader(gpt2, shared_tokens, 0))]
    errors = {next(line for line in out.splitlines() if line.startswith('ERROR')) for out, _ in outputs}
    assert errors == {f"ERROR {shared_tokens}: local directory does not contain split 'nope': its sub-folders are train"}
