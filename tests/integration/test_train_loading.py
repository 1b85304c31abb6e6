"""What a run starts from: whole checkpoints only, of either form, agreed by all ranks, and nothing in them is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import filesystem, metadata

from llmfoundry import registry
from llmfoundry.checkpoint.integrity import SEAL_FILE
from llmfoundry.checkpoint.metadata_file import METADATA_FILE, read_metadata
from llmfoundry.errors import CheckpointError, ConfigError, UnsafeCheckpointError
from tests.helpers.small_tokenizer import write_small_tokenizer
from tests.helpers.train_runs import make_data, run_config, run_script, start_training, tiny_config, train_losses

STEPS, SAVED_AT = 6, 3
SHARDED = {'sharding_strategy': 'FULL_SHARD', 'mixed_precision': 'FULL', 'state_dict_type': 'sharded'}

# Two ranks, one run after the other; each rank reports what it saw: losses, or the error.
TWO_RANKS = """
import json, sys, time
from pathlib import Path
from llmfoundry import dist
from tests.helpers.train_runs import run_config, train_losses
from tests.integration import test_train_loading as steps

job = json.load(open(sys.argv[1]))
folder, config, seen = Path(job['folder']), job['config'], {}

def attempt(name, *overrides, prepare=None):
    if prepare is not None:
        dist.on_rank_zero(lambda: prepare(folder))
    start = time.monotonic()
    try:
        seen[name] = train_losses(run_config(config, *overrides))
    except Exception as e:
        seen[name] = f'{type(e).__name__}: {e}'
    seen[name + ' seconds'] = time.monotonic() - start

saving = [f'save_folder={folder}/own', 'run_name=own', f'save_interval={steps.SAVED_AT}ba']
attempt('whole', *saving)
dist.barrier()
for name in steps.SCENARIOS:
    attempt(name, f'load_path={folder}/{name}', prepare=steps.SCENARIOS[name])
full = ['fsdp_config.state_dict_type=full', 'fsdp_config.load_monolith_rank0_only=true']
attempt('rank 0 only, not mixed', f'load_path={folder}/one file', *full)
full.append('model.init_device=mixed')
attempt('rank 0 only', f'load_path={folder}/one file', *full)
attempt('rank 0 only, evil', f'load_path={folder}/evil file', *full)
attempt('resumed', *saving, prepare=steps.damage_the_newest)
json.dump(seen, open(folder / f'seen{dist.get_global_rank()}.json', 'w'))
"""


class Exploit:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def _flip(path: Path, position: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1
    path.write_bytes(data)


def _copy(folder: Path, name: str) -> Path:
    copy = Path(shutil.copytree(folder / 'own' / f'ep0-ba{SAVED_AT}', folder / name))
    (copy / SEAL_FILE).unlink(missing_ok=True)
    return copy


def _rewrite(copy: Path, change: Any) -> None:
    found = read_metadata(copy)
    change(found)
    (copy / METADATA_FILE).write_bytes(pickle.dumps(found))


def _evil_metadata(folder: Path) -> None:
    (_copy(folder, 'evil metadata') / METADATA_FILE).write_bytes(pickle.dumps(Exploit(f'touch {folder}/witness')))


def _evil_item(folder: Path) -> None:
    """A whole checkpoint, with valid checksums, in which the run's name is a call."""
    copy = _copy(folder, 'evil item')
    torch.save(Exploit(f'touch {folder}/witness'), copy / '__9_0.distcp')
    size = (copy / '__9_0.distcp').stat().st_size
    _rewrite(copy, lambda found: found.storage_data.update({metadata.MetadataIndex('state.run_name'): filesystem._StorageInfo('__9_0.distcp', 0, size)}))


def _evil_file(folder: Path) -> None:
    torch.save({'state': {'model': {}, 'run_name': Exploit(f'touch {folder}/witness')}}, folder / 'evil file')


def _outside(folder: Path) -> None:
    """Metadata that names a file of somebody else's."""
    _rewrite(_copy(folder, 'outside'), lambda found: setattr(next(iter(found.storage_data.values())), 'relative_path', '../../../etc/passwd'))


def _older_torch(folder: Path) -> None:
    """As from a torch that did not have a field of the scheduler and an option of the optimizer, and from a run without one of the callbacks."""

    def drop(found: Any) -> None:
        names = [n for n in found.state_dict_metadata if n.endswith(('._get_lr_called_within_step', '.decoupled_weight_decay')) or n.startswith('state.callbacks.SampleChain')]
        assert len(names) >= 3, sorted(found.state_dict_metadata)
        for name in names:
            del found.state_dict_metadata[name], found.planner_data[name]

    _rewrite(_copy(folder, 'older torch'), drop)


