"""Rules between keys of a training config, one named function each.

Each takes the config without the values that are already known to be wrong, notes problems and changes nothing. To add a rule, write the function and name it in ``_RULES``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llmfoundry import dist
from llmfoundry.config.batch_size import calculate_batch_size_info
from llmfoundry.config.moe_mesh import moe_device_mesh, needs_mesh
from llmfoundry.config.mpt_rules import check_mpt_rules
from llmfoundry.config.report import KeyPath, Report, lookup
from llmfoundry.config.times import parse_time, time_problem
from llmfoundry.config.train import TrainConfig
from llmfoundry.typed_registry import resolve_target

__all__ = ['check_rules', 'is_packed', 'iter_loaders']

_ASKS_FOR_PACKING = 'llmfoundry.data.finetuning.dataset_block:asks_for_packing'  # the loader's own answer, by name, as configs do not import components

Config = Mapping[str, Any]
_TIME_KEYS = ('max_duration', 'eval_interval', 'console_log_interval', 'save_interval')


def iter_loaders(config: Config) -> Iterator[tuple[KeyPath, Mapping[str, Any]]]:
    """Every data loader block with its path, the training loader first."""
    for key in ('train_loader', 'eval_loader', 'eval_loaders'):
        value = config.get(key)
        if isinstance(value, Mapping):
            yield (key,), value
        for index, item in enumerate(value if isinstance(value, list) else ()):
            if isinstance(item, Mapping):
                yield (key, str(index)), item


def times_are_times(config: Config, report: Report) -> None:
    """Durations and intervals are times, and the run has a length."""
    for key in _TIME_KEYS:
        problem = time_problem(config.get(key))
        if problem:
            report.add(key, problem)
    console = parse_time(config.get('console_log_interval'))
    if console is not None and (console.value < 1 or console.unit not in ('ep', 'ba')):
        report.add('console_log_interval', f"must be at least 1 and in epochs or batches ('1ep', '1ba'), got {config['console_log_interval']!r}")
    duration = parse_time(config.get('max_duration'))
    if duration is not None and (duration.value <= 0 or duration.unit == 'dur'):
        report.add('max_duration', f"must be a positive time in a unit other than 'dur', got {config['max_duration']!r}")


def batch_sizes_fit(config: Config, report: Report) -> None:
    """The global batch divides by the processes, and the microbatch is positive."""
    batch = config.get('global_train_batch_size')
    if batch is None:
        if not report.has('global_train_batch_size') and ('global_train_batch_size',) not in report.suggested:
            report.add('global_train_batch_size', 'missing: set the number of samples per optimizer step over all devices')
        return
    microbatch = config.get('device_train_microbatch_size', 'auto')
    if microbatch != 'auto' and microbatch <= 0:
        report.add('device_train_microbatch_size', f"must be positive or 'auto', got {microbatch}")
        microbatch = 'auto'
    try:
        calculate_batch_size_info(batch, microbatch)
    except ValueError as e:
        report.add('global_train_batch_size', str(e))
    evaluation = config.get('device_eval_batch_size')
    if evaluation is not None and evaluation <= 0:
        report.add('device_eval_batch_size', f'must be positive, got {evaluation}')


def auto_microbatch_excludes_profiler(config: Config, report: Report) -> None:
    """The search for a microbatch size cannot be profiled."""
    if config.get('profiler') is not None and config.get('device_train_microbatch_size', 'auto') == 'auto':
        report.add('device_train_microbatch_size', "'auto' and `profiler` cannot be combined, because the search for a size would be profiled; give a number")


def eval_loader_lists_have_labels(config: Config, report: Report) -> None:
    """Each of several evaluation loaders has a label of its own."""
    for key in ('eval_loader', 'eval_loaders'):
        labels: dict[str, int] = {}
        for index, item in enumerate(config[key] if isinstance(config.get(key), list) else ()):
            label = item.get('label') if isinstance(item, Mapping) else None
            if label is None:
                report.add((key, str(index), 'label'), 'missing: each element of a list of evaluation loaders needs a label, which names its metrics eval/<label>')
            elif not isinstance(label, str):
                report.add((key, str(index), 'label'), f'must be text, got {label!r}')
            elif label in labels:
                report.add((key, str(index), 'label'), f'{label!r} is the label of element {labels[label]} too; labels must differ')
            else:
                labels[label] = index


def one_of_two_spellings(config: Config, report: Report) -> None:
    """Keys that the loader fills from another one may not be given beside it."""
    for filled, given in (('eval_loaders', 'eval_loader'), ('icl_tasks_str', 'icl_tasks'), ('eval_gauntlet_str', 'eval_gauntlet')):
        if config.get(filled) is not None and config.get(given) is not None:
            report.add(filled, f'cannot be set together with {given}; keep {given}')


def t5_limits(config: Config, report: Report) -> None:
    """Encoder-decoder models take neither plain text nor in-context-learning tasks."""
    if lookup(config, 'model.name') != 'hf_t5':
        return
    for path, loader in iter_loaders(config):
        if loader.get('name') == 'text':
            report.add((*path, 'name'), "model hf_t5 is an encoder-decoder, which the 'text' loader cannot feed; use 'finetuning'")
    if config.get('icl_tasks') is not None or config.get('icl_tasks_str') is not None:
        report.add('icl_tasks', 'in-context-learning tasks need a decoder-only model, got hf_t5')


def no_training_in_8bit(config: Config, report: Report) -> None:
    """Weights in 8 bits cannot be trained."""
    if lookup(config, 'model.load_in_8bit'):
        report.add('model.load_in_8bit', 'is for evaluation only; delete the key to train')


def megablocks_need_original_parameters(config: Config, report: Report) -> None:
    """Experts spread over ranks need FSDP to keep the original parameters."""
    moe_ranks = lookup(config, 'model.ffn_config.moe_world_size', 1)
    if str(lookup(config, 'model.ffn_config.ffn_type', '')).startswith('mb_') and moe_ranks > 1 and lookup(config, 'fsdp_config.use_orig_params') is False:
        report.add('fsdp_config.use_orig_params', f'must be true with megablocks and moe_world_size {moe_ranks} > 1')


def experts_cover_the_ranks(config: Config, report: Report) -> None:
    """The sharding degrees multiply to the number of ranks over which experts are spread."""
    if dist.get_world_size() > 1 and isinstance(config.get('fsdp_config'), Mapping) and needs_mesh(config.get('model') or {}):
        try:
            moe_device_mesh(config['fsdp_config'], dist.get_world_size())
        except ValueError as e:
            report.add('fsdp_config', str(e))


def tensor_parallelism_excludes_experts(config: Config, report: Report) -> None:
    """Tensor parallelism has no plan for experts."""
    if config.get('tp_config') is not None and 'moe' in str(lookup(config, 'model.ffn_config.ffn_type', '')):
        report.add('tp_config', 'tensor parallelism does not work with mixture-of-experts layers')


def autoresume_needs_names(config: Config, report: Report) -> None:
    """Resuming finds its checkpoint by run name (or the variable RUN_NAME, which fills it in) and folder."""
    if config.get('autoresume'):
        for key in ('run_name', 'save_folder'):
            if config.get(key) is None and not (key == 'run_name' and os.environ.get('RUN_NAME')):
                report.add('autoresume', f'needs {key}, to find the newest checkpoint of this run')


def copies_have_a_local_source(config: Config, report: Report) -> None:
    """``additional_output_paths`` copies a folder of this machine."""
    folder = config.get('save_folder')
    if config.get('additional_output_paths') and (folder is None or '://' in folder or folder.startswith('dbfs:/')):
        report.add('additional_output_paths', f'copies a local save_folder, which is {folder!r}: set save_folder to a path and name the remote folder here')


def log_level_exists(config: Config, report: Report) -> None:
    """The log level is one of Python's, in any case."""
    level = config.get('python_log_level')
    if isinstance(level, str) and not isinstance(logging.getLevelName(level.upper()), int):
        report.add('python_log_level', f"expected one of 'debug', 'info', 'warning', 'error', 'critical', got {level!r}")


