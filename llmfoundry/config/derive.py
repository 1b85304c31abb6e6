"""Fills what follows from other keys, and says so: one function per derived value, run after all checks passed.

Every function takes the config dict and returns a new one with a list of notes; nothing else in the package changes settings.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from llmfoundry import dist, registry
from llmfoundry.config.moe_mesh import moe_device_mesh, needs_mesh
from llmfoundry.config.report import lookup
from llmfoundry.config.rules import is_packed, iter_loaders
from llmfoundry.config.times import parse_time

__all__ = ['derive', 'split_spellings']

Config = dict[str, Any]
Notes = list[str]
BATCH_TRANSFORM = 'update_batch_size_info'


def split_spellings(config: Mapping[str, Any]) -> Config:
    """Moves a list in eval_loader to eval_loaders, and paths in icl_tasks and eval_gauntlet to their ``_str`` keys, so that each key has one type."""
    moved = dict(config)
    for key, other, kind in (('eval_loader', 'eval_loaders', list), ('icl_tasks', 'icl_tasks_str', str), ('eval_gauntlet', 'eval_gauntlet_str', str)):
        if isinstance(moved.get(key), kind):
            moved[other] = moved.pop(key)
    return moved


def _run_name(config: Config) -> tuple[Config, Notes]:
    name = os.environ.get('RUN_NAME')
    if config.get('run_name') is None and name:
        return {**config, 'run_name': name}, [f'run_name: {name} (from the variable RUN_NAME)']
    return config, []


def _autoresume(config: Config) -> tuple[Config, Notes]:
    """True when the run has a name and a folder, and what lies there can be resumed; an explicit value stands."""
    named = config.get('run_name') is not None and config.get('save_folder') is not None
    if 'autoresume' in config or not named or config.get('save_overwrite') or config.get('save_weights_only'):
        return config, []
    note = 'autoresume: true (run_name and save_folder are set, save_overwrite and save_weights_only are not); a checkpoint in save_folder is continued'
    return {**config, 'autoresume': True}, [note]


def _checkpoint_names(config: Config) -> tuple[Config, Notes]:
    sharded = lookup(config, 'fsdp_config.state_dict_type') == 'sharded'
    latest = 'latest-sharded-rank{rank}' if sharded else 'latest-rank{rank}.pt'
    names = {'save_filename': 'ep{epoch}-ba{batch}-rank{rank}.pt', 'save_latest_filename': latest}
    return {**config, **{k: v for k, v in names.items() if config.get(k) is None}}, []


def _batch_sizes(config: Config) -> tuple[Config, Notes]:
    # From the registry, since a plug-in may have put its own arithmetic (replicated data) in our place.
    updated = registry.config_transforms.get(BATCH_TRANSFORM)(dict(config))
    notes = []
    asked = config.get('device_train_microbatch_size', 'auto')
    if asked != 'auto' and updated['device_train_microbatch_size'] != asked:
        notes.append(f'device_train_microbatch_size: {updated["device_train_microbatch_size"]} (reduced from {asked}, which is more than the device batch)')
    for key in ('n_gpus', 'device_train_batch_size', 'device_train_grad_accum'):
        if config.get(key) is not None and config[key] != updated[key]:
            notes.append(f'{key}: {updated[key]} (computed; {config[key]} in the config has no effect)')
    return updated, notes


def _expert_mesh(config: Config) -> tuple[Config, Notes]:
    """Megablocks needs the shape of the data-parallel mesh, which only fsdp_config knows."""
    model, ranks = config['model'], dist.get_world_size()
    if ranks == 1 or config.get('fsdp_config') is None or not needs_mesh(model):
        return config, []
    ffn = {**model['ffn_config'], 'device_mesh': moe_device_mesh(config['fsdp_config'], ranks)}
    return {**config, 'model': {**model, 'ffn_config': ffn}}, [f'model.ffn_config.device_mesh: {ffn["device_mesh"]} (from fsdp_config)']


def _packed_documents(config: Config) -> tuple[Config, Notes]:
    """Packed documents never see each other, so an MPT model is told to look at their numbers."""
    model = config['model']
    if model.get('name') != 'mpt_causal_lm' or lookup(model, 'attn_config.attn_uses_sequence_id'):
        return config, []
    packed = ['.'.join(path) for path, loader in iter_loaders(config) if is_packed(loader)]
    if not packed:
        return config, []
    attn_config = {**(model.get('attn_config') or {}), 'attn_uses_sequence_id': True}
    note = f'model.attn_config.attn_uses_sequence_id: true, because {" and ".join(packed)} puts several documents into a row'
    return {**config, 'model': {**model, 'attn_config': attn_config}}, [note]


def _eval_sequence_length(config: Config) -> tuple[Config, Notes]:
    return (config if config.get('icl_seq_len') is not None else {**config, 'icl_seq_len': config['max_seq_len']}), []


def _empty_groups(config: Config) -> tuple[Config, Notes]:
    """``lr_monitor:`` without arguments means no arguments."""
    groups = {k: {n: v or {} for n, v in config[k].items()} for k in ('loggers', 'callbacks', 'algorithms') if isinstance(config.get(k), Mapping)}
    return {**config, **groups}, []


def _long_warmup(config: Config) -> tuple[Config, Notes]:
    warmup, end = parse_time(lookup(config, 'scheduler.t_warmup')), parse_time(config.get('max_duration'))
    if warmup is not None and end is not None and warmup.unit == end.unit and warmup.value > end.value:
        return config, [f'scheduler.t_warmup {config["scheduler"]["t_warmup"]} is longer than the run ({config["max_duration"]}): the learning rate does not reach its peak']
    return config, []


def _absent_packages(config: Config) -> tuple[Config, Notes]:
    """Built-in layers that this machine cannot build, although another may."""
    notes = []
    ffn = lookup(config, 'model.ffn_config.ffn_type')
    fc = lookup(config, 'model.fc_type')
    for name, registries in ((ffn, (registry.ffns, registry.ffns_with_norm, registry.ffns_with_megablocks)), (lookup({'fc': fc}, 'fc.name', fc), (registry.fcs,))):
        if isinstance(name, str) and any(name in r.all_names() for r in registries) and not any(name in r for r in registries):
            notes.append(f'{name} needs a package that is not installed on this machine')
    return config, notes


_STEPS: tuple[Callable[[Config], tuple[Config, Notes]], ...] = (
    _run_name, _autoresume, _checkpoint_names, _batch_sizes, _expert_mesh, _packed_documents, _eval_sequence_length, _empty_groups, _long_warmup, _absent_packages,
)  # fmt: skip


def derive(config: Mapping[str, Any]) -> tuple[Config, Notes]:
    """The config with all derived values, and one line for each that a user might not expect."""
    result, notes = dict(config), []
    for step in _STEPS:
        result, more = step(result)
        notes += more
    return result, notes
