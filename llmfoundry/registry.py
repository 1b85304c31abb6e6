"""The table of everything that a YAML can name.

One row per name, each a target string that is imported at first use, so that reading this file is reading what exists and
importing it costs nothing. The layer registries live in ``layers_registry`` because exported models carry them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any, Callable, Iterator, Mapping

from llmfoundry import layers_registry
from llmfoundry.layers_registry import (
    attention_classes,
    attention_implementations,
    fcs,
    ffns,
    ffns_with_megablocks,
    ffns_with_norm,
    module_init_fns,
    norms,
    param_init_fns,
)
from llmfoundry.typed_registry import RegistryError, TypedRegistry

__all__ = [
    'TypedRegistry',
    'algorithms',
    'all_registries',
    'attention_classes',
    'attention_implementations',
    'callbacks',
    'callbacks_with_config',
    'collators',
    'config_transforms',
    'construct_from_registry',
    'create_registry',
    'data_specs',
    'dataloaders',
    'dataset_replication_validators',
    'fcs',
    'ffns',
    'ffns_with_megablocks',
    'ffns_with_norm',
    'icl_datasets',
    'import_file',
    'load_planners',
    'loggers',
    'metrics',
    'models',
    'module_init_fns',
    'norms',
    'optimizers',
    'param_init_fns',
    'save_planners',
    'save_registry',
    'schedulers',
    'tokenizers',
    'tp_strategies',
]

_REGISTRIES: dict[tuple[str, ...], TypedRegistry] = {
    registry.namespace: registry for registry in vars(layers_registry).values() if isinstance(registry, TypedRegistry)
}


def create_registry(
    *namespace: str,
    generic_type: Any = None,
    entry_points: bool = True,
    description: str = '',
    builtins: Mapping[str, str] | None = None,
    requires: Mapping[str, str] | None = None,
) -> TypedRegistry:
    """Creates a registry; plug-ins may add their own.

    Raises:
        RegistryError: when a registry of that namespace exists.
    """
    if namespace in _REGISTRIES:
        raise RegistryError(f"a registry called {' -> '.join(namespace)} already exists")
    registry = TypedRegistry(namespace, generic_type, entry_points, description, builtins, requires)
    _REGISTRIES[namespace] = registry
    return registry


def all_registries() -> dict[str, TypedRegistry]:
    """Every registry by its short name, sorted."""
    return {r.name: r for r in sorted(_REGISTRIES.values(), key=lambda r: r.name)}


loggers = create_registry(
    'llmfoundry', 'loggers',
    generic_type='type[composer.loggers.LoggerDestination]',
    description='Where metrics and hyperparameters go; keys of the `loggers` block.',
    builtins={
        'wandb': 'composer.loggers:WandBLogger',
        'tensorboard': 'composer.loggers:TensorboardLogger',
        'inmemory': 'composer.loggers:InMemoryLogger',
        'in_memory_logger': 'composer.loggers:InMemoryLogger',
        'mlflow': 'composer.loggers:MLFlowLogger',
        'file': 'composer.loggers:FileLogger',
        'file_logger': 'composer.loggers:FileLogger',
        'jsonl': 'llmfoundry.loggers.jsonl_logger:JSONLLogger',
        'mosaicml': 'llmfoundry.loggers.platform:MosaicMLPlatformLogger',
    },
)

callbacks = create_registry(
    'llmfoundry', 'callbacks',
    generic_type='type[composer.core.Callback]',
    description='Keys of the `callbacks` block.',
    builtins={
        'system_metrics_monitor': 'composer.callbacks:SystemMetricsMonitor',
        'lr_monitor': 'composer.callbacks:LRMonitor',
        'memory_monitor': 'llmfoundry.callbacks.memory_monitor:MemoryMonitor',
        'memory_snapshot': 'composer.callbacks:MemorySnapshot',
        'speed_monitor': 'llmfoundry.callbacks.speed_monitor:SpeedMonitor',
        'runtime_estimator': 'composer.callbacks:RuntimeEstimator',
        'optimizer_monitor': 'composer.callbacks:OptimizerMonitor',
        'generate_callback': 'composer.callbacks:Generate',
        'early_stopper': 'composer.callbacks:EarlyStopper',
        'oom_observer': 'composer.callbacks:OOMObserver',
        'nan_monitor': 'composer.callbacks:NaNMonitor',
        'load_checkpoint': 'llmfoundry.callbacks.load_checkpoint:SafeLoadCheckpoint',
        'fdiff_metrics': 'llmfoundry.callbacks.fdiff_callback:FDiffMetrics',
        'hf_checkpointer': 'llmfoundry.callbacks.hf_checkpointer:HuggingFaceCheckpointer',
        'global_lr_scaling': 'llmfoundry.callbacks.global_lr_scaling:GlobalLRScaling',
        'layer_freezing': 'llmfoundry.callbacks.layer_freezing:LayerFreezing',
        'scheduled_gc': 'llmfoundry.callbacks.scheduled_gc_callback:ScheduledGarbageCollector',
        'run_timeout': 'llmfoundry.callbacks.run_timeout_callback:RunTimeoutCallback',
        'kill_loss_spike': 'llmfoundry.callbacks.kill_loss_spike_callback:KillLossSpike',
        'mono_checkpoint_saver': 'llmfoundry.callbacks.monolithic_ckpt_callback:MonolithicCheckpointSaver',
        'mono_ckpt_saver': 'llmfoundry.callbacks.monolithic_ckpt_callback:MonolithicCheckpointSaver',
        'env_logging': 'llmfoundry.callbacks.env_logging_callback:EnvironmentLoggingCallback',
        'eval_output_logging': 'llmfoundry.callbacks.eval_output_logging_callback:EvalOutputLogging',
        'loss_perp_v_len': 'llmfoundry.callbacks.loss_perp_v_len_callback:LossPerpVLen',
        'mbmoe_tok_per_expert': 'llmfoundry.callbacks.moe_tokens_per_expert_callback:MoETokensPerExpert',
    },
)

callbacks_with_config = create_registry(
    'llmfoundry', 'callbacks_with_config',
    generic_type='type[llmfoundry.interfaces.callback_with_config.CallbackWithConfig]',
    description='Callbacks that receive a copy of the whole training config as `train_config`.',
    builtins={
        'async_eval': 'llmfoundry.callbacks.async_eval_callback:AsyncEval',
        'curriculum_learning': 'llmfoundry.callbacks.curriculum_learning_callback:CurriculumLearning',
        'dataset_swap': 'llmfoundry.callbacks.dataset_swap_callback:DatasetSwap',
    },
)

optimizers = create_registry(
    'llmfoundry', 'optimizers',
    generic_type='type[torch.optim.Optimizer]',
    description='Values of optimizer.name.',
    builtins={
        'adalr_lion': 'llmfoundry.optim.adaptive_lion:DecoupledAdaLRLion',
        'clip_lion': 'llmfoundry.optim.adaptive_lion:DecoupledClipLion',
        'decoupled_lionw': 'llmfoundry.optim.lion:DecoupledLionW',
        'decoupled_adamw': 'llmfoundry.optim.adamw:DecoupledAdamW',
        'no_op': 'llmfoundry.optim.no_op:NoOp',
    },
)

schedulers = create_registry(
    'llmfoundry', 'schedulers',
    generic_type='type[composer.optim.ComposerScheduler]',
    description='Values of scheduler.name.',
    builtins={
        'constant_with_warmup': 'composer.optim:ConstantWithWarmupScheduler',
        'cosine_with_warmup': 'composer.optim:CosineAnnealingWithWarmupScheduler',
        'linear_decay_with_warmup': 'composer.optim:LinearWithWarmupScheduler',
        'inv_sqrt_with_warmup': 'llmfoundry.optim.scheduler:InverseSquareRootWithWarmupScheduler',
    },
)

algorithms = create_registry(
    'llmfoundry', 'algorithms',
    generic_type='type[composer.core.Algorithm]',
    description='Keys of the `algorithms` block.',
    builtins={
        'gradient_clipping': 'llmfoundry.algorithms.gradient_clipping:GradientClipping',
        'alibi': 'composer.algorithms:Alibi',
        'gated_linear_units': 'composer.algorithms:GatedLinearUnits',
        'low_precision_layernorm': 'composer.algorithms:LowPrecisionLayerNorm',
    },
)

tokenizers = create_registry(
    'llmfoundry', 'tokenizers',
    generic_type='type[transformers.PreTrainedTokenizerBase]',
    description='Values of tokenizer.name that are not Hugging Face names or paths.',
    builtins={'tiktoken': 'llmfoundry.tokenizers.tiktoken:TiktokenTokenizerWrapper'},
)

models = create_registry(
    'llmfoundry', 'models',
    generic_type='type[composer.models.ComposerModel]',
    description='Values of model.name.',
    builtins={
        'mpt_causal_lm': 'llmfoundry.models.mpt.composer_mpt:ComposerMPTCausalLM',
        'hf_causal_lm': 'llmfoundry.models.hf.causal_lm:ComposerHFCausalLM',
        'hf_t5': 'llmfoundry.models.hf.t5:ComposerHFT5',
    },
)

dataloaders = create_registry(
    'llmfoundry', 'dataloaders',
    generic_type='Callable[..., composer.core.DataSpec]',
    description='Values of train_loader.name and eval_loader.name.',
    builtins={'text': 'llmfoundry.data.text_data:build_text_dataloader', 'finetuning': 'llmfoundry.data.finetuning.dataloader:build_finetuning_dataloader'},
)

dataset_replication_validators = create_registry(
    'llmfoundry', 'dataset_replication_validators',
    generic_type='Callable[..., tuple[int, int]]',
    description='Checks the device batch size against sequence-parallel replication before a dataset is built.',
    builtins={'dataset_replication_validator': 'llmfoundry.data.streams:validate_ds_replication'},
)

collators = create_registry(
    'llmfoundry', 'collators',
    generic_type='Callable[..., Callable]',
    description='Builders of collate functions, used by the data loaders.',
    builtins={'text_collator': 'llmfoundry.data.text_data:build_text_collator', 'finetuning_collator': 'llmfoundry.data.finetuning.dataloader:build_collate_fn'},
)

data_specs = create_registry(
    'llmfoundry', 'data_specs',
    generic_type='Callable[..., composer.core.DataSpec]',
    description='Turns a torch DataLoader into a DataSpec that counts tokens.',
    builtins={'data_spec': 'llmfoundry.data.dataloader:get_data_spec'},
)

metrics = create_registry(
    'llmfoundry', 'metrics',
    generic_type='type[torchmetrics.Metric]',
    description='Names for additional_train_metrics and additional_eval_metrics.',
    builtins={
        'token_accuracy': 'llmfoundry.metrics.token_acc:TokenAccuracy',
        'language_cross_entropy': 'llmfoundry.metrics.language:LanguageCrossEntropy',
        'language_perplexity': 'llmfoundry.metrics.language:LanguagePerplexity',
        'masked_accuracy': 'llmfoundry.metrics.token_acc:MaskedAccuracy',
    },
)

icl_datasets = create_registry(
    'llmfoundry', 'icl_datasets',
    generic_type='type[llmfoundry.eval.datasets.InContextLearningDataset]',
    description='Values of icl_task_type.',
)

config_transforms = create_registry(
    'llmfoundry', 'config_transforms',
    generic_type='Callable[[dict], dict]',
    description='Functions over the whole config dict, run in registry order before it is typed.',
    builtins={'update_batch_size_info': 'llmfoundry.config.batch_size:update_batch_size_info'},
)

load_planners = create_registry(
    'llmfoundry', 'load_planners',
    generic_type='type[torch.distributed.checkpoint.planner.LoadPlanner]',
    description='Values of fsdp_config.load_planner.',
)

save_planners = create_registry(
    'llmfoundry', 'save_planners',
    generic_type='type[torch.distributed.checkpoint.planner.SavePlanner]',
    description='Values of fsdp_config.save_planner.',
)

tp_strategies = create_registry(
    'llmfoundry', 'tp_strategies',
    generic_type='Callable[[torch.nn.Module], dict]',
    description='Values of tp_config.strategy.',
    builtins={'ffn': 'llmfoundry.tp.ffn:ffn_tp_strategy'},
)


def construct_from_registry(
    name: str,
    registry: TypedRegistry,
    partial_function: bool = True,
    pre_validation_function: Callable[[Any], None] | type | None = None,
    post_validation_function: Callable[[Any], None] | type | None = None,
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """Builds the entry ``name``: a class is instantiated; a function becomes a partial, or is called if ``partial_function`` is False.

    Args:
        pre_validation_function: called with the entry; a type means that the entry must be a subclass of it.
        post_validation_function: called with what was built; a type means that it must be an instance of it.

    Raises:
        RegistryError: (a ValueError) unknown name, or an entry or result of the wrong type.
        TypeError: arguments that the entry does not accept.
    """
    kwargs = kwargs or {}
    entry: Any = registry.get(name)
    where = f'{registry.path} -> {name}'
    if isinstance(pre_validation_function, type):
        if not (isinstance(entry, type) and issubclass(entry, pre_validation_function)):
            raise RegistryError(f'{where} must be a subclass of {pre_validation_function.__name__}, got {entry!r}')
    elif pre_validation_function is not None:
        pre_validation_function(entry)

    if isinstance(entry, type) or not partial_function:
        built = entry(**kwargs)
    elif callable(entry):
        built = functools.partial(entry, **kwargs)
    else:
        raise RegistryError(f'{where} is neither a class nor a function: {entry!r}')

    if isinstance(post_validation_function, type):
        if not isinstance(built, post_validation_function):
            raise RegistryError(f'{where} must build a {post_validation_function.__name__}, got {type(built).__name__}')
    elif post_validation_function is not None:
        post_validation_function(built)
    return built


@contextlib.contextmanager
def save_registry() -> Iterator[None]:
    """Restores every registry on exit, for tests that register things."""
    saved = {namespace: registry.snapshot() for namespace, registry in _REGISTRIES.items()}
    try:
        yield
    finally:
        for namespace in list(_REGISTRIES):
            if namespace in saved:
                _REGISTRIES[namespace].restore(saved[namespace])
            else:
                del _REGISTRIES[namespace]


def import_file(path: str | os.PathLike) -> ModuleType:
    """Executes a Python file as the module ``python_code``, so that it can register things (``code_paths``).

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: the file raised; the original error is the cause.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f'code_paths: no file at {path!r}')
    spec = importlib.util.spec_from_file_location('python_code', path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f'code_paths: {path!r} is not a Python file')
    module = importlib.util.module_from_spec(spec)
    sys.modules['python_code'] = module
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise RuntimeError(f'code_paths: {path!r} failed: {type(e).__name__}: {e}') from e
    return module
