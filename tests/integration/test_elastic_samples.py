"""One YAML on 1, 2 and 4 processes: the same samples at each step, the same losses, also across a resume with another number of processes; and what happens when the samples are not the same."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any, Iterator

import pytest
from streaming import MDSWriter

from llmfoundry.errors import DataError
from tests.helpers.finetuning_runs import finetuning_config
from tests.helpers.small_tokenizer import write_small_tokenizer
from tests.helpers.train_runs import make_data, run_config, run_script, tiny_config, train_losses

# A relay from 1 to 2 to 4 to 1 processes, changing hands in the middle of an epoch of every kind of data, and a run of one process beside it.
FIRST, SECOND, THIRD, STEPS = 4, 7, 10, 12
KINDS = ('text', 'rows', 'packed rows', 'examples', 'packed examples')
VOCAB = 41
WORDS = [f'w{i}' for i in range(40)]
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


def write_data(folder: Path) -> None:
    """Tokens, and examples of 6 to 40 tokens as JSON lines and as shards; a tokenizer of few words, since loading a large one takes longer than these runs."""
    make_data(folder / 'text', num_train=47)
    rng = random.Random(0)
    rows = [{key: ' '.join(rng.choices(WORDS, k=rng.randint(3, 20))) for key in ('prompt', 'response')} for _ in range(93)]
    (folder / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows[:45]))
    with MDSWriter(columns={'prompt': 'str', 'response': 'str'}, out=str(folder / 'mds' / 'train'), size_limit=3000) as out:
        for row in rows:
            out.write(row)
    write_small_tokenizer(folder / 'tokenizer', VOCAB)


def base_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """One config for each kind of data; none of them holds a whole number of batches of 8."""
    jsonl = {'hf_name': 'json', 'hf_kwargs': {'data_files': str(folder / 'train.jsonl'), 'cache_dir': str(folder / 'hf')}, 'split': 'train'}
    mds = {'local': str(folder / 'mds'), 'split': 'train'}
    found = {
        'text': tiny_config(folder / 'text'),
        'rows': finetuning_config(jsonl),
        'packed rows': finetuning_config({**jsonl, 'packing': True}),
        'examples': finetuning_config(mds),
        # 18 examples a step, which four processes cannot share evenly.
        'packed examples': finetuning_config({**mds, 'packing_ratio': 2.3}),
    }
    for kind, config in found.items():
        config['model'] |= {'resid_pdrop': 0.0, 'vocab_size': VOCAB}
        config['model']['attn_config'] |= {'attn_uses_sequence_id': 'packed' in kind}
        config['tokenizer'] = {'name': str(folder / 'tokenizer')}
        config |= {'max_duration': f'{STEPS}ba', 'device_train_microbatch_size': 2, 'save_filename': 'ba{batch}-rank{rank}.pt', 'save_latest_filename': None}
        # The relay's first runner takes the last samples of an epoch too.
        config['train_loader']['drop_last'] = False
    return found


def with_workers(config: dict[str, Any], num_workers: int) -> dict[str, Any]:
    return {**config, 'train_loader': {**config['train_loader'], 'num_workers': num_workers}}


def saving(config: dict[str, Any], folder: Path, name: str, step: int) -> dict[str, Any]:
    """Trains up to ``step`` and saves there."""
    return {**config, 'save_folder': str(folder / 'ckpt' / name), 'save_interval': f'{step}ba', 'max_duration': f'{step}ba'}


def resumed(config: dict[str, Any], folder: Path, name: str, step: int) -> dict[str, Any]:
    return {**config, 'load_path': str(folder / 'ckpt' / name / f'ba{step}-rank0.pt')}


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
        run_script(self.folder, script, jobs, out, ranks=self.ranks, timeout=900)
        return json.loads(out.read_text())


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('elastic')
    write_data(folder)
    return folder


@pytest.fixture(scope='module')
def alone(folder: Path) -> Iterator[dict[str, dict[str, Any]]]:
    """Runs of one process by '<kind>, whole', uninterrupted, and '<kind>, 0>1', which hands over after ``FIRST`` steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LLMFOUNDRY_CACHE', str(folder / 'cache'))
        jobs = Jobs(folder, 1)
        for kind, config in base_configs(folder).items():
            jobs.configs[f'{kind}, whole'] = config
            jobs.configs[f'{kind}, 0>1'] = saving(config, folder, f'{kind}-1', FIRST)
        yield jobs.run()


