"""One YAML on 1, 2 and 4 processes: the same samples at each step, the same losses, also across a resume with another number of processes; and what happens when the samples are not the same."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmfoundry.errors import DataError
from tests.helpers.finetuning_runs import finetuning_config, write_example_mds, write_jsonl
from tests.helpers.train_runs import ROOT, make_data, run_config, tiny_config, train_losses
from tests.helpers.workspace import command_environment

# Steps 1 to 7 and a checkpoint, in the middle of an epoch of every kind of data; then two more.
SAVED, STEPS = 7, 9
KINDS = ('text', 'text to the last sample', 'rows', 'packed rows', 'examples', 'packed examples')
RUN_ALL = """
import json, sys
from pathlib import Path
from tests.integration.test_elastic_samples import measured
from llmfoundry import dist
results = {name: measured(config) for name, config in json.loads(Path(sys.argv[1]).read_text()).items()}
if dist.get_global_rank() == 0:
    Path(sys.argv[2]).write_text(json.dumps(results))
"""


def chain_of(trainer: Any) -> Any:
    """The record of the samples that a run was trained on."""
    chain = next(c for c in trainer.state.callbacks if type(c).__name__ == 'SampleChain')
    chain.state_dict()
    return chain.record


def measured(config: dict[str, Any]) -> dict[str, Any]:
    """Losses of each step, the chain over all samples of the run, and the number of steps in an epoch."""
    trainer = run_config(config)
    record = chain_of(trainer)
    return {'losses': train_losses(trainer), 'chain': record.value, 'last_step': record.last_step, 'epoch_steps': len(trainer.state.train_dataloader)}


def base_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """One config for each kind of data; none of them holds a whole number of batches of 8."""
    text = tiny_config(folder / 'text')
    text['model']['resid_pdrop'] = 0.0
    to_the_end = copy.deepcopy(text)
    to_the_end['train_loader']['drop_last'] = False
    jsonl = {'hf_name': 'json', 'hf_kwargs': {'data_files': str(folder / 'train.jsonl'), 'cache_dir': str(folder / 'hf')}, 'split': 'train'}
    mds = {'local': str(folder / 'mds'), 'split': 'train'}
    found = {
        'text': text,
        'text to the last sample': to_the_end,
        'rows': finetuning_config(jsonl),
        'packed rows': finetuning_config({**jsonl, 'packing': True}),
        'examples': finetuning_config(mds),
        # 18 examples a step, which four processes cannot share evenly.
        'packed examples': finetuning_config({**mds, 'packing_ratio': 2.3}),
    }
    for kind, config in found.items():
        if 'packed' in kind:
            config['model']['attn_config'] = {**config['model']['attn_config'], 'attn_uses_sequence_id': True}
        config['max_duration'] = f'{STEPS}ba'
    return found


def with_workers(config: dict[str, Any], num_workers: int) -> dict[str, Any]:
    return {**config, 'train_loader': {**config['train_loader'], 'num_workers': num_workers}}


def saving(config: dict[str, Any], folder: Path, kind: str, ranks: int) -> dict[str, Any]:
    return {**config, 'save_folder': str(folder / 'ckpt' / f'{kind}-{ranks}'), 'save_interval': f'{SAVED}ba'}


def resumed(config: dict[str, Any], folder: Path, kind: str, ranks_before: int) -> dict[str, Any]:
    return {**config, 'load_path': str(folder / 'ckpt' / f'{kind}-{ranks_before}' / f'ba{SAVED}-rank0.pt')}


class Jobs:
    """Runs of one number of processes, in one launch."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder, self.ranks = folder, ranks
        self.configs: dict[str, dict[str, Any]] = {}

    def run(self) -> dict[str, dict[str, Any]]:
        if self.ranks == 1:
            return {name: measured(config) for name, config in self.configs.items()}
        jobs, out, script = (self.folder / f'{name}-{self.ranks}' for name in ('jobs.json', 'out.json', 'run_all.py'))
        jobs.write_text(json.dumps(self.configs))
        script.write_text(RUN_ALL)
        command = [str(Path(sys.executable).parent / 'composer'), '-n', str(self.ranks), str(script), str(jobs), str(out)]
        done = subprocess.run(command, cwd=self.folder, env=command_environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        return json.loads(out.read_text())


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('elastic')
    make_data(folder / 'text', num_train=47)
    write_jsonl(folder / 'train.jsonl', 45)
    write_example_mds(folder / 'mds' / 'train', 93)
    return folder


@pytest.fixture(scope='module')
def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Results of every run by '<kind>, <ranks before>><ranks after>' or '<kind>, <ranks>'."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LLMFOUNDRY_CACHE', str(folder / 'cache'))
        base = {kind: {**config, 'save_filename': 'ba{batch}-rank{rank}.pt', 'save_latest_filename': None} for kind, config in base_configs(folder).items()}
        one, two, four, again = (Jobs(folder, ranks) for ranks in (1, 2, 4, 1))
        for kind, config in base.items():
            one.configs[f'{kind}, 1'] = saving(config, folder, kind, 1)
            two.configs[f'{kind}, 2'] = saving(with_workers(config, 2), folder, kind, 2)
            two.configs[f'{kind}, 1>2'] = resumed(config, folder, kind, 1)
            four.configs[f'{kind}, 4'] = saving(config, folder, kind, 4)
            four.configs[f'{kind}, 2>4'] = resumed(config, folder, kind, 2)
            again.configs[f'{kind}, 2>1'] = resumed(with_workers(config, 2), folder, kind, 2)
            again.configs[f'{kind}, 4>1'] = resumed(config, folder, kind, 4)
        sharded = {**base['text'], 'fsdp_config': {'sharding_strategy': 'FULL_SHARD', 'state_dict_type': 'sharded', 'mixed_precision': 'FULL'}}
        two.configs['text, 2 sharded'] = {**saving(sharded, folder, 'sharded', 2), 'save_filename': 'ba{batch}-rank{rank}.pt'}
        four.configs['text, 2>4 sharded'] = {**sharded, 'load_path': str(folder / 'ckpt' / 'sharded-2' / f'ep1-ba{SAVED}')}
        return {name: result for jobs in (one, two, four, again) for name, result in jobs.run().items()}


@pytest.mark.parametrize('ranks', [2, 4])
@pytest.mark.parametrize('kind', KINDS)
def test_any_number_of_processes_trains_on_the_same_samples_with_the_same_losses(results: dict[str, dict[str, Any]], kind: str, ranks: int) -> None:
    alone, shared = results[f'{kind}, 1'], results[f'{kind}, {ranks}']
    assert len(alone['losses']) == alone['last_step'] == STEPS
    assert shared['chain'] == alone['chain']
    assert shared['epoch_steps'] == alone['epoch_steps']
    assert shared['losses'] == pytest.approx(alone['losses'], abs=1e-5)


@pytest.mark.parametrize('ranks', ['1>2', '2>1', '2>4', '4>1'])
@pytest.mark.parametrize('kind', KINDS)
def test_a_resume_with_another_number_of_processes_goes_on_with_the_same_samples(results: dict[str, dict[str, Any]], kind: str, ranks: str) -> None:
    whole, second_half = results[f'{kind}, 1'], results[f'{kind}, {ranks}']
    assert (second_half['chain'], second_half['last_step']) == (whole['chain'], STEPS)
    assert second_half['losses'] == pytest.approx(whole['losses'][SAVED:], abs=1e-5)


def test_the_chain_is_in_sharded_checkpoints_too(results: dict[str, dict[str, Any]]) -> None:
    whole = results['text, 1']
    assert results['text, 2 sharded']['chain'] == results['text, 2>4 sharded']['chain'] == whole['chain']
    assert results['text, 2>4 sharded']['losses'] == pytest.approx(whole['losses'][SAVED:], abs=1e-5)


def test_kinds_of_data_have_different_chains(results: dict[str, dict[str, Any]]) -> None:
    """A chain that did not look at the samples would be the same for all."""
    assert len({results[f'{kind}, 1']['chain'] for kind in KINDS}) == len(KINDS)


def resume_text(folder: Path, *overrides: str, data: str = 'text') -> Any:
    config = base_configs(folder)['text']
    config['train_loader']['dataset']['local'] = str(folder / data)
    return run_config(resumed(config, folder, 'text', 2), *overrides)


def test_another_seed_is_named_with_the_first_step_that_differs(results: dict[str, dict[str, Any]], folder: Path) -> None:
    with pytest.raises(DataError) as error:
        resume_text(folder, 'train_loader.dataset.shuffle_seed=17')
    text = str(error.value)
    # Five steps in the first epoch, so the checkpoint holds the digests of steps 6 and 7.
    assert 'the first step that differs is step 6 of the run (epoch 1; steps 6 to 7 were compared)' in text
    assert 'It was trained on 8 other samples than those that it would get now (' in text
    assert 'changed: shuffle_seed: 9176 -> 17' in text
    assert "load_ignore_keys: ['state/callbacks/SampleChain*']" in text


def test_the_way_out_that_the_message_names_works(results: dict[str, dict[str, Any]], folder: Path) -> None:
    trainer = resume_text(folder, 'train_loader.dataset.shuffle_seed=17', "load_ignore_keys=['state/callbacks/SampleChain*']")
    record = chain_of(trainer)
    assert int(trainer.state.timestamp.batch) == STEPS
    # Begun in mid-epoch, so the next resume has nothing to compare it with.
    assert (record.first_step, record.last_step, record.skipped) == (SAVED, STEPS, None)


def test_shards_that_were_exchanged_are_named(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Of the same size and with the same index, so that the numbers of the samples are the same."""
    shutil.copytree(folder / 'text', folder / 'swapped')
    first, second = (folder / 'swapped' / 'train' / f'shard.0000{i}.mds' for i in (0, 1))
    assert first.stat().st_size == second.stat().st_size
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with pytest.raises(DataError, match=r'shard 0 holds other bytes, first read in step 6 of the run \(2 of 3 shards'):
        resume_text(folder, data='swapped')


def test_other_data_is_named(results: dict[str, dict[str, Any]], folder: Path) -> None:
    make_data(folder / 'more', num_train=48)
    with pytest.raises(DataError, match=r'the first step that differs is step 6(.|\n)*changed: data index of stream 0: \w+ -> \w+\n  changed: samples per epoch: 47 -> 48'):
        resume_text(folder, data='more')


def test_another_global_batch_goes_on_behind_the_samples_that_are_done(results: dict[str, dict[str, Any]], folder: Path) -> None:
    record = chain_of(resume_text(folder, 'global_train_batch_size=16'))
    assert record.counts.tolist() == [8, 8, 16] and record.epoch == 1


def test_a_resume_at_the_end_of_an_epoch_may_change_the_data(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = base_configs(folder)['text']
    run_config({**config, 'save_folder': str(tmp_path), 'save_interval': '1ep'}, 'max_duration=1ep')
    (saved,) = tmp_path.glob('ep1-ba5-rank0.pt')
    record = chain_of(run_config({**config, 'load_path': str(saved)}, 'max_duration=2ep', 'train_loader.dataset.shuffle_seed=17'))
    assert 'The epoch that begins has other samples' in caplog.text and 'step 1 of the run (epoch 0; steps 1 to 5 were compared)' in caplog.text
    assert (record.epoch, record.first_step, record.last_step) == (1, 5, 10)