def _without_a_weight(folder: Path) -> None:
    def drop(found: Any) -> None:
        name = next(n for n in found.state_dict_metadata if n.startswith('state.model.') and n.endswith('up_proj.weight'))
        del found.state_dict_metadata[name], found.planner_data[name]

    _rewrite(_copy(folder, 'without a weight'), drop)


def _one_file(folder: Path) -> None:
    from llmfoundry.checkpoint.convert_form import convert_form

    convert_form(folder / 'own' / f'ep0-ba{SAVED_AT}', folder / 'one file', sharded=False)


def _and_back(folder: Path) -> None:
    from llmfoundry.checkpoint.convert_form import convert_form

    convert_form(folder / 'one file', folder / 'and back', sharded=True)


def damage_the_newest(folder: Path) -> None:
    """One flipped byte in a weight in the shard of the last rank; the length is right."""
    newest = folder / 'own' / f'ep0-ba{STEPS}'
    shard = newest / '__1_0.distcp'
    place = max((info for info in read_metadata(newest).storage_data.values() if info.relative_path == shard.name), key=lambda info: info.length)
    item = shard.read_bytes()[place.offset : place.offset + place.length]
    _flip(shard, place.offset + item.index(torch.load(io.BytesIO(item)).contiguous().numpy().tobytes()) + 7)


SCENARIOS = {
    'one file': _one_file, 'and back': _and_back, 'older torch': _older_torch, 'without a weight': _without_a_weight, 'evil metadata': _evil_metadata, 'evil item': _evil_item,
    'evil file': _evil_file, 'outside': _outside, 'nowhere': lambda folder: None,
}


@dataclass(frozen=True)
class Runs:
    folder: Path
    seen: list[dict[str, Any]]
    output: str


def small_config(folder: Path, **changes: Any) -> dict[str, Any]:
    """A vocabulary of 41 tokens, since checkpoints are read and written many times."""
    if not (folder / 'data').exists():
        make_data(folder / 'data')
        write_small_tokenizer(folder / 'tokenizer')
    config = tiny_config(folder / 'data', **{'max_duration': f'{STEPS}ba', 'tokenizer': {'name': str(folder / 'tokenizer')}, **changes})
    return {**config, 'model': {**config['model'], 'vocab_size': 48}}


@pytest.fixture(scope='module')
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp('loading')
    config = small_config(folder, fsdp_config=SHARDED)
    (folder / 'job.json').write_text(json.dumps({'folder': str(folder), 'config': config}))
    (folder / 'two_ranks.py').write_text(TWO_RANKS)
    output = run_script(folder, folder / 'two_ranks.py', folder / 'job.json', timeout=580)
    return Runs(folder, [json.loads((folder / f'seen{rank}.json').read_text()) for rank in (0, 1)], output)


@pytest.mark.parametrize('name', ['one file', 'and back', 'older torch', 'resumed', 'rank 0 only', 'rank 0 only, not mixed'])
def test_whatever_the_form_the_same_losses_follow(runs: Runs, name: str) -> None:
    """From the middle of a run, with dropout and Adam, to the last bit."""
    assert len(runs.seen[0]['whole']) == STEPS
    assert runs.seen[0][name] == runs.seen[0]['whole'][SAVED_AT:]
    assert runs.seen[1][name] == runs.seen[1]['whole'][SAVED_AT:]


def test_rank_0_alone_reads_only_where_the_others_have_no_weights(runs: Runs) -> None:
    """Composer would leave the others with the weights that they were initialised with (losses are compared above)."""
    assert runs.output.count('load_monolith_rank0_only: used with model.init_device: mixed only') == 1


def test_what_a_newer_torch_added_is_named(runs: Runs) -> None:
    line = next(line for line in runs.output.splitlines() if line.startswith('load: the checkpoint lacks'))
    assert 'state/schedulers/LambdaLR/_get_lr_called_within_step' in line and 'param_groups/0/decoupled_weight_decay' in line and 'state/callbacks/SampleChain' in line


def test_a_missing_weight_stays_an_error(runs: Runs) -> None:
    for seen in runs.seen:
        assert seen['without a weight'].startswith('CheckpointError') and 'up_proj.weight' in seen['without a weight']


