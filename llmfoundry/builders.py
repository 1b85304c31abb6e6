"""Turns blocks of the config into objects, one short function per kind.

A block is looked up by name in its registry and called with the rest of its keys as keyword arguments, so that a component never sees a config and a config block is never changed. Components
are reached through registries only; importing this file imports none of them. A plug-in that registers a name is built by the same line as ours.
"""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any, ContextManager, Iterable, Mapping, Sequence

from llmfoundry import registry
from llmfoundry.errors import EVAL_DATALOADER, BaseContextualError, ConfigError, ConfigProblem
from llmfoundry.registry import construct_from_registry
from llmfoundry.typed_registry import resolve_target

if TYPE_CHECKING:
    from composer import Callback, Evaluator
    from composer.core import Algorithm, DataSpec
    from composer.loggers import LoggerDestination
    from composer.models import ComposerModel
    from composer.optim import ComposerScheduler
    from torch.optim import Optimizer
    from torchmetrics import Metric
    from transformers import PreTrainedTokenizerBase

__all__ = [
    'add_metrics_to_eval_loaders',
    'build_algorithm',
    'build_callback',
    'build_composer_model',
    'build_dataloader',
    'build_eval_loaders',
    'build_evaluators',
    'build_load_planner',
    'build_logger',
    'build_metric',
    'build_optimizer',
    'build_save_planner',
    'build_scheduler',
    'build_tokenizer',
    'build_tp_strategies',
    'split_name',
]

# Not in a registry, since a YAML does not choose between several of them.
TOKENIZER_BUILDER = 'llmfoundry.tokenizers.build:build_tokenizer'
PARAM_GROUPS_BUILDER = 'llmfoundry.optim.param_groups:build_param_groups'
MASTER_WEIGHTS_DTYPES = {'f16': 'float16', 'float16': 'float16', 'bf16': 'bfloat16', 'bfloat16': 'bfloat16'}


def split_name(block: Mapping[str, Any], path: str) -> tuple[str, dict[str, Any]]:
    """Splits ``{'name': N, **kwargs}`` into ``(N, kwargs)``; ``kwargs`` is a copy.

    Raises:
        ConfigError: the block has no name.
    """
    kwargs = copy.deepcopy(dict(block))
    name = kwargs.pop('name', None)
    if not isinstance(name, str):
        raise ConfigError([ConfigProblem(path, f'has no `name` (keys seen: {sorted(map(str, block)) or "none"}). Name the component to build.')])
    return name, kwargs


