"""Token stores: what is written is what is read, whole parts survive any end of the builder, damaged ones do not."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmfoundry.data.finetuning import store_builder
from llmfoundry.data.finetuning.store import EncodedRow, StorePlan, TokenStore, part_is_whole, write_part, write_plan, write_store
from llmfoundry.data.finetuning.store_builder import build_store, default_num_proc
from tests.helpers.disks import resize_disk, small_disk

ROOT = Path(__file__).resolve().parents[3]
PLAN = StorePlan(rows=95, rows_per_part=10, source='numbers', made_from={})


def numbered_row(i: int) -> EncodedRow:
    """Row ``i``: i % 7 + 1 ids from 100 i on, the last half trained; every ninth row is dropped."""
    if i % 9 == 8:
        return EncodedRow(None, None, 'empty_response')
    length = i % 7 + 1
    return EncodedRow(np.arange(100 * i, 100 * i + length, dtype=np.int32), np.arange(length) >= length // 2, None, i % 3)


def encode(start: int, stop: int) -> Iterator[EncodedRow]:
    return (numbered_row(i) for i in range(start, stop))


def check_numbers(store: TokenStore) -> None:
    kept = [i for i in range(PLAN.rows) if i % 9 != 8]
    assert store.row_ids.tolist() == kept
    assert len(store) == len(kept) == store.counts.kept
    for position, i in enumerate(kept):
        ids, targets = store.row(position)
        expected = numbered_row(i)
        np.testing.assert_array_equal(ids, expected.ids)
        np.testing.assert_array_equal(targets, expected.targets)
        assert ids.dtype == np.int32 and targets.dtype == bool and store.lengths[position] == len(ids)
        assert store.labels(position).tolist() == [t if trained else -100 for t, trained in zip(ids, targets, strict=True)]


class Recorder:
    """``encode`` that notes its spans and may fail at a row."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.spans: list[tuple[int, int]] = []
        self.fail_at = fail_at

    def __call__(self, start: int, stop: int) -> Iterator[EncodedRow]:
        self.spans.append((start, stop))
        for i in range(start, stop):
            if i == self.fail_at:
                raise KeyError(f'row {i}')
            yield numbered_row(i)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=1, max_size=9), max_size=12), rows_per_part=st.integers(1, 5))
def test_what_is_written_is_what_is_read(tmp_path_factory, rows, rows_per_part):
    folder = tmp_path_factory.mktemp('store')
    arrays = [EncodedRow(np.array([i for i, _ in row], np.int32), np.array([t for _, t in row])) for row in rows]
    store = build_store(folder, StorePlan(len(rows), rows_per_part, 's', {}), lambda a, b: arrays[a:b])
    assert [list(zip(*(a.tolist() for a in store.row(i)), strict=True)) for i in range(len(store))] == rows
    assert store.counts.tokens == sum(map(len, rows)) and store.counts.target_tokens == sum(t for row in rows for _, t in row)
    with pytest.raises(IndexError):
        store.row(len(rows))


def test_counts_and_row_numbers_over_parts(tmp_path):
    store = build_store(tmp_path, PLAN, encode)
    check_numbers(store)
    rows = [numbered_row(i) for i in range(PLAN.rows)]
    kept = [r for r in rows if r.ids is not None]
    counts = store.counts
    assert (counts.rows, counts.kept, counts.dropped, counts.empty_response, counts.empty_prompt, counts.no_target) == (95, len(kept), 95 - len(kept), 95 - len(kept), 0, 0)
    assert (counts.truncated, counts.truncated_tokens) == (sum(r.cut_tokens > 0 for r in kept), sum(r.cut_tokens for r in kept))
    assert counts.tokens == sum(len(r.ids) for r in kept) == store.lengths.sum()
    assert counts.target_tokens == sum(r.targets.sum() for r in kept)


def test_pickles_as_its_path_and_opens_again(tmp_path):
    store = write_store(tmp_path / 's', [numbered_row(1), (np.array([5, 6]), np.array([False, True]))])
    again = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 500
    assert again.row(1)[0].tolist() == [5, 6] and again.labels(1).tolist() == [-100, 6] and again.digest == store.digest


def test_an_unfinished_store_does_not_open(tmp_path):
    with pytest.raises(FileNotFoundError, match='no token store'):
        TokenStore(tmp_path)
    write_plan(tmp_path, PLAN)
    write_part(tmp_path, PLAN, 0, encode(0, 10))
    with pytest.raises(FileNotFoundError, match='part 1 of 10 is missing or damaged'):
        TokenStore(tmp_path)


