"""What the loader fills in, when, and that it says so; and that nothing can change afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from llmfoundry.config.load import load_train_config
from tests.config.base_config import BASE, write

RESUMABLE = ('run_name=r', 'save_folder=out')


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ('RUN_NAME', 'WORLD_SIZE'):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(('overrides', 'expected'), [
    (RESUMABLE, True),
    (('run_name=r',), False),
    (('save_folder=out',), False),
    ((*RESUMABLE, 'save_overwrite=true'), False),
    ((*RESUMABLE, 'save_weights_only=true'), False),
    ((*RESUMABLE, 'save_overwrite=false', 'save_weights_only=false'), True),
    ((*RESUMABLE, 'autoresume=false'), False),
    ((*RESUMABLE, 'autoresume=true', 'save_overwrite=true'), True),
])  # fmt: skip
def test_autoresume(tmp_path: Path, overrides: tuple[str, ...], expected: bool) -> None:
    config = load_train_config(write(tmp_path), overrides)
    assert config.autoresume is expected
    derived = expected and not any(o.startswith('autoresume') for o in overrides)
    assert any(n.startswith('autoresume: true') for n in config.notes) is derived


def test_run_name_from_the_environment_counts_for_autoresume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('RUN_NAME', 'night-3')
    config = load_train_config(write(tmp_path), ['save_folder=out'])
    assert (config.run_name, config.autoresume) == ('night-3', True)
    assert 'run_name: night-3 (from the variable RUN_NAME)' in config.notes
    assert load_train_config(write(tmp_path), ['run_name=mine']).run_name == 'mine'
    assert load_train_config(write(tmp_path), ['save_folder=out', 'autoresume=true']).run_name == 'night-3'


@pytest.mark.parametrize(('override', 'latest'), [('seed=1', 'latest-rank{rank}.pt'), ('fsdp_config.state_dict_type=sharded', 'latest-sharded-rank{rank}'), ('save_latest_filename=l', 'l')])
def test_checkpoint_names(tmp_path: Path, override: str, latest: str) -> None:
    config = load_train_config(write(tmp_path), [override])
    assert (config.save_filename, config.save_latest_filename) == ('ep{epoch}-ba{batch}-rank{rank}.pt', latest)


def test_batch_sizes_follow_the_world_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('WORLD_SIZE', '4')
    config = load_train_config(write(tmp_path))
    assert (config.n_gpus, config.device_train_batch_size, config.device_train_microbatch_size, config.device_train_grad_accum, config.device_eval_batch_size) == (4, 2, 2, 1, 2)
    assert 'device_train_microbatch_size: 2 (reduced from 4, which is more than the device batch)' in config.notes
    assert config.batch_summary == 'batch: global 8 samples = 4 processes x device 2; device 2 = 1 x microbatch 2; evaluation 2 per device'


def test_computed_keys_in_the_file_have_no_effect_and_that_is_said(tmp_path: Path) -> None:
    config = load_train_config(write(tmp_path), ['n_gpus=8'])
    assert config.n_gpus == 1
    assert 'n_gpus: 1 (computed; 8 in the config has no effect)' in config.notes


def test_top_level_variables_of_older_files(tmp_path: Path) -> None:
    text = BASE.replace('variables:\n  data_local: ./data\n', 'data_local: ./data\nglobal_seed: 3\nseed: ${global_seed}\n').replace('${variables.data_local}', '${data_local}')
    config = load_train_config(write(tmp_path, text), ['data_local=/elsewhere'])
    assert config.train_loader['dataset']['local'] == '/elsewhere'
    assert (config.seed, config.variables) == (3, {'data_local': '/elsewhere', 'global_seed': 3})
    assert config.notes == ('top-level data_local, global_seed: used for interpolation only; newer files put such names under `variables:`',)


def test_documented_override_reaches_the_variables_block(tmp_path: Path) -> None:
    config = load_train_config(write(tmp_path), ['data_local=/elsewhere'])
    assert config.train_loader['dataset']['local'] == '/elsewhere'


def test_a_variable_that_nothing_reads_is_mentioned(tmp_path: Path) -> None:
    assert load_train_config(write(tmp_path), ['data_remote=s3://x']).notes == ('top-level data_remote: no effect, since nothing in the file interpolates it',)


def test_lists_and_paths_move_to_their_own_keys(tmp_path: Path) -> None:
    text = BASE + 'eval_loader:\n- label: a\n  name: text\n  num_workers: 0\n  drop_last: false\n  dataset: {local: ./v, max_seq_len: 64}\nicl_tasks: tasks.yaml\neval_gauntlet: gauntlet.yaml\n'
    config = load_train_config(write(tmp_path, text))
    assert config.eval_loader is None and config.eval_loaders is not None and config.eval_loaders[0]['label'] == 'a'
    assert (config.icl_tasks, config.icl_tasks_str, config.eval_gauntlet, config.eval_gauntlet_str, config.icl_seq_len) == (None, 'tasks.yaml', None, 'gauntlet.yaml', 64)


def test_groups_without_arguments_and_long_warmups(tmp_path: Path) -> None:
    config = load_train_config(write(tmp_path, BASE.replace('lr_monitor: {}', 'lr_monitor:')), ['max_duration=1ba'])
    assert config.callbacks is not None and config.callbacks['lr_monitor'] == {}
    assert config.notes == ('scheduler.t_warmup 2ba is longer than the run (1ba): the learning rate does not reach its peak',)


def test_the_same_file_is_valid_with_cluster_settings_on_a_laptop(tmp_path: Path) -> None:
    overrides = ['model.init_device=meta', 'model.attn_config.attn_impl=flash', 'fsdp_config.sharding_strategy=FULL_SHARD', 'device_train_microbatch_size=auto', 'compile_config={}',
                 'model.ffn_config.ffn_type=mb_dmoe', 'model.fc_type=te', 'precision=amp_fp8']  # fmt: skip
    config = load_train_config(write(tmp_path), overrides)
    assert config.device_train_grad_accum == 'auto' and 'microbatch auto' in config.batch_summary


def test_overrides_reach_list_items_and_types(tmp_path: Path) -> None:
    config = load_train_config(write(tmp_path), ['optimizer.betas.1=0.99', 'callbacks.speed_monitor.window_size=3', 'load_ignore_keys=[a,b]', 'save_folder=null', 'optimizer.lr=1e-3'])
    assert config.optimizer['betas'] == [0.9, 0.99] and config.optimizer['lr'] == 1e-3
    assert config.callbacks is not None and config.callbacks['speed_monitor'] == {'window_size': 3}
    assert config.load_ignore_keys == ['a', 'b'] and config.save_folder is None


def test_a_mapping_works_as_well_and_is_left_alone(tmp_path: Path) -> None:
    first = load_train_config(write(tmp_path))
    plain = {k: v for k, v in first.to_dict().items() if k not in type(first).DERIVED and v is not None}
    before = str(plain)
    assert load_train_config(plain).to_dict() == first.to_dict()
    assert str(plain) == before


def test_frozen_and_closed(tmp_path: Path) -> None:
    config = load_train_config(write(tmp_path))
    with pytest.raises(ValidationError):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        type(config)(**{**config.to_dict(), 'sede': 3})


def test_env_resolver_is_back_after_loading(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    load_train_config(write(tmp_path))
    assert OmegaConf.create({'a': '${oc.env:HOME}'}).a