def build_tokenizer(tokenizer_name: str, tokenizer_kwargs: Mapping[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """Builds a tokenizer: shipped (``llmfoundry://gpt2``), registered, local, or from the Hub.

    Raises:
        ConfigError: (a ValueError) not found, or without an eos token.
    """
    return resolve_target(TOKENIZER_BUILDER)(tokenizer_name, dict(tokenizer_kwargs or {}))


def build_dataloader(cfg: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, device_batch_size: int | float) -> DataSpec:
    """Builds the loader that ``cfg['name']`` names (``text`` if absent).

    Args:
        cfg: a ``train_loader`` or ``eval_loader`` block.
        tokenizer: passed to the loader.
        device_batch_size: samples per process and step.
    """
    name, kwargs = split_name({'name': 'text', **cfg}, 'train_loader')
    return construct_from_registry(
        name, registry.dataloaders, partial_function=False, kwargs={**kwargs, 'tokenizer': tokenizer, 'device_batch_size': device_batch_size},
    )


def build_eval_loaders(
    eval_loader_config: Mapping[str, Any] | Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, device_eval_batch_size: int | float,
) -> list[Evaluator]:
    """Builds one evaluator per eval loader: labelled ``eval`` for a single block, ``eval/{label}`` for a list.

    The metrics are the model's, which does not exist yet; ``add_metrics_to_eval_loaders`` fills them in.

    Raises:
        BaseContextualError: with ``location`` EvalDataloader.
    """
    from composer import Evaluator

    blocks = [eval_loader_config] if isinstance(eval_loader_config, Mapping) else list(eval_loader_config)
    evaluators = []
    for block in blocks:
        kwargs = {k: v for k, v in block.items() if k != 'label'}
        label = 'eval' if isinstance(eval_loader_config, Mapping) else f"eval/{block['label']}"
        try:
            dataloader = build_dataloader(kwargs, tokenizer, device_eval_batch_size)
        except BaseContextualError as e:
            e.location = EVAL_DATALOADER
            raise
        # Metric names wait for the model; an evaluator without eval_interval follows the top-level key.
        evaluators.append(Evaluator(label=label, dataloader=dataloader, metric_names=[], device_eval_microbatch_size=device_eval_batch_size))
    return evaluators


def build_evaluators(
    eval_loader_config: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
    icl_tasks_config: Any,
    eval_gauntlet_config: Any,
    *,
    tokenizer: PreTrainedTokenizerBase,
    device_eval_batch_size: int | float,
    icl_seq_len: int | None = None,
    icl_subset_num_batches: int | None = None,
) -> tuple[list[Evaluator], list[str], Any]:
    """Builds every evaluator of a run: ``(evaluators, logger keys of in-context tasks, gauntlet callback)``.

    Raises:
        ConfigError: in-context tasks, for which this version registers no dataset.
    """
    del icl_seq_len, icl_subset_num_batches
    for key, value in (('icl_tasks', icl_tasks_config), ('eval_gauntlet', eval_gauntlet_config)):
        if value:
            known = ', '.join(registry.icl_datasets.names()) or 'none'
            raise ConfigError([ConfigProblem(key, f'in-context tasks cannot be built: the registry {registry.icl_datasets.path} has these entries: {known}. Remove the key.')])
    evaluators = build_eval_loaders(eval_loader_config, tokenizer, device_eval_batch_size) if eval_loader_config else []
    return evaluators, [], None


def add_metrics_to_eval_loaders(evaluators: Iterable[Evaluator], metric_names: Sequence[str]) -> list[Evaluator]:
    """Gives each evaluator that has no metrics the model's; in-context evaluators keep theirs."""
    done = list(evaluators)
    for evaluator in done:
        if not evaluator.metric_names:
            evaluator.metric_names = list(metric_names)
    return done


def build_composer_model(
    name: str,
    cfg: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    init_context: ContextManager | None = None,
    master_weights_dtype: str | None = None,
) -> ComposerModel:
    """Builds a model of the ``models`` registry.

    Args:
        name: for example ``mpt_causal_lm``.
        cfg: its keyword arguments.
        tokenizer: passed to the model.
        init_context: entered while the weights are created, for example a meta-device context.
        master_weights_dtype: ``f16``, ``float16``, ``bf16`` or ``bfloat16`` casts the weights; None keeps float32.

    Raises:
        TypeError: a keyword that the model does not know.
        ValueError: another ``master_weights_dtype``.
    """
    with init_context or contextlib.nullcontext():
        model = construct_from_registry(name, registry.models, kwargs={**copy.deepcopy(dict(cfg)), 'tokenizer': tokenizer})
    if master_weights_dtype is None:
        return model
    if master_weights_dtype not in MASTER_WEIGHTS_DTYPES:
        raise ValueError(f'model.master_weights_dtype: {master_weights_dtype!r} is not one of {sorted(MASTER_WEIGHTS_DTYPES)}')
    import torch

    return model.to(dtype=getattr(torch, MASTER_WEIGHTS_DTYPES[master_weights_dtype]))


def build_optimizer(model: Any, name: str, optimizer_config: Mapping[str, Any]) -> Optimizer:
    """Builds an optimizer over the model's parameters.

    ``disable_grad`` (regex or list of them, searched in parameter names) freezes parameters; ``param_groups`` (list of ``{param_str_match: regex, **overrides}``) gives groups their own settings,
    the first match winning.

    Raises:
        ValueError: a ``params`` key, or an unknown optimizer.
        TypeError: a keyword that the optimizer does not know.
    """
    kwargs = copy.deepcopy(dict(optimizer_config))
    if 'params' in kwargs:
        raise ValueError('optimizer.params: parameters come from the model. Remove the key; use param_groups or disable_grad to treat some of them differently.')
    params = resolve_target(PARAM_GROUPS_BUILDER)(model, kwargs.pop('disable_grad', None), kwargs.pop('param_groups', None))
    return construct_from_registry(name, registry.optimizers, partial_function=False, kwargs={**kwargs, 'params': params})


def build_scheduler(name: str, scheduler_config: Mapping[str, Any] | None = None) -> ComposerScheduler:
    """Builds a learning-rate scheduler."""
    return construct_from_registry(name, registry.schedulers, kwargs=dict(scheduler_config or {}))


def build_logger(name: str, kwargs: Mapping[str, Any] | None = None) -> LoggerDestination:
    """Builds a logger destination."""
    return construct_from_registry(name, registry.loggers, kwargs=dict(kwargs or {}))


def build_algorithm(name: str, kwargs: Mapping[str, Any] | None = None) -> Algorithm:
    """Builds a Composer algorithm."""
    return construct_from_registry(name, registry.algorithms, kwargs=dict(kwargs or {}))


def build_metric(name: str, kwargs: Mapping[str, Any] | None = None) -> Metric:
    """Builds a metric."""
    return construct_from_registry(name, registry.metrics, kwargs=dict(kwargs or {}))


def build_callback(name: str, kwargs: Mapping[str, Any] | None = None, train_config: Mapping[str, Any] | None = None) -> Callback:
    """Builds a callback; one of ``callbacks_with_config`` also receives a deep copy of the config as ``train_config``.

    Raises:
        ValueError: the user set ``train_config``, or the name is in neither registry.
    """
    kwargs = dict(kwargs or {})
    if name not in registry.callbacks_with_config:
        return construct_from_registry(name, registry.callbacks, kwargs=kwargs)
    if 'train_config' in kwargs:
        raise ValueError(f'callbacks.{name}.train_config: is filled in with the config of the run. Remove the key.')
    return construct_from_registry(name, registry.callbacks_with_config, kwargs={**kwargs, 'train_config': copy.deepcopy(dict(train_config or {}))})


def build_load_planner(name: str, **kwargs: Any) -> Any:
    """Builds a planner for loading sharded checkpoints; must be a LoadPlanner."""
    from torch.distributed.checkpoint.planner import LoadPlanner

    return construct_from_registry(name, registry.load_planners, post_validation_function=LoadPlanner, kwargs=kwargs)


def build_save_planner(name: str, **kwargs: Any) -> Any:
    """Builds a planner for saving sharded checkpoints; must be a SavePlanner."""
    from torch.distributed.checkpoint.planner import SavePlanner

    return construct_from_registry(name, registry.save_planners, post_validation_function=SavePlanner, kwargs=kwargs)


def build_tp_strategies(name: str, model: ComposerModel) -> dict[str, Any]:
    """The layer plan of a tensor-parallel strategy for this model: module name -> parallel style."""
    return construct_from_registry(name, registry.tp_strategies, partial_function=False, kwargs={'model': model})
