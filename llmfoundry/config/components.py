"""Checks every component block of a training config: names against registries, keys and types against signatures.

One function per kind of block, in the order of the YAML. Nothing is imported but what a plug-in already registered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from llmfoundry import registry
from llmfoundry.config.blocks import check_block, check_kwargs, check_name, check_type, expect_mapping, target_signature
from llmfoundry.config.finetuning_block import check_finetuning_dataset
from llmfoundry.config.mpt_block import MPT_SUB_BLOCKS, MPTBlock
from llmfoundry.config.report import KeyPath, Report
from llmfoundry.config.signatures import Parameter, Signature, read_fields, read_signature
from llmfoundry.config.times import time_problem
from llmfoundry.typed_registry import TypedRegistry

__all__ = ['check_components', 'check_evaluation_components', 'dataset_signature', 'fsdp_fields']

MODEL_BUILDER_KEYS = frozenset({'name', 'init_device', 'master_weights_dtype', 'activation_checkpointing_target'})
OPTIMIZER_BUILDER_KEYS = frozenset({'name', 'disable_grad', 'param_groups'})
# Dataset classes behind the `dataset` block of a loader; a loader that is not listed checks its own.
DATASET_TARGETS = {'text': ('llmfoundry.data.text_data:StreamingTextDataset', 'streaming:StreamingDataset')}
# Keys of a text `dataset` block that the loader reads itself.
TEXT_LOADER_KEYS = {
    'max_seq_len': int, 'eos_token_id': int | None, 'bos_token_id': int | None, 'mlm_probability': float | None, 'token_encoding_type': str, 'seq_parallel_replication': int | None,
    'override_eos_token_id_mismatch_error': bool, 'override_bos_token_id_mismatch_error': bool,
}  # fmt: skip
_TOKEN_TYPES = ('int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64')


def check_components(config: Mapping[str, Any], report: Report) -> None:
    """Checks all component blocks of a training config."""
    for key, check in _CHECKS.items():
        value = config.get(key)
        if value is not None and expect_mapping(report, (key,), value):
            check(report, (key,), value)
    check_evaluation_components(config, report)


def check_evaluation_components(config: Mapping[str, Any], report: Report) -> None:
    """Checks eval_loader(s) and the in-context-learning tasks; shared by training and evaluation configs."""
    for key in ('eval_loader', 'eval_loaders', 'icl_tasks'):
        value = config.get(key)
        check = _check_icl_task if key == 'icl_tasks' else _check_loader
        if isinstance(value, list):
            for index, item in enumerate(value):
                if expect_mapping(report, (key, str(index)), item):
                    check(report, (key, str(index)), item)
        elif isinstance(value, Mapping) and key == 'eval_loader':
            _check_loader(report, (key,), value)


def _check_named(report: Report, path: KeyPath, block: Mapping[str, Any], reg: TypedRegistry, provided: Collection[str] = (), extra: Collection[str] = ('name',)) -> Signature | None:
    """A block of the form {name: ..., **arguments}."""
    if 'name' not in block:
        report.add((*path, 'name'), f'missing: this key is mandatory (a name from the registry {reg.path})')
        return None
    if not check_name(report, (*path, 'name'), block['name'], reg):
        return None
    signature = target_signature(reg, block['name'])
    check_kwargs(report, path, block, signature, provided, extra)
    return signature


def _check_model(report: Report, path: KeyPath, block: Mapping[str, Any]) -> None:
    if block.get('name') != 'mpt_causal_lm':
        _check_named(report, path, block, registry.models, ('tokenizer',), MODEL_BUILDER_KEYS)
        if 'init_device' in block:
            _check_choice(report, (*path, 'init_device'), block['init_device'], ('cpu', 'meta', 'mixed'))
        return
    plug_in_keys = _plug_in_layer_keys(block)
    for key in MPT_SUB_BLOCKS:
        if block.get(key) is not None and expect_mapping(report, (*path, key), block[key]):
            extra, is_open = plug_in_keys.get(key, ((), False))
            check_block(report, (*path, key), block[key], MPT_SUB_BLOCKS[key], open_keys=is_open, extra=extra)
    check_block(report, path, block, MPTBlock, skip=MPT_SUB_BLOCKS)
    _check_layer_names(report, path, block)


def _plug_in_layer_keys(block: Mapping[str, Any]) -> dict[str, tuple[Collection[str], bool]]:
    """Keys that a layer outside our built-ins adds to its sub-block, and whether it takes any key."""
    found: dict[str, tuple[Collection[str], bool]] = {}
    for key, name_key, registries in (
        ('attn_config', 'attn_type', (registry.attention_classes,)),
        ('ffn_config', 'ffn_type', (registry.ffns, registry.ffns_with_norm, registry.ffns_with_megablocks)),
        ('init_config', 'name', (registry.param_init_fns,)),
    ):
        sub = block.get(key)
        name = sub.get(name_key) if isinstance(sub, Mapping) else None
        if not isinstance(name, str):
            continue
        if name in registry.ffns_with_megablocks.all_names() and key == 'ffn_config':
            found[key] = ((), True)  # these take every field of megablocks' own Arguments
            continue
        reg = next((r for r in registries if name in r), None)
        target = reg.target(name) if reg is not None else None
        is_builtin = isinstance(target, str) and target.startswith('.') or str(getattr(target, '__module__', '')).startswith('llmfoundry.')
        if target is not None and not is_builtin:
            signature = read_signature(target)
            found[key] = (tuple(signature.parameters), not signature.closed) if signature else ((), True)
    return found


def _check_layer_names(report: Report, path: KeyPath, block: Mapping[str, Any]) -> None:
    def sub(key: str, name: str) -> Any:
        value = block.get(key)
        return value.get(name) if isinstance(value, Mapping) else None

    ffn_names = {n for r in (registry.ffns_with_norm, registry.ffns_with_megablocks) for n in r.all_names()}
    fc = block.get('fc_type')
    for where, value, reg, fold in (
        (('norm_type',), block.get('norm_type'), registry.norms, True),
        (('fc_type', 'name') if isinstance(fc, Mapping) else ('fc_type',), fc.get('name') if isinstance(fc, Mapping) else fc, registry.fcs, True),
        (('attn_config', 'attn_type'), sub('attn_config', 'attn_type'), registry.attention_classes, False),
        (('attn_config', 'attn_impl'), sub('attn_config', 'attn_impl'), registry.attention_implementations, False),
        (('ffn_config', 'ffn_type'), sub('ffn_config', 'ffn_type'), registry.ffns, False),
        (('init_config', 'name'), sub('init_config', 'name'), registry.param_init_fns, False),
    ):
        if isinstance(value, str):
            check_name(report, (*path, *where), value, reg, fold, extra=ffn_names if reg is registry.ffns else ())


def _check_tokenizer(report: Report, path: KeyPath, block: Mapping[str, Any]) -> None:
    parameters = {'name': Parameter('name', str, True), 'kwargs': Parameter('kwargs', dict | None, False)}
    check_kwargs(report, path, block, Signature(parameters, closed=True))
    name, kwargs = block.get('name'), block.get('kwargs')
    if isinstance(name, str) and name in registry.tokenizers and isinstance(kwargs, Mapping):
        check_kwargs(report, (*path, 'kwargs'), kwargs, target_signature(registry.tokenizers, name))


def _check_optimizer(report: Report, path: KeyPath, block: Mapping[str, Any]) -> None:
    _check_named(report, path, block, registry.optimizers, ('params',), OPTIMIZER_BUILDER_KEYS)
    if 'disable_grad' in block:
        check_type(report, (*path, 'disable_grad'), block['disable_grad'], str | list[str] | None)
    groups = block.get('param_groups')
    if groups is None:
        return
    check_type(report, (*path, 'param_groups'), groups, list[dict])
    for index, group in enumerate(groups if isinstance(groups, list) else ()):
        if isinstance(group, Mapping):
            here = (*path, 'param_groups', str(index))
            signature = target_signature(registry.optimizers, block['name']) if isinstance(block.get('name'), str) else None
            optional = {n: Parameter(n, p.type, False) for n, p in signature.parameters.items()} if signature else {}
            check_kwargs(report, here, group, Signature(optional, signature.closed) if signature else None, ('params',), ('param_str_match',))
            if 'param_str_match' not in group:
                report.add((*here, 'param_str_match'), 'missing: this key is mandatory (a regular expression over parameter names)')


def _check_scheduler(report: Report, path: KeyPath, block: Mapping[str, Any]) -> None:
    _check_named(report, path, block, registry.schedulers)
    for key, value in block.items():
        if key.startswith('t_'):
            problem = time_problem(value)
            if problem and not report.has((*path, key)):
                report.add((*path, key), problem)


def _check_loader(report: Report, path: KeyPath, block: Mapping[str, Any]) -> None:
    extra = ('name', 'label') if path[0] in ('eval_loader', 'eval_loaders') else ('name',)
    _check_named(report, path, block, registry.dataloaders, ('tokenizer', 'device_batch_size'), extra)
    name, dataset = block.get('name'), block.get('dataset')
    if isinstance(name, str) and name in DATASET_TARGETS and isinstance(dataset, Mapping):
        _check_dataset(report, (*path, 'dataset'), dataset, name)
    elif name == 'finetuning' and isinstance(dataset, Mapping):
        check_finetuning_dataset(report, (*path, 'dataset'), dataset)


def dataset_signature(loader_name: str) -> Signature:
    """Keys of a loader's ``dataset`` block: those of its dataset class, of StreamingDataset below it, and of the loader."""
    merged = Signature({n: Parameter(n, tp, required=n == 'max_seq_len') for n, tp in TEXT_LOADER_KEYS.items()}, closed=True)
    for target in DATASET_TARGETS[loader_name]:
        signature = read_signature(target)
        if signature is not None:
            merged = merged.merged_with(Signature(signature.parameters, True, signature.doc))
    parameters = {**merged.parameters, 'streams': Parameter('streams', dict[str, dict] | None, False)}
    # YAML numbers such as 1e6 arrive as floats and the loader casts them; the types of Streaming's own arguments are right otherwise.
    return Signature(parameters, True)