def gradient_clipping_has_a_kind(config: Config, report: Report) -> None:
    """Composer looks at the kind of clipping only after the first backward pass."""
    kind = lookup(config, 'algorithms.gradient_clipping.clipping_type')
    if kind is not None and kind not in ('norm', 'value', 'adaptive'):
        report.add('algorithms.gradient_clipping.clipping_type', f"expected one of 'norm', 'value', 'adaptive', got {kind!r}")
    elif kind == 'adaptive' and config.get('fsdp_config') is not None and dist.get_world_size() > 1:
        report.add('algorithms.gradient_clipping.clipping_type', "'adaptive' needs whole parameters, which fsdp_config shards; use 'norm' or 'value'")


def seed_and_timeout_ranges(config: Config, report: Report) -> None:
    """The seed is one that numpy takes, and the timeout leaves time."""
    seed, timeout = config.get('seed'), config.get('dist_timeout')
    if seed is not None and not 0 <= seed < 2**32:
        report.add('seed', f'must lie in 0 ... 2**32 - 1, got {seed}')
    if timeout is not None and timeout <= 0:
        report.add('dist_timeout', f'must be a positive number of seconds, got {timeout}')


def single_checkpoint_modes(config: Config, report: Report) -> None:
    """The modes that write one checkpoint and stop need what writes it, and exclude each other."""
    callbacks = config.get('callbacks') or {}
    if config.get('only_hf_checkpoint') and 'hf_checkpointer' not in callbacks:
        report.add('only_hf_checkpoint', 'needs the callback hf_checkpointer, which writes the checkpoint')
    if config.get('only_composer_checkpoint') and config.get('save_folder') is None:
        report.add('only_composer_checkpoint', 'needs save_folder')
    if config.get('only_hf_checkpoint') and config.get('only_composer_checkpoint'):
        report.add('only_composer_checkpoint', 'cannot be set together with only_hf_checkpoint')


