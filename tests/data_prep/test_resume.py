"""A run that is killed with SIGKILL goes on where its last checkpoint stood, and the result is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmfoundry.command_utils.data_prep.journal import WORK_FOLDER
from tests.helpers.prepared_data import EOS, GPT2, digest, random_texts, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
# Small blocks and shards and a brake, so that a kill falls in the middle of a run that takes seconds.
CODE = """
import sys, time
from llmfoundry.command_utils.data_prep import engine, readers
readers.BLOCK_BYTES, engine.SIZE_LIMIT_BYTES, engine.CHECKPOINT_SECONDS = 8192, 40_000, 0.05
take, brake = engine._Conversion._take, float(sys.argv[1])
def slow(self, encoded):
    time.sleep(brake)
    take(self, encoded)
engine._Conversion._take = slow
from {module} import main
main(sys.argv[2:])
"""
JSON = 'llmfoundry.command_utils.data_prep.convert_dataset_json'
TEXT = 'llmfoundry.command_utils.data_prep.convert_text_to_mds'


def start(module, flags, brake=0.0):
    command = [sys.executable, '-c', CODE.format(module=module), str(brake), *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True)


def finish(process):
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    return output


def kill_after(process, state_file, documents):
    """Kills the whole process group once a checkpoint holds so many documents; returns that checkpoint."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        try:
            state = json.loads(state_file.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            state = {'documents': 0}
        if state['documents'] >= documents:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return state
        time.sleep(0.01)
    raise AssertionError('no checkpoint in time')


def _flags(rows, out, extra=()):
    return ['--path', rows, '--out_root', out, '--concat_tokens', '32', '--tokenizer', GPT2, '--eos_text', EOS, '--processes', '2', *extra]


@pytest.mark.parametrize(('extra', 'suffix'), [((), ''), (('--compression', 'zstd', '--no_wrap'), '.gz')], ids=['plain', 'compressed'])
def test_kill_and_rerun(tmp_path, extra, suffix):
    import gzip

    rows = write_jsonl(tmp_path / 'rows.jsonl', random_texts(1500))
    if suffix:
        (tmp_path / 'rows.jsonl.gz').write_bytes(gzip.compress(rows.read_bytes()))
        rows = tmp_path / 'rows.jsonl.gz'
    finish(start(JSON, _flags(rows, tmp_path / 'whole', extra)))
    out = tmp_path / 'out'
    for documents in (200, 700):
        process = start(JSON, _flags(rows, out, extra), brake=0.05)
        state = kill_after(process, out / WORK_FOLDER / 'state.json', documents)
        assert 0 < state['documents'] < 1500
        assert not (out / 'index.json').exists()
    output = finish(start(JSON, _flags(rows, out, extra)))
    # Documents before the checkpoint were not tokenised again: the run says where it goes on, and its state says so, too.
    assert 'going on with an unfinished conversion: ' in output
    assert digest(out) == digest(tmp_path / 'whole')
    assert len(digest(out)) > 5
    assert not (out / WORK_FOLDER).exists()


def test_text_files_and_their_done_file(tmp_path):
    for i in range(40):
        (tmp_path / 'in').mkdir(exist_ok=True)
        (tmp_path / 'in' / f'{i:02}.txt').write_text(' '.join(random_texts(60, seed=i)))
    flags = ['--input_folder', tmp_path / 'in', '--concat_tokens', '32', '--tokenizer', GPT2, '--eos_text', EOS, '--processes', '2']
    finish(start(TEXT, [*flags, '--output_folder', tmp_path / 'whole']))
    out = tmp_path / 'out'
    kill_after(start(TEXT, [*flags, '--output_folder', out], brake=0.05), out / WORK_FOLDER / 'state.json', 10)
    finish(start(TEXT, [*flags, '--output_folder', out]))
    ours, whole = digest(out), digest(tmp_path / 'whole')
    done = '.text_to_mds_conversion_done'
    assert ours.pop(done) and whole.pop(done)
    assert ours == whole


def _interrupted(tmp_path):
    rows = write_jsonl(tmp_path / 'rows.jsonl', random_texts(1500))
    kill_after(start(JSON, _flags(rows, tmp_path / 'out'), brake=0.05), tmp_path / 'out' / WORK_FOLDER / 'state.json', 200)
    return rows, tmp_path / 'out'


def test_other_arguments_start_over(tmp_path):
    rows, out = _interrupted(tmp_path)
    output = finish(start(JSON, _flags(rows, out, ['--concat_tokens', '48'])))
    assert f'an unfinished conversion with other arguments or inputs lies in {out}/.data_prep; starting over' in output
    finish(start(JSON, _flags(rows, tmp_path / 'whole', ['--concat_tokens', '48'])))
    assert digest(out) == digest(tmp_path / 'whole')


def test_changed_input_starts_over(tmp_path):
    rows, out = _interrupted(tmp_path)
    write_jsonl(rows, random_texts(1500, seed=9))
    assert 'starting over' in finish(start(JSON, _flags(rows, out)))
    finish(start(JSON, _flags(rows, tmp_path / 'whole')))
    assert digest(out) == digest(tmp_path / 'whole')


def test_killed_while_publishing(tmp_path, monkeypatch):
    """Shards have moved, the index has not: the rerun finishes the move and tokenises nothing."""
    from llmfoundry.command_utils.data_prep import journal
    from llmfoundry.command_utils.data_prep.convert_dataset_json import convert_dataset_json

    rows = write_jsonl(tmp_path / 'rows.jsonl', random_texts(100))
    arguments = {'concat_tokens': 32, 'tokenizer': GPT2, 'eos_text': EOS, 'processes': 1}
    convert_dataset_json(str(rows), str(tmp_path / 'whole'), **arguments)
    replace = os.replace

    def killed(source, target):
        replace(source, target)
        if str(target).endswith('out/shard.00000.mds'):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal.os, 'replace', killed)
        with pytest.raises(KeyboardInterrupt):
            convert_dataset_json(str(rows), str(tmp_path / 'out'), **arguments)
    assert not (tmp_path / 'out' / 'index.json').exists()
    summary = convert_dataset_json(str(rows), str(tmp_path / 'out'), **arguments)
    assert summary.resumed and summary.engine == 'none'
    assert digest(tmp_path / 'out') == digest(tmp_path / 'whole')


def test_a_dead_worker_is_one_clear_error_and_the_run_can_go_on(tmp_path):
    rows = write_jsonl(tmp_path / 'rows.jsonl', random_texts(1500))
    out = tmp_path / 'out'
    process = start(JSON, _flags(rows, out), brake=0.05)
    deadline = time.monotonic() + 60
    while not (out / WORK_FOLDER / 'state.json').exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    children = [int(c) for t in Path(f'/proc/{process.pid}/task').iterdir() for c in (t / 'children').read_text().split()]
    os.kill(children[0], signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert 'error: a tokenising process ended with code -9 (killed, probably for lack of memory: pass fewer --processes)' in output
    assert 'Traceback' not in output
    finish(start(JSON, _flags(rows, out)))
    finish(start(JSON, _flags(rows, tmp_path / 'whole')))
    assert digest(out) == digest(tmp_path / 'whole')