def test_a_part_with_rows_missing_is_refused_and_leaves_nothing(tmp_path):
    write_plan(tmp_path, PLAN)
    with pytest.raises(RuntimeError, match='part 0 of numbers got 9 rows instead of 10'):
        write_part(tmp_path, PLAN, 0, encode(0, 9))
    assert sorted(p.name for p in tmp_path.iterdir()) == ['plan.json']


@pytest.mark.parametrize(('suffix', 'damage'), [('tokens', 'cut'), ('tokens', 'gone'), ('rows', 'cut'), ('rows', 'flip'), ('json', 'cut'), ('json', 'gone')])
def test_a_damaged_part_is_noticed_and_only_that_one_is_made_anew(tmp_path, suffix, damage):
    before = build_store(tmp_path, PLAN, encode).digest
    path = tmp_path / f'part-00003.{suffix}'
    data = path.read_bytes()
    {'cut': lambda: path.write_bytes(data[:-3]), 'gone': path.unlink, 'flip': lambda: path.write_bytes(bytes([data[0] ^ 1]) + data[1:])}[damage]()
    recorder = Recorder()
    store = build_store(tmp_path, PLAN, recorder)
    assert recorder.spans == [(30, 40)]
    assert store.digest == before
    check_numbers(store)


def test_changed_ids_are_found_when_a_build_goes_on(tmp_path):
    build_store(tmp_path, PLAN, encode)
    path = tmp_path / 'part-00003.tokens'
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert not part_is_whole(tmp_path, 3) and part_is_whole(tmp_path, 4)
    (tmp_path / 'part-00008.json').unlink()
    recorder = Recorder()
    check_numbers(build_store(tmp_path, PLAN, recorder))
    assert recorder.spans == [(30, 40), (80, 90)]


def test_parts_of_another_plan_are_not_taken_over(tmp_path):
    build_store(tmp_path, StorePlan(rows=95, rows_per_part=20, source='numbers', made_from={}), lambda a, b: [numbered_row(0)] * (b - a))
    (tmp_path / 'plan.json').write_text('{"format": 0}')
    check_numbers(build_store(tmp_path, PLAN, encode))


@pytest.mark.parametrize('num_proc', [1, 3])
def test_an_error_keeps_the_parts_that_are_done(tmp_path, num_proc):
    with pytest.raises(KeyError, match='row 55'):
        build_store(tmp_path, PLAN, Recorder(fail_at=55), num_proc)
    kept = [p for p in range(PLAN.parts) if part_is_whole(tmp_path, p)]
    assert 5 not in kept
    if num_proc == 1:
        assert kept == [0, 1, 2, 3, 4]
    recorder = Recorder()
    check_numbers(build_store(tmp_path, PLAN, recorder))
    assert recorder.spans == [PLAN.span(p) for p in range(PLAN.parts) if p not in kept]
    assert not list(tmp_path.glob('*.tmp'))


def test_the_number_of_processes_changes_nothing(tmp_path):
    one, three = build_store(tmp_path / '1', PLAN, encode), build_store(tmp_path / '3', PLAN, encode, num_proc=3)
    check_numbers(three)
    assert one.digest == three.digest


def test_a_killed_process_is_an_error_with_a_remedy(tmp_path):
    def suicidal(start: int, stop: int) -> Iterator[EncodedRow]:
        if start == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(start, stop)

    with pytest.raises(RuntimeError, match=r'numbers: a tokenising process was killed.*MAX_NUM_PROC \(now 2 processes\)'):
        build_store(tmp_path, PLAN, suicidal, num_proc=2)
    check_numbers(build_store(tmp_path, PLAN, encode))


@pytest.mark.parametrize('num_proc', [1, 2])
def test_a_full_disk_is_an_error_with_a_remedy_and_loses_no_whole_part(tmp_path, num_proc):
    plan = StorePlan(rows=8, rows_per_part=1, source='large', made_from={})

    def large(start: int, stop: int) -> Iterator[EncodedRow]:
        return (EncodedRow(np.full(100_000, i, np.int32), np.ones(100_000, bool)) for i in range(start, stop))

    with small_disk(tmp_path / 'disk', '2m') as disk:
        folder = disk / 'store'
        with pytest.raises(OSError, match=f'token ids cannot be written to {folder}: No space left on device. Set LLMFOUNDRY_CACHE'):
            build_store(folder, plan, large, num_proc)
        whole = [p for p in range(8) if part_is_whole(folder, p)]
        assert len(whole) >= 4 and not list(folder.glob('*.tmp'))
        resize_disk(disk, '8m')
        store = build_store(folder, plan, large, num_proc)
        assert [int(store.row(i)[0][-1]) for i in range(8)] == list(range(8))
        # Its maps keep the disk busy.
        del store


