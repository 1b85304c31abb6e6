"""Finetuning through the real trainer: every source and packing trains, packed rows compute what separate ones do, and an interrupted run goes on with identical batches and losses."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, Iterator

import pytest
from composer import Callback

from llmfoundry import registry
from tests.helpers.finetuning_runs import SEQ_LEN, finetuning_config, write_example_mds, write_jsonl
from tests.helpers.train_runs import metrics_of, run_config, start_training, train_losses

EXAMPLES = 103


class BatchRecorder(Callback):
    """Notes a checksum of each batch that is trained."""

    seen: list[int] = []

    def batch_start(self, state: Any, logger: Any) -> None:
        tensors = (state.batch[key] for key in ('input_ids', 'labels', 'sequence_id'))
        self.seen.append(zlib.crc32(b''.join(t.numpy().tobytes() for t in tensors)))


@pytest.fixture(autouse=True)
def recorder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv('LLMFOUNDRY_CACHE', str(tmp_path_factory.getbasetemp() / 'finetuning_cache'))
    BatchRecorder.seen.clear()
    with registry.save_registry():
        registry.callbacks.register('batch_recorder', func=BatchRecorder)
        yield


@pytest.fixture(scope='module')
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp('finetuning')
    rows = write_jsonl(root / 'train.jsonl', EXAMPLES)
    write_example_mds(root / 'mds' / 'train', EXAMPLES)
    kwargs = {'data_files': str(rows), 'cache_dir': str(root / 'hf')}
    return {'files': {'hf_name': 'json', 'hf_kwargs': kwargs, 'split': 'train'}, 'mds': {'local': str(root / 'mds'), 'split': 'train'}}


def config(source: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return finetuning_config(source, **{'callbacks': {'batch_recorder': {}}, **changes})


@pytest.mark.parametrize(('kind', 'packing', 'batches'), [
    ('files', {'packing': True}, 7), ('files', {'packing_ratio': 1.5}, 9), ('files', {}, 13), ('mds', {'packing_ratio': 1.5}, 9), ('mds', {}, 13),
])  # fmt: skip
def test_interrupted_runs_see_the_same_batches(sources: dict[str, Any], tmp_path: Path, kind: str, packing: dict[str, Any], batches: int) -> None:
    """Stopped in mid-epoch, exactly at the end of the first epoch, and once more in the second."""
    source = {**sources[kind], **packing}
    whole = run_config(config(source, max_duration='3ep'))
    expected, losses = list(BatchRecorder.seen), train_losses(whole)
    assert len(losses) == 3 * batches == len(set(expected))
    BatchRecorder.seen.clear()
    resumed: list[float] = []
    for duration in ('3ba', '1ep', f'{batches + 2}ba', '3ep'):
        run = run_config(config(source, max_duration=duration, run_name='r', save_folder=str(tmp_path), save_interval=duration if duration.endswith('ep') else '1ba'))
        resumed += train_losses(run)
    assert BatchRecorder.seen == expected
    assert resumed == losses


def test_workers_and_checkpoints_between_batches(sources: dict[str, Any], tmp_path: Path) -> None:
    """With loader workers, which read ahead of what is trained."""
    source = {**sources['files'], 'packing': True}
    run_config(config(source, max_duration='10ba'))
    expected = list(BatchRecorder.seen)
    BatchRecorder.seen.clear()
    for duration in ('4ba', '10ba'):
        changed = config(source, max_duration=duration, run_name='r', save_folder=str(tmp_path), save_interval='4ba')
        changed['train_loader']['num_workers'] = 2
        run_config(changed)
    assert BatchRecorder.seen == expected


def test_packed_training_is_separate_training(sources: dict[str, Any]) -> None:
    """One step over all examples, packed and not: the same loss, the same tokens, the same weights after it."""
    runs = [run_config(config({**sources['files'], 'packing': packing}, max_duration='2ba', global_train_batch_size=rows)) for packing, rows in ((True, 53), (False, EXAMPLES))]
    packed, apart = (run.state for run in runs)
    assert int(packed.timestamp.batch) == int(apart.timestamp.batch) == 2
    assert int(packed.timestamp.token) == int(apart.timestamp.token)
    assert train_losses(runs[0]) == pytest.approx(train_losses(runs[1]), abs=1e-5)
    assert train_losses(runs[0])[1] < train_losses(runs[0])[0]


def hf_gpt2(folder: Path) -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).save_pretrained(folder)
    return {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': str(folder), 'pretrained': True}


@pytest.mark.parametrize('kind', ['files', 'mds'])
def test_a_transformers_model_trains_on_packed_rows_and_is_evaluated(sources: dict[str, Any], tmp_path: Path, kind: str) -> None:
    source = {**sources[kind], 'packing': True}
    evaluated = {'name': 'finetuning', 'num_workers': 0, 'drop_last': False, 'dataset': {**sources[kind], 'shuffle': False, 'decoder_only_format': True, 'max_seq_len': SEQ_LEN}}
    run = run_config(config(source, model=hf_gpt2(tmp_path / 'model'), eval_loader=evaluated, max_duration='2ep', eval_interval='1ep', eval_first=True))
    losses = train_losses(run)
    assert losses[-1] < losses[0] - 0.5
    evaluations = metrics_of(run, 'metrics/eval/LanguageCrossEntropy')
    assert len(evaluations) == 3 and evaluations[-1] < evaluations[0] - 0.5
    assert metrics_of(run, 'loss/train/total')[-1] == pytest.approx(evaluations[-1], abs=0.5)


@pytest.mark.slow
def test_the_command_trains_a_packed_mpt_on_two_ranks_and_goes_on_after_being_stopped(sources: dict[str, Any], tmp_path: Path) -> None:
    """The real command, two processes, stopped and started again; the losses are those of one process without a stop."""
    source = {**sources['files'], 'packing': True}
    whole = train_losses(run_config(config(source, max_duration='9ba')))
    plain = finetuning_config(source, run_name='r', save_folder=str(tmp_path / 'ckpt'), save_interval='4ba')
    for duration in ('4ba', '9ba'):
        process = start_training({**plain, 'max_duration': duration}, tmp_path / 'run', ranks=2)
        assert process.wait(400) == 0, (tmp_path / 'run' / 'out.txt').read_text()[-3000:]
    rows = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    resumed = [row['loss/train/total'] for row in rows if 'loss/train/total' in row]
    assert resumed == pytest.approx(whole, abs=1e-5)