@pytest.mark.parametrize(
    ('name', 'message'), [('evil metadata', 'an object of posix.system'), ('evil item', "'state.run_name' is an object of posix.system"), ('evil file', 'an object of posix.system'),
                          ('rank 0 only, evil', 'an object of posix.system')],
)  # fmt: skip
def test_nothing_in_a_checkpoint_is_run(runs: Runs, name: str, message: str) -> None:
    assert not (runs.folder / 'witness').exists()
    for seen in runs.seen:
        assert seen[name].startswith('UnsafeCheckpointError') and message in seen[name], seen[name]


def test_files_outside_the_folder_are_not_read(runs: Runs) -> None:
    for seen in runs.seen:
        assert "names the file '../../../etc/passwd', which lies outside the folder" in seen['outside']


def test_a_missing_load_path_is_one_error_on_all_ranks(runs: Runs) -> None:
    for seen in runs.seen:
        assert seen['nowhere'].startswith('ConfigError') and "nowhere' does not exist on rank 0" in seen['nowhere'] and "holds 'and back'" in seen['nowhere']
        assert seen['nowhere seconds'] < 60


def test_one_flipped_byte_in_the_newest_is_found_and_an_older_one_continues(runs: Runs) -> None:
    assert f'autoresume: ep0-ba{STEPS} is damaged (__1_0.distcp: ' in runs.output and f'renamed to damaged-ep0-ba{STEPS}' in runs.output
    assert (runs.folder / 'own' / f'damaged-ep0-ba{STEPS}').is_dir()


def test_one_process_starts_from_shards_of_two(runs: Runs, tmp_path: Path) -> None:
    trainer = run_config(small_config(tmp_path), f'load_path={runs.folder}/own/ep0-ba{SAVED_AT}')
    saved = torch.load(runs.folder / 'one file', weights_only=False)['state']
    assert int(trainer.state.timestamp.batch) == STEPS and len(train_losses(trainer)) == STEPS - SAVED_AT
    weights = run_config(small_config(tmp_path), f'load_path={runs.folder}/own/ep0-ba{SAVED_AT}', 'load_weights_only=true', 'optimizer.lr=0.0', 'optimizer.weight_decay=0.0', 'max_duration=1ba')
    for name, tensor in weights.state.model.state_dict().items():
        assert torch.equal(tensor, saved['model'][name])


def test_the_command_ends_with_one_message(tmp_path: Path) -> None:
    _evil_file(tmp_path)
    process = start_training(small_config(tmp_path, load_path=str(tmp_path / 'evil file')), tmp_path / 'run', launcher=False)
    assert process.wait(300) == 1
    out = (tmp_path / 'run' / 'out.txt').read_text()
    assert out.count('ERROR: UnsafeCheckpointError') == 1 and 'LLMFOUNDRY_SAFE_CLASSES=posix.system' in out and 'Traceback' not in out
    assert not (tmp_path / 'witness').exists()


OWN_STATE = """
from composer.core import Callback
from llmfoundry.registry import callbacks

class Memory:
    def __init__(self):
        self.seen = []

class Rememberer(Callback):
    def __init__(self):
        self.memory = Memory()
    def batch_end(self, state, logger):
        self.memory.seen.append(int(state.timestamp.batch))
    def state_dict(self):
        return {'memory': self.memory}
    def load_state_dict(self, state):
        self.memory = state['memory']
callbacks.register('rememberer', func=Rememberer)
"""


def test_own_classes_in_a_callbacks_state_are_allowed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'plugin.py').write_text(OWN_STATE)
    config = small_config(tmp_path, code_paths=[str(tmp_path / 'plugin.py')], callbacks={'rememberer': {}}, save_folder=str(tmp_path / 'ckpt'), run_name='r', save_interval='2ba')
    with registry.save_registry():
        run_config(config, 'max_duration=2ba')
    with registry.save_registry(), pytest.raises(UnsafeCheckpointError, match=r'python_code\.Memory.*LLMFOUNDRY_SAFE_CLASSES=python_code\.Memory'):
        run_config(config, 'max_duration=4ba')
    monkeypatch.setenv('LLMFOUNDRY_SAFE_CLASSES', 'python_code.Nothing')
    with registry.save_registry(), pytest.raises(ConfigError, match='LLMFOUNDRY_SAFE_CLASSES: .*Nothing'):
        run_config(config, 'max_duration=4ba')
    monkeypatch.setenv('LLMFOUNDRY_SAFE_CLASSES', 'python_code.Memory')
    with registry.save_registry():
        trainer = run_config(config, 'max_duration=4ba')
    rememberer = next(c for c in trainer.state.callbacks if type(c).__name__ == 'Rememberer')
    assert rememberer.memory.seen == [1, 2, 3, 4]