def is_packed(loader: Mapping[str, Any]) -> bool:
    """Whether a loader block asks the finetuning loader to put several documents into a row."""
    dataset = loader.get('dataset')
    if loader.get('name') != 'finetuning' or not isinstance(dataset, Mapping):
        return False
    return resolve_target(_ASKS_FOR_PACKING)(dataset)


def packed_documents_stay_apart(config: Config, report: Report) -> None:
    """An MPT model may not be told to let packed documents see each other; left out, the key is derived."""
    if lookup(config, 'model.name') == 'mpt_causal_lm' and lookup(config, 'model.attn_config.attn_uses_sequence_id') is False:
        for path, loader in iter_loaders(config):
            if is_packed(loader):
                report.add(
                    'model.attn_config.attn_uses_sequence_id',
                    f'must be true (or left out, which means true here), got False: {".".join(path)}.dataset packs several documents into a row, and they would attend to each other',
                )
                return


def sequences_fit_the_model(config: Config, report: Report) -> None:
    """No loader makes longer sequences than an MPT model takes."""
    limit = lookup(config, 'model.max_seq_len') if lookup(config, 'model.name') == 'mpt_causal_lm' else None
    for path, loader in iter_loaders(config):
        length = loader['dataset'].get('max_seq_len') if isinstance(loader.get('dataset'), Mapping) else None
        if isinstance(limit, int) and isinstance(length, int) and length > limit:
            report.add((*path, 'dataset', 'max_seq_len'), f'must not exceed model.max_seq_len {limit}, got {length}')


def datasets_name_their_data(config: Config, report: Report) -> None:
    """A text data set has streams or a place, and one separator of documents."""
    for path, loader in iter_loaders(config):
        dataset = loader.get('dataset')
        if loader.get('name') != 'text' or not isinstance(dataset, Mapping):
            continue
        here = (*path, 'dataset')
        places = [k for k in ('local', 'remote') if dataset.get(k) is not None]
        if dataset.get('streams') is None and not places and not any(report.has((*here, k)) for k in ('streams', 'local', 'remote')):
            report.add(here, 'names no data: give local (a folder, to which remote is copied if given) or streams')
        elif dataset.get('streams') is not None and places:
            report.add((*here, places[0]), f'cannot be set together with streams; put {places[0]} into each stream')
        if dataset.get('eos_token_id') is not None and dataset.get('bos_token_id') is not None:
            report.add((*here, 'bos_token_id'), 'cannot be set together with eos_token_id: one of them separates documents')


