"""Old names: what earlier releases called things, and what to write instead.

Two kinds. Top-level keys that only served interpolation stay accepted with a note, because documents and released YAMLs use them. Keys and values that
no longer exist are errors with a remedy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from llmfoundry.config.base import Block
from llmfoundry.config.mpt_block import AttnBlock, FfnBlock, InitBlock, MPTBlock
from llmfoundry.config.report import KeyPath
from llmfoundry.config.train import TrainConfig

__all__ = ['split_top_level_variables', 'stale_key_hint', 'variables_notes']

# Top-level names that released YAMLs and their documents define for interpolation.
KNOWN_VARIABLES = frozenset({
    'data_local', 'data_remote', 'global_seed', 'tokenizer_name', 'model_name_or_path', 'max_split_size', 'run_group', 'dataset_name', 'hf_name', 'icl_max_seq_len',
})  # fmt: skip

_REFERENCE = re.compile(r'\$\{\s*([A-Za-z_][\w-]*)')

# Last two keys of the path (or the one top-level key) -> remedy; `=value` marks a value rather than a key.
_STALE_KEYS: dict[str, str] = {
    'attn_config.prefix_lm': 'prefix-LM attention was removed; delete the key',
    'attn_config.attn_impl=triton': 'the triton kernel was removed; use flash or torch',
    'ffn_config.ffn_type=mptgeglu': "renamed to 'mptglu'",
    'model.attn_qk_ln': 'moved: write model.attn_config.qk_ln',
    'model.attn_clip_qkv': 'moved: write model.attn_config.clip_qkv',
    'model.mlp_ratio': 'renamed: write model.expansion_ratio',
    'model.param_init_fn': 'moved: write model.init_config.name',
    'model.verbose': 'removed: the parameter table is always logged; delete the key',
    'model.gradient_checkpointing': 'write fsdp_config.activation_checkpointing',
    'model.low_precision_layernorm': 'write model.norm_type: low_precision_layernorm',
    'fsdp_config.min_params': 'removed: blocks are wrapped by kind; delete the key',
    'train_loader.name=text_denoising': 'removed in release 0.7; use text',
    'grad_accum': 'renamed: set device_train_microbatch_size, the number of accumulation steps follows',
    'device_train_microbatch': 'renamed: write device_train_microbatch_size',
    'icl_max_seq_len': 'renamed: write icl_seq_len',
}


def stale_key_hint(path: KeyPath, value: str | None = None) -> str | None:
    """The remedy for a key (or, with ``value``, for a value) of an earlier release, or that belongs elsewhere; else None."""
    suffix = '' if value is None else f'={value}'
    stale = _STALE_KEYS.get('.'.join(path[-2:]) + suffix) or (_STALE_KEYS.get(path[0] + suffix) if len(path) == 1 else None)
    return stale or (_misplaced_hint(path) if value is None else None)


_HOMES: tuple[tuple[str, type[Block]], ...] = (('', TrainConfig), ('model', MPTBlock), ('model.attn_config', AttnBlock), ('model.ffn_config', FfnBlock), ('model.init_config', InitBlock))


def _misplaced_hint(path: KeyPath) -> str | None:
    """Where a key belongs that is right elsewhere: ``attn_impl`` directly under ``model``, ``d_model`` at the top level."""
    if len(path) > 1 and path[0] != 'model' or path[-1] == 'name':
        return None
    for home, block in _HOMES:
        if path[-1] in block.model_fields and home != '.'.join(path[:-1]):
            return f'write it as {home}.{path[-1]}' if home else 'it belongs at the top level'
    return None


def referenced_names(text: str) -> set[str]:
    """Top-level names that some ``${name...}`` in the YAML text refers to."""
    return set(_REFERENCE.findall(text))


def split_top_level_variables(config: Mapping[str, Any], known_keys: set[str], text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separates the config from top-level keys that only served interpolation.

    A key outside ``known_keys`` is such a variable when released YAMLs used it so, or when this file interpolates it.

    Returns:
        The config without them, with their values under ``variables``; and the variables alone.
    """
    referenced = referenced_names(text)
    old = {k: v for k, v in config.items() if k not in known_keys and (k in KNOWN_VARIABLES or k in referenced) and not (k in _STALE_KEYS and k not in referenced)}
    if not old:
        return dict(config), {}
    rest = {k: v for k, v in config.items() if k not in old}
    variables = rest.get('variables') if isinstance(rest.get('variables'), Mapping) else {}
    rest['variables'] = {**old, **variables}
    return rest, old


def variables_notes(variables: Iterable[str], text: str) -> list[str]:
    """One line about top-level variables that the text interpolates, and one about those without effect."""
    used = [name for name in variables if name in referenced_names(text)]
    unused = [name for name in variables if name not in used]
    notes = [f'top-level {", ".join(used)}: used for interpolation only; newer files put such names under `variables:`'] if used else []
    return notes + ([f'top-level {", ".join(unused)}: no effect, since nothing in the file interpolates it'] if unused else [])