def _check_dataset(report: Report, path: KeyPath, dataset: Mapping[str, Any], loader_name: str) -> None:
    check_kwargs(report, path, dataset, dataset_signature(loader_name), ('tokenizer', 'batch_size'))
    if 'token_encoding_type' in dataset:
        _check_choice(report, (*path, 'token_encoding_type'), dataset['token_encoding_type'], _TOKEN_TYPES)
    streams = dataset.get('streams')
    if isinstance(streams, Mapping):
        signature = read_signature('streaming:Stream')
        for name, stream in streams.items():
            if expect_mapping(report, (*path, 'streams', name), stream):
                check_kwargs(report, (*path, 'streams', name), stream, signature)


def _check_choice(report: Report, path: KeyPath, value: Any, choices: Collection[str]) -> None:
    if isinstance(value, str) and value not in choices:
        report.add(path, f'expected one of {", ".join(map(repr, choices))}, got {value!r}')


def _check_group(report: Report, path: KeyPath, group: Mapping[str, Any], reg: TypedRegistry, provided: Collection[str] = ()) -> None:
    """A block of the form {name: arguments, name: arguments}; null counts as no arguments."""
    for name, kwargs in group.items():
        here = (*path, name)
        if check_name(report, here, name, reg) and (kwargs is None or expect_mapping(report, here, kwargs)):
            check_kwargs(report, here, kwargs or {}, target_signature(reg, name), provided)