def worker_counts(config: Config, report: Report) -> None:
    """Loaders have zero or more workers."""
    for path, loader in iter_loaders(config):
        workers = loader.get('num_workers')
        if workers is not None and workers < 0:
            report.add((*path, 'num_workers'), f'must be 0 or more, got {workers}')


def warmup_fits(config: Config, report: Report) -> None:
    """A warmup longer than an explicit t_max would never reach the decay."""
    warmup, end = parse_time(lookup(config, 'scheduler.t_warmup')), parse_time(lookup(config, 'scheduler.t_max'))
    if warmup is not None and end is not None and warmup.unit == end.unit and warmup.value > end.value:
        report.add('scheduler.t_warmup', f'must not exceed t_max {config["scheduler"]["t_max"]}, got {config["scheduler"]["t_warmup"]}')


def optimizer_ranges(config: Config, report: Report) -> None:
    """Learning rate and betas are in their ranges."""
    rate = lookup(config, 'optimizer.lr')
    if isinstance(rate, (int, float)) and rate < 0:
        report.add('optimizer.lr', f'must not be negative, got {rate}')
    betas = lookup(config, 'optimizer.betas')
    if isinstance(betas, list) and (len(betas) != 2 or not all(isinstance(b, (int, float)) and 0 <= b <= 1 for b in betas)):
        report.add('optimizer.betas', f'expected two numbers in [0, 1], got {betas}')


def metadata_keys_are_free(config: Config, report: Report) -> None:
    """Flattened metadata does not hide a key of the config."""
    if config.get('flatten_metadata', True):
        for key in config.get('metadata') or {}:
            if key in TrainConfig.model_fields:
                report.add(('metadata', key), 'is also a key of the config, so the flattened log would hold two values; rename it or set flatten_metadata: false')


def mpt_block_is_consistent(config: Config, report: Report) -> None:
    """The rules of the MPT block hold."""
    if lookup(config, 'model.name') == 'mpt_causal_lm':
        check_mpt_rules(config['model'], report)


def gauntlet_is_consistent(config: Config, report: Report) -> None:
    """The gauntlet has a known weighting and a list of categories."""
    gauntlet = config.get('eval_gauntlet')
    if not isinstance(gauntlet, Mapping):
        return
    if gauntlet.get('weighting') not in ('EQUAL', 'SAMPLE_SZ', 'LOG_SAMPLE_SZ'):
        report.add('eval_gauntlet.weighting', f"expected one of 'EQUAL', 'SAMPLE_SZ', 'LOG_SAMPLE_SZ', got {gauntlet.get('weighting')!r}")
    if gauntlet.get('rescale_accuracy', True) and not gauntlet.get('subtract_random_baseline', True):
        report.add('eval_gauntlet.rescale_accuracy', 'needs subtract_random_baseline: true')
    if not isinstance(gauntlet.get('categories'), list):
        report.add('eval_gauntlet.categories', 'missing: a list of {name, benchmarks}')


_RULES: tuple[Callable[[Config, Report], None], ...] = (
    times_are_times, batch_sizes_fit, auto_microbatch_excludes_profiler, eval_loader_lists_have_labels, one_of_two_spellings, t5_limits, no_training_in_8bit,
    megablocks_need_original_parameters, experts_cover_the_ranks, tensor_parallelism_excludes_experts, autoresume_needs_names, log_level_exists, single_checkpoint_modes, datasets_name_their_data,
    copies_have_a_local_source, packed_documents_stay_apart, sequences_fit_the_model,
    gradient_clipping_has_a_kind, seed_and_timeout_ranges, worker_counts, warmup_fits, optimizer_ranges, metadata_keys_are_free, mpt_block_is_consistent, gauntlet_is_consistent,
)  # fmt: skip


def check_rules(config: Config, report: Report) -> None:
    """Applies every rule."""
    for rule in _RULES:
        rule(config, report)


