"""A run killed in mid-epoch and started again computes what the uninterrupted run computes, to the last bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.finetuning_runs import finetuning_config, write_jsonl
from tests.helpers.train_runs import losses_in, make_data, run_config, start_training, tiny_config, train_losses

STEPS = 40


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp('resume'), num_train=8 * 30)


def _kill_after(process, folder: Path, step: int) -> None:  # noqa: ANN001
    """SIGKILL to the whole process group, as a machine that goes away."""
    deadline = time.monotonic() + 300
    while max(losses_in(folder), default=-1) < step:
        assert process.poll() is None and time.monotonic() < deadline, (folder / 'out.txt').read_text()[-3000:]
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize('kind', ['text', 'packed finetuning'])
def test_killed_and_resumed_equals_uninterrupted(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Dropout, shuffling, Adam, an epoch boundary after step 30, checkpoints every 7 steps; killed once in each epoch."""
    config = tiny_config(data, max_duration=f'{STEPS}ba', device_train_microbatch_size='auto')
    if kind != 'text':
        monkeypatch.setenv('LLMFOUNDRY_CACHE', str(tmp_path / 'cache'))
        rows = write_jsonl(tmp_path / 'train.jsonl', 512)
        source = {'hf_name': 'json', 'hf_kwargs': {'data_files': str(rows), 'cache_dir': str(tmp_path / 'hf')}, 'split': 'train', 'packing': True}
        config = finetuning_config(source, max_duration=f'{STEPS}ba', device_train_microbatch_size='auto')
        config['model']['resid_pdrop'] = 0.1
        config['train_loader']['drop_last'] = True
    whole = train_losses(run_config(config))
    saving = {**config, 'run_name': 'killed', 'save_folder': str(tmp_path / 'ckpt'), 'save_interval': '7ba', 'save_num_checkpoints_to_keep': 2}
    folder = tmp_path / 'run'
    for step in (17, 33):
        process = start_training(saving, folder, launcher=False)
        _kill_after(process, folder, step)
    assert start_training(saving, folder, launcher=False).wait(300) == 0, (folder / 'out.txt').read_text()[-3000:]

    rows = (folder / 'metrics.jsonl').read_text().count('loss/train/total')
    assert STEPS < rows <= STEPS + 2 * 7 + 4, 'the runs resumed from a checkpoint instead of starting over'
    resumed = losses_in(folder)
    assert [resumed[i] for i in sorted(resumed)] == whole
    assert 'as in the checkpoint' in (folder / 'out.txt').read_text()


def test_a_truncated_latest_is_skipped_and_the_losses_still_agree(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    ckpt = tmp_path / 'ckpt'
    config = tiny_config(data, run_name='r', save_folder=str(ckpt), save_interval='4ba')
    whole = train_losses(run_config(config, 'max_duration=12ba'))
    for path in ckpt.glob('ep0-ba12*'):
        path.unlink()
    newest = ckpt / 'ep0-ba8-rank0.pt'
    (ckpt / 'latest-rank0.pt').unlink()
    (ckpt / 'latest-rank0.pt').symlink_to(newest.name)
    os.truncate(newest, newest.stat().st_size // 2)
    resumed = train_losses(run_config(config, 'max_duration=12ba'))
    assert resumed == whole[4:]
    out = capsys.readouterr().out
    assert 'ep0-ba8-rank0.pt is damaged' in out and 'now names ep0-ba4-rank0.pt' in out


def test_a_finished_run_says_so(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, run_name='r', save_folder=str(tmp_path), max_duration='2ba')
    run_config(config)
    with pytest.raises(ValueError, match='max_duration: 2ba is reached already: the checkpoint .* is at batch 2'):
        run_config(config)


def test_load_path_and_weights_only(data: Path, tmp_path: Path) -> None:
    first = run_config(tiny_config(data, save_folder=str(tmp_path / 'a'), save_interval='3ba', max_duration='3ba'))
    config = tiny_config(data, load_path=str(tmp_path / 'a' / 'ep0-ba3-rank0.pt'))
    assert len(train_losses(run_config(config))) == 3
    weights = run_config({**config, 'load_weights_only': True, 'max_duration': '1ba'})
    assert int(weights.state.timestamp.batch) == 1
    assert train_losses(weights)[0] < train_losses(first)[0]