def test_state_of_what_yamls_name_needs_no_permission(tmp_path: Path) -> None:
    """Callbacks, algorithms and metrics that keep state, saved and loaded without a word."""
    callbacks: dict[str, Any] = {
        'speed_monitor': {'window_size': 2}, 'lr_monitor': {}, 'memory_monitor': {}, 'runtime_estimator': {}, 'optimizer_monitor': {}, 'nan_monitor': {}, 'scheduled_gc': {'batch_interval': 2},
        'kill_loss_spike': {}, 'early_stopper': {'monitor': 'LanguageCrossEntropy', 'dataloader_label': 'eval', 'patience': 9},
    }
    algorithms = {'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': 1.0}}
    config = small_config(tmp_path, save_folder=str(tmp_path / 'ckpt'), run_name='r', save_interval='2ba', eval_interval='1ba', callbacks=callbacks, algorithms=algorithms)
    config['eval_loader'] = {**config['train_loader'], 'drop_last': False, 'dataset': {**config['train_loader']['dataset'], 'split': 'val', 'shuffle': False}}
    run_config({**config, 'device_eval_batch_size': 4}, 'max_duration=2ba')
    trainer = run_config({**config, 'device_eval_batch_size': 4}, 'max_duration=4ba')
    assert len(train_losses(trainer)) == 2


def test_a_damaged_load_path_and_the_load_keys(tmp_path: Path) -> None:
    config = small_config(tmp_path, save_folder=str(tmp_path / 'ckpt'), save_interval='2ba')
    run_config(config, 'max_duration=2ba')
    path = tmp_path / 'ckpt' / 'latest-rank0.pt'
    fresh = small_config(tmp_path, max_duration='3ba')
    kept = run_config({**fresh, 'load_path': str(tmp_path / 'ckpt' / 'latest-rank{rank}.pt')})
    assert int(kept.state.timestamp.batch) == 3 and len(train_losses(kept)) == 1
    ignored = run_config({**fresh, 'load_path': str(path), 'load_ignore_keys': ['state/timestamp*', 'state/dataset_state*', 'state/optimizers*']})
    assert len(train_losses(ignored)) == 3
    larger = {**fresh, 'model': {**fresh['model'], 'n_layers': 2}, 'load_path': str(path), 'load_weights_only': True}
    with pytest.raises(RuntimeError, match='Missing key'):
        run_config(larger)
    assert len(train_losses(run_config({**larger, 'load_strict_model_weights': False}))) == 3
    _flip(path.resolve())
    with pytest.raises(CheckpointError, match=r'load_path: .*latest-rank0\.pt. is damaged: .* bytes; '):
        run_config({**fresh, 'load_path': str(path)})


def test_a_remote_folder_with_a_half_upload_and_a_damaged_file(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Downloaded, checked, left out by name; the remote files stay as they are."""
    from llmfoundry.command_utils.remote_resumption import forget_downloads, newest_remote
    from llmfoundry.command_utils.save_folder import SaveNames

    names = SaveNames('ep{epoch}-ba{batch}-rank{rank}.pt', 'latest-rank{rank}.pt', sharded=False)
    remote = tmp_path / 'bucket'
    remote.mkdir()
    uri = f'file://{remote}'
    assert newest_remote(uri, 'r', names) == (None, [])
    for batch in (2, 9, 10):
        torch.save({'state': torch.arange(1000)}, remote / f'ep0-ba{batch}-rank0.pt')
    _flip(remote / 'ep0-ba10-rank0.pt')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.distributed.checkpoint.save({'w': torch.ones(3)}, storage_writer=filesystem.FileSystemWriter(remote / 'ep0-ba12'), no_dist=True)
    shutil.copytree(remote / 'ep0-ba12', remote / 'ep0-ba14')
    next((remote / 'ep0-ba12').glob('*.distcp')).unlink()
    (remote / 'ep0-ba14' / METADATA_FILE).unlink()
    found, notes = newest_remote(uri, 'r', names)
    assert found is not None and torch.equal(torch.load(found)['state'], torch.arange(1000)) and Path(found).name == 'ep0-ba9-rank0.pt'
    assert [note.partition(f'{uri}/')[2].partition(':')[0] for note in notes[:3]] == ['ep0-ba14 is left out', 'ep0-ba12 is left out', 'ep0-ba10-rank0.pt is left out']
    assert 'its upload did not end' in notes[0] and 'lacks 1 of 1 files' in notes[1] and 'after 2 downloads' in notes[2] and 'continues from' in notes[3]
    assert len(list(remote.iterdir())) == 5
    forget_downloads()
    assert not Path(found).exists()