# Slow, so that it can be killed in the middle of a part; notes each span that it begins.
BUILDER = """
import os, sys, time
from pathlib import Path
from tests.data.finetuning.test_token_store import PLAN, numbered_row
from llmfoundry.data.finetuning.store_builder import build_store
folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
def slow(start, stop):
    with open(folder.with_name('spans'), 'a') as f:
        f.write(f'{os.getpid()} {start}\\n')
    for i in range(start, stop):
        time.sleep(seconds)
        yield numbered_row(i)
print(build_store(folder, PLAN, slow).digest)
"""


def start_builder(folder: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, '-c', BUILDER, str(folder), str(seconds)], cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE, text=True)


def wait_until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited too long'
        time.sleep(0.005)


def test_kill_dash_nine_loses_only_the_part_at_hand(tmp_path):
    folder = tmp_path / 'store'
    builder = start_builder(folder, 0.02)
    try:
        wait_until(lambda: (folder / 'part-00002.json').exists() and list(folder.glob('part-00003.tokens.*.tmp')))
    finally:
        builder.send_signal(signal.SIGKILL)
        assert builder.wait() == -signal.SIGKILL
    whole = [p for p in range(PLAN.parts) if part_is_whole(folder, p)]
    assert whole == [0, 1, 2]
    recorder = Recorder()
    store = build_store(folder, PLAN, recorder)
    assert recorder.spans == [PLAN.span(p) for p in range(3, PLAN.parts)]
    check_numbers(store)
    assert not list(folder.glob('*.tmp'))
    assert store.digest == build_store(tmp_path / 'other', PLAN, encode).digest


def test_two_builders_at_once_do_the_work_of_one(tmp_path):
    folder = tmp_path / 'store'
    builders = [start_builder(folder, 0.004) for _ in range(2)]
    digests = {b.communicate(timeout=120)[0].strip() for b in builders}
    assert [b.returncode for b in builders] == [0, 0]
    spans = [int(line.split()[1]) for line in (tmp_path / 'spans').read_text().splitlines()]
    assert sorted(spans) == [PLAN.span(p)[0] for p in range(PLAN.parts)]
    assert digests == {TokenStore(folder).digest}


def test_the_next_builder_goes_on_when_the_first_is_killed(tmp_path):
    folder = tmp_path / 'store'
    first = start_builder(folder, 0.02)
    wait_until(lambda: (folder / 'part-00000.json').exists())
    second = start_builder(folder, 0)
    time.sleep(0.3)
    first.kill()
    first.wait()
    assert second.communicate(timeout=120)[0].strip() == TokenStore(folder).digest
    check_numbers(TokenStore(folder))


@pytest.mark.parametrize(('cores', 'limit', 'expected'), [(64, None, 56), (64, '4', 4), (4, None, 1), (9, '16', 1), (64, '0', 1)])
def test_number_of_processes(monkeypatch, cores, limit, expected):
    monkeypatch.setattr(store_builder.os, 'sched_getaffinity', lambda pid: set(range(cores)))
    monkeypatch.delenv('MAX_NUM_PROC', raising=False)
    if limit is not None:
        monkeypatch.setenv('MAX_NUM_PROC', limit)
    assert default_num_proc() == expected


def test_parts_are_neither_small_nor_many():
    assert StorePlan.for_rows(20_000, 's').parts == 5
    assert StorePlan.for_rows(300_000_000, 's').parts <= 1024
    assert StorePlan.for_rows(0, 's').parts == 0
    spans = [StorePlan.for_rows(9_000_001, 's').span(p) for p in range(StorePlan.for_rows(9_000_001, 's').parts)]
    assert spans[0][0] == 0 and spans[-1][1] == 9_000_001 and all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))


def test_the_plan_says_what_the_ids_were_made_from(tmp_path):
    write_plan(tmp_path, StorePlan.for_rows(3, '/data/train.jsonl', {'settings': {'max_seq_len': 8}}))
    assert json.loads((tmp_path / 'plan.json').read_text())['made_from'] == {'settings': {'max_seq_len': 8}}