def _check_callbacks(report: Report, path: KeyPath, group: Mapping[str, Any]) -> None:
    with_config = {k: v for k, v in group.items() if k in registry.callbacks_with_config}
    _check_group(report, path, with_config, registry.callbacks_with_config, ('train_config',))
    _check_group(report, path, {k: v for k, v in group.items() if k not in with_config}, registry.callbacks)


def _check_loggers(report: Report, path: KeyPath, group: Mapping[str, Any]) -> None:
    _check_group(report, path, group, registry.loggers)


def _check_algorithms(report: Report, path: KeyPath, group: Mapping[str, Any]) -> None:
    _check_group(report, path, group, registry.algorithms)


def fsdp_fields() -> dict[str, Parameter]:
    """Keys of fsdp_config, read from Composer's two config classes; the device mesh is Composer's own business."""
    fields = {**read_fields('composer.utils.parallelism:FSDP2Config'), **read_fields('composer.utils.parallelism:FSDPConfig')}
    fields.pop('device_mesh', None)
    if 'mixed_precision' in fields:
        fields['mixed_precision'] = Parameter('mixed_precision', str | dict[str, Any], False)
    return fields


def _check_fsdp(report: Report, path: KeyPath, block: Mapping[str, Any]) -> None:
    fields = fsdp_fields()
    if 'device_mesh' in block:
        report.add((*path, 'device_mesh'), 'is made by Composer; set data_parallel_shard_degree and data_parallel_replicate_degree')
    check_kwargs(report, path, block, Signature(fields, closed=True) if fields else None, extra=('device_mesh',))
    for key, choices in (
        ('sharding_strategy', ('FULL_SHARD', 'SHARD_GRAD_OP', 'NO_SHARD', 'HYBRID_SHARD', '_HYBRID_SHARD_ZERO2')),
        ('state_dict_type', ('full', 'sharded')),
        ('mixed_precision', ('FULL', 'DEFAULT', 'PURE')),
        ('backward_prefetch', ('BACKWARD_PRE', 'BACKWARD_POST', 'NONE')),
    ):
        _check_choice(report, (*path, key), block.get(key), choices)
    for key, reg in (('load_planner', registry.load_planners), ('save_planner', registry.save_planners)):
        planner = block.get(key)
        if planner is not None and expect_mapping(report, (*path, key), planner):
            if len(planner) != 1:
                report.add((*path, key), f'expected one entry name: arguments, got {len(planner)}')
            _check_group(report, (*path, key), planner, reg)