@pytest.fixture(scope='module')
def results(folder: Path, alone: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results by '<kind>, <processes before>><processes>', and those of ``alone``."""
    two, four, again = (Jobs(folder, ranks) for ranks in (2, 4, 1))
    for kind, config in base_configs(folder).items():
        two.configs[f'{kind}, 1>2'] = saving(resumed(with_workers(config, 2), folder, f'{kind}-1', FIRST), folder, f'{kind}-2', SECOND)
        four.configs[f'{kind}, 2>4'] = saving(resumed(config, folder, f'{kind}-2', SECOND), folder, f'{kind}-4', THIRD)
        again.configs[f'{kind}, 4>1'] = resumed(config, folder, f'{kind}-4', THIRD)
        again.configs[f'{kind}, 2>1'] = resumed(with_workers(config, 2), folder, f'{kind}-2', SECOND)
    sharded = {**base_configs(folder)['text'], 'fsdp_config': {'sharding_strategy': 'FULL_SHARD', 'state_dict_type': 'sharded', 'mixed_precision': 'FULL'}}
    two.configs['sharded, 0>2'] = saving(sharded, folder, 'sharded-2', SECOND)
    four.configs['sharded, 2>4'] = {**sharded, 'load_path': str(folder / 'ckpt' / 'sharded-2' / f'ep1-ba{SECOND}')}
    return {**alone, **{name: result for jobs in (two, four, again) for name, result in jobs.run().items()}}


@pytest.mark.parametrize('kind', KINDS)
def test_any_number_of_processes_trains_on_the_same_samples_with_the_same_losses(results: dict[str, dict[str, Any]], kind: str) -> None:
    whole = results[f'{kind}, whole']
    assert len(whole['losses']) == whole['last_step'] == STEPS
    relay = [results[f'{kind}, {hand}'] for hand in ('0>1', '1>2', '2>4', '4>1')]
    assert [part['last_step'] for part in relay] == [FIRST, SECOND, THIRD, STEPS]
    assert [loss for part in relay for loss in part['losses']] == pytest.approx(whole['losses'], abs=1e-5)
    assert relay[-1]['chain'] == whole['chain']
    assert {part['epoch_steps'] for part in relay} == {whole['epoch_steps']}
    back = results[f'{kind}, 2>1']
    assert back['losses'] == pytest.approx(whole['losses'][SECOND:], abs=1e-5) and back['chain'] == whole['chain']


def test_the_chain_is_in_sharded_checkpoints_too(results: dict[str, dict[str, Any]]) -> None:
    whole, before, after = (results[name] for name in ('text, whole', 'sharded, 0>2', 'sharded, 2>4'))
    assert before['losses'] + after['losses'] == pytest.approx(whole['losses'], abs=1e-5)
    assert after['chain'] == whole['chain']


def test_kinds_of_data_have_different_chains(alone: dict[str, dict[str, Any]]) -> None:
    """A chain that did not look at the samples would be the same for all."""
    assert len({alone[f'{kind}, whole']['chain'] for kind in KINDS}) == len(KINDS)


def resume_text(folder: Path, *overrides: str, data: str = 'text') -> Any:
    config = base_configs(folder)['text']
    config['train_loader']['dataset']['local'] = str(folder / data)
    return run_config(resumed(config, folder, 'text-1', FIRST), f'max_duration={FIRST + 1}ba', *overrides)


def test_another_seed_is_named_with_the_first_step_that_differs(alone: dict[str, dict[str, Any]], folder: Path) -> None:
    with pytest.raises(DataError) as error:
        resume_text(folder, 'train_loader.dataset.shuffle_seed=17')
    text = str(error.value)
    assert 'the first step that differs is step 1 of the run (epoch 0; steps 1 to 4 were compared)' in text
    assert 'It was trained on 8 other samples than those that it would get now (' in text
    assert 'changed: shuffle_seed: 9176 -> 17' in text
    assert 'set the environment variable LLMFOUNDRY_IGNORE_SAMPLE_CHAIN=1' in text


def test_the_way_out_that_the_message_names_works(
    alone: dict[str, dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setenv('LLMFOUNDRY_IGNORE_SAMPLE_CHAIN', '1')
    record = chain_of(resume_text(folder, 'train_loader.dataset.shuffle_seed=17'))
    # Begun in mid-epoch, so the next resume has nothing to compare it with.
    assert (record.first_step, record.last_step, record.skipped) == (FIRST, FIRST + 1, None)
    said = capsys.readouterr().err
    assert 'the first step that differs is step 1' in said
    assert 'dataset.shuffle_seed: the checkpoint goes on with its own, 9176, and not with the 17 of the config' in said
    assert record.facts['shuffle_seed'] == 9176


def test_shards_that_were_exchanged_are_named(alone: dict[str, dict[str, Any]], folder: Path) -> None:
    """Of the same size and with the same index, so that the numbers of the samples are the same."""
    shutil.copytree(folder / 'text', folder / 'swapped')
    first, second = (folder / 'swapped' / 'train' / f'shard.0000{i}.mds' for i in (0, 1))
    assert first.stat().st_size == second.stat().st_size
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])
    with pytest.raises(DataError, match=r'swapped/train/shard\.00000\.mds holds other bytes, first read in step 1 of the run \(2 of 3 shards'):
        resume_text(folder, data='swapped')


def test_other_data_is_named(alone: dict[str, dict[str, Any]], folder: Path) -> None:
    make_data(folder / 'more', num_train=48)
    with pytest.raises(DataError, match=r'the first step that differs is step 1(.|\n)*changed: data index of stream 0: \w+ -> \w+\n  changed: samples per epoch of stream 0: 47 -> 48'):
        resume_text(folder, data='more')


def test_another_global_batch_goes_on_behind_the_samples_that_are_done(alone: dict[str, dict[str, Any]], folder: Path) -> None:
    record = chain_of(resume_text(folder, 'global_train_batch_size=16'))
    assert record.counts.tolist() == [8, 8, 8, 8, 15] and record.epoch == 0


def test_a_resume_at_the_end_of_an_epoch_may_change_the_data(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = base_configs(folder)['text']
    run_config({**config, 'save_folder': str(tmp_path), 'save_interval': '1ep'}, 'max_duration=1ep')
    (saved,) = tmp_path.glob('ba6-rank0.pt')
    record = chain_of(run_config({**config, 'load_path': str(saved)}, 'max_duration=2ep', 'train_loader.dataset.shuffle_seed=17'))
    said = capsys.readouterr().err
    assert 'The epoch that begins has other samples' in said and 'step 1 of the run (epoch 0; steps 1 to 6 were compared)' in said
    assert (record.epoch, record.first_step, record.last_step) == (1, 6, 12)
