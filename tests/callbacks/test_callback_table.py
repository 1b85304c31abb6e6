"""Every documented name of a callback, algorithm and logger: it resolves, and takes the documented arguments with the documented defaults."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from composer.algorithms import GradientClipping
from composer.callbacks import CheckpointSaver
from composer.core import Event

from llmfoundry import registry
from llmfoundry.builders import build_algorithm, build_callback, build_logger
from llmfoundry.command_utils.train_parts import sort_callbacks
from llmfoundry.errors import ConfigError

REQUIRED = inspect.Parameter.empty
ANY = object()
# name -> argument -> default
CALLBACKS: dict[str, dict[str, Any]] = {
    'speed_monitor': {'window_size': 100, 'gpu_flops_available': None, 'time_unit': 'hours'},
    'lr_monitor': {},
    'nan_monitor': {},
    'memory_monitor': {'memory_keys': None, 'dist_aggregate_batch_interval': None},
    'memory_snapshot': {'skip_batches': 1, 'interval': '3ba', 'max_entries': 100000, 'folder': ANY, 'filename': ANY, 'remote_file_name': ANY, 'overwrite': False},
    'oom_observer': {'max_entries': 100000, 'folder': ANY, 'filename': ANY, 'remote_file_name': ANY, 'overwrite': False},
    'runtime_estimator': {'skip_batches': 1, 'time_unit': 'hours'},
    'optimizer_monitor': {'log_optimizer_metrics': True, 'batch_log_interval': 10},
    'system_metrics_monitor': {'log_all_data': False},
    'generate_callback': {'prompts': REQUIRED, 'interval': REQUIRED, 'batch_size': None},
    'early_stopper': {'monitor': REQUIRED, 'dataloader_label': REQUIRED, 'comp': None, 'min_delta': 0.0, 'patience': 1},
    'load_checkpoint': {'load_path': REQUIRED, 'load_weights_only': False, 'strict_model_weights': True, 'ignore_keys': None, 'event': ANY},
    'fdiff_metrics': {'diff_train_metrics': False, 'diff_eval_metrics': True},
    'hf_checkpointer': {
        'save_folder': REQUIRED, 'save_interval': REQUIRED, 'huggingface_folder_name': 'ba{batch}', 'precision': 'float32', 'overwrite': True, 'mlflow_registered_model_name': None,
        'mlflow_logging_config': None, 'flatten_imports': ('llmfoundry',), 'final_register_only': False, 'register_wait_seconds': 7200,
    },
    'mono_checkpoint_saver': {'save_folder': REQUIRED, 'batch_interval': REQUIRED, 'filename': 'ep{epoch}-ba{batch}.pt', 'overwrite': False, 'keep_optimizers': False},
    'mono_ckpt_saver': {'save_folder': REQUIRED, 'batch_interval': REQUIRED},
    'global_lr_scaling': {'lr_scale': REQUIRED, 'wd_pct': 0.0},
    'layer_freezing': {'layer_names': REQUIRED},
    'scheduled_gc': {'batch_interval': REQUIRED, 'gen_1_batch_interval': None, 'eval_keep_disabled': False},
    'eval_output_logging': {'log_tokens': False, 'log_output_text': None},
    'mbmoe_tok_per_expert': {'log_interval': 10, 'log_every_layer': False, 'all_reduce_stats': False, 'normalize': True},
    'run_timeout': {'timeout': 1800},
    'loss_perp_v_len': {'log_batch_interval': REQUIRED, 'compute_batch_interval': REQUIRED, 'ignore_index': -100},
    'env_logging': {
        'workspace_dir': '/workspace', 'log_git': True, 'log_nvidia': True, 'log_docker': True, 'log_packages': True, 'log_system': False, 'log_gpu': False, 'log_distributed': False,
        'packages_to_log': None,
    },
    'kill_loss_spike': {'log_only': True, 'patience': 4, 'outlier_multiplier': 2, 'window_size': 100, 'loss_cap': 10},
}  # fmt: skip
WITH_CONFIG: dict[str, dict[str, Any]] = {
    'async_eval': {'interval': REQUIRED, 'eval_run_config': ANY},
    'curriculum_learning': {'schedule': REQUIRED, 'duration': REQUIRED},
    'dataset_swap': {'dataset_index': REQUIRED},
}
ALGORITHMS: dict[str, dict[str, Any]] = {
    'gradient_clipping': {'clipping_type': REQUIRED, 'clipping_threshold': REQUIRED}, 'alibi': {'max_sequence_length': REQUIRED}, 'gated_linear_units': {}, 'low_precision_layernorm': {},
}  # fmt: skip
LOGGERS: dict[str, dict[str, Any]] = {
    'wandb': dict.fromkeys(('project', 'group', 'name', 'entity', 'tags', 'log_artifacts', 'rank_zero_only', 'init_kwargs'), ANY),
    'mlflow': {
        **dict.fromkeys(('experiment_name', 'run_name', 'tags', 'tracking_uri', 'model_registry_prefix', 'model_registry_uri', 'rename_metrics', 'ignore_metrics', 'ignore_hyperparameters'), ANY),
        **dict.fromkeys(('run_group', 'logging_buffer_seconds', 'log_duplicated_metric_every_n_steps'), ANY),
        'flush_interval': 10, 'synchronous': False, 'log_system_metrics': True, 'resume': False,
    },
    'tensorboard': {'log_dir': None, 'flush_interval': ANY},
    'inmemory': {},
    'in_memory_logger': {},
    'mosaicml': {'log_interval': 60, 'ignore_keys': None, 'ignore_exceptions': True},
    'file': {'filename': ANY, 'overwrite': False, 'flush_interval': ANY},
    'file_logger': {},
    'jsonl': {'path': ANY},
}  # fmt: skip
ROWS = [
    (reg, name, arguments)
    for reg, table in ((registry.callbacks, CALLBACKS), (registry.callbacks_with_config, WITH_CONFIG), (registry.algorithms, ALGORITHMS), (registry.loggers, LOGGERS))
    for name, arguments in table.items()
]


@pytest.mark.parametrize(('reg', 'name', 'arguments'), ROWS, ids=[f'{r.name}-{n}' for r, n, _ in ROWS])
def test_arguments_and_defaults(reg: Any, name: str, arguments: dict[str, Any]) -> None:
    parameters = inspect.signature(reg.get(name)).parameters
    wrong = {
        key: f'{parameters[key].default if key in parameters else "absent"} instead of {default}' for key, default in arguments.items()
        if key not in parameters or (default is not ANY and parameters[key].default != default)
    }  # fmt: skip
    unlisted = [p.name for p in parameters.values() if p.default is REQUIRED and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in (*arguments, 'train_config')]
    assert not wrong and not (unlisted and arguments), (wrong, unlisted)


def test_the_table_is_complete() -> None:
    missing = {r.name: [n for n in r.names() if (r, n) not in {(x, y) for x, y, _ in ROWS}] for r in (registry.callbacks, registry.callbacks_with_config, registry.algorithms, registry.loggers)}
    assert not any(missing.values()), missing
    assert len(ROWS) >= 40


def test_generate_needs_an_interval() -> None:
    with pytest.raises(TypeError, match='interval'):
        build_callback('generate_callback', {'prompts': ['a']})


def test_the_config_is_filled_in_and_not_given() -> None:
    with pytest.raises(ValueError, match='callbacks.dataset_swap.train_config: is filled in'):
        build_callback('dataset_swap', {'dataset_index': 0, 'train_config': {}})


def test_the_platform_logger_says_what_to_use() -> None:
    with pytest.raises(ConfigError, match='use tensorboard, wandb or mlflow'):
        build_logger('mosaicml', {'log_interval': 30})


def test_savers_come_last_and_the_hugging_face_one_last_of_all(tmp_path: Any) -> None:
    names = ('hf_checkpointer', 'lr_monitor', 'mono_checkpoint_saver', 'nan_monitor')
    arguments = {'hf_checkpointer': {'save_folder': str(tmp_path), 'save_interval': '1ba'}, 'mono_checkpoint_saver': {'save_folder': str(tmp_path), 'batch_interval': 1}}
    made = [build_callback(name, arguments.get(name, {})) for name in names]
    trainer = type('Trainer', (), {'state': type('State', (), {'callbacks': [CheckpointSaver(folder=str(tmp_path)), *made]})()})()
    sort_callbacks(trainer)
    assert [type(c).__name__ for c in trainer.state.callbacks] == ['LRMonitor', 'MonolithicCheckpointSaver', 'NaNMonitor', 'CheckpointSaver', 'HuggingFaceCheckpointer']
    for callback in made:
        callback.post_close()


def test_gradient_clipping_is_built_and_checked() -> None:
    assert isinstance(build_algorithm('gradient_clipping', {'clipping_type': 'norm', 'clipping_threshold': 1.0}), GradientClipping)
    with pytest.raises(ConfigError, match="must be one of norm, value, adaptive, got 'other'(.|\n)*must be positive, got 0"):
        build_algorithm('gradient_clipping', {'clipping_type': 'other', 'clipping_threshold': 0})


def test_adaptive_clipping_is_refused_under_fsdp() -> None:
    def starts(sharded: bool) -> bool:
        clipping = build_algorithm('gradient_clipping', {'clipping_type': 'adaptive', 'clipping_threshold': 0.01})
        return clipping.match(Event.FIT_START, type('State', (), {'fsdp_enabled': sharded})())

    assert starts(sharded=False) is False, 'it clips after the batch, not now'
    with pytest.raises(ConfigError, match="'adaptive' needs whole weights, and fsdp_config shards them"):
        starts(sharded=True)