def _check_tp(report: Report, path: KeyPath, block: Mapping[str, Any]) -> None:
    fields = read_fields('composer.utils.parallelism:TPConfig')
    own = {'strategy': Parameter('strategy', str, True), 'tensor_parallel_degree': Parameter('tensor_parallel_degree', int, True)}
    check_kwargs(report, path, block, Signature({**fields, **own}, closed=bool(fields)))
    if isinstance(block.get('strategy'), str):
        check_name(report, (*path, 'strategy'), block['strategy'], registry.tp_strategies)


def _check_compile(report: Report, path: KeyPath, block: Mapping[str, Any]) -> None:
    signature = read_signature('torch:compile')
    if signature is not None:
        # torch accepts more kinds than YAML can hold, so only the names are checked.
        signature = Signature({n: Parameter(n, Any, False) for n in signature.parameters}, signature.closed)
    check_kwargs(report, path, block, signature, ('model',))


def _check_profiler(report: Report, path: KeyPath, block: Mapping[str, Any]) -> None:
    check_kwargs(report, path, block, read_signature('composer.profiler:Profiler'), ('trace_handlers',), ('json_trace_handler',))
    for key, target in (('schedule', 'composer.profiler:cyclic_schedule'), ('json_trace_handler', 'composer.profiler:JSONTraceHandler')):
        if block.get(key) is not None and expect_mapping(report, (*path, key), block[key]):
            check_kwargs(report, (*path, key), block[key], read_signature(target))


_ICL_MANDATORY = ('label', 'dataset_uri', 'icl_task_type', 'num_fewshot')
ICL_TASK_TYPES = ('multiple_choice', 'schema', 'language_modeling', 'generation_task_with_answers')


def _check_icl_task(report: Report, path: KeyPath, task: Mapping[str, Any]) -> None:
    for key in _ICL_MANDATORY:
        if key not in task:
            report.add((*path, key), 'missing: this key is mandatory')
    check_type(report, (*path, 'num_fewshot'), task.get('num_fewshot', []), list[int])
    if isinstance(task.get('icl_task_type'), str) and task['icl_task_type'] not in ICL_TASK_TYPES:
        check_name(report, (*path, 'icl_task_type'), task['icl_task_type'], registry.icl_datasets, extra=ICL_TASK_TYPES)
    if 'num_beams' in task:
        report.add((*path, 'num_beams'), 'write generation_kwargs.num_beams')


_CHECKS: dict[str, Callable[[Report, KeyPath, Mapping[str, Any]], None]] = {
    'model': _check_model,
    'tokenizer': _check_tokenizer,
    'optimizer': _check_optimizer,
    'scheduler': _check_scheduler,
    'train_loader': _check_loader,
    'algorithms': _check_algorithms,
    'callbacks': _check_callbacks,
    'loggers': _check_loggers,
    'fsdp_config': _check_fsdp,
    'tp_config': _check_tp,
    'compile_config': _check_compile,
    'profiler': _check_profiler,
}
