"""Builds a transformers model for training: its config, the overrides from the YAML, and the weights.

Master weights are always float32, the KV cache is off, and safetensors files are preferred. The steps are plain functions, so that an error names the key at fault.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from typing import Any, Callable, Mapping

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from llmfoundry import dist
from llmfoundry.models.meta_device import init_empty_weights
from llmfoundry.models.mpt.configuration_mpt import MPTConfig
from llmfoundry.models.mpt.modeling_mpt import MPTForCausalLM

__all__ = ['DTYPE_KEY', 'apply_config_overrides', 'auto_class', 'load_config', 'load_model', 'resolve_attn_implementation']

log = logging.getLogger(__name__)

# The argument of from_pretrained that sets the dtype of weights; transformers renamed it together with the attribute of configs.
DTYPE_KEY = 'dtype' if hasattr(PretrainedConfig(), 'dtype') else 'torch_dtype'
# Keys of released MPT folders that describe their files, not the model.
_NOT_OURS = ('auto_map', 'architectures', 'transformers_version', 'torch_dtype', 'dtype', '_name_or_path')


def resolve_attn_implementation(attn_implementation: str | None, use_flash_attention_2: bool) -> str | None:
    """The attention implementation to ask transformers for; None leaves the choice to it (SDPA where the model has it, else eager).

    Raises:
        ValueError: flash_attention_2 without the flash-attn package.
    """
    if use_flash_attention_2:
        if attn_implementation not in (None, 'flash_attention_2'):
            warnings.warn(f'use_flash_attention_2: true overrides attn_implementation: {attn_implementation}.')
        attn_implementation = 'flash_attention_2'
    if attn_implementation == 'flash_attention_2' and importlib.util.find_spec('flash_attn') is None:
        raise ValueError('attn_implementation: flash_attention_2 needs the flash-attn package, which is not installed (pip install flash-attn); use sdpa instead.')
    return attn_implementation


def load_config(
    name_or_path: str,
    trust_remote_code: bool,
    token: bool | str | None,
    attn_implementation: str | None,
    config_overrides: Mapping[str, Any] | None,
) -> PretrainedConfig:
    """Reads a config from the Hub or a folder and applies ``config_overrides``. Of multimodal configs the text part is taken.

    Raises:
        ValueError: an override that does not fit, see ``apply_config_overrides``.
        OSError: (transformers) the name or path cannot be found.
    """
    config = _read_config(name_or_path, trust_remote_code, token)
    text_config = getattr(config, 'text_config', None)
    if isinstance(text_config, PretrainedConfig):
        log.info('%s: using the text_config of a multimodal config.', name_or_path)
        text_config.name_or_path = config.name_or_path
        config = text_config
    config.use_cache = False
    if isinstance(config, MPTConfig):
        return _mpt_config(config, attn_implementation, config_overrides or {})
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    apply_config_overrides(config, config_overrides or {})
    return config


def _read_config(name_or_path: str, trust_remote_code: bool, token: bool | str | None) -> PretrainedConfig:
    content, _ = PretrainedConfig.get_config_dict(name_or_path, token=token or None)
    if content.get('model_type') == 'mpt':
        # transformers has an MPT of its own, which knows alibi without biases only, and the code in released folders is an older form of ours.
        return MPTConfig.from_dict({**{key: value for key, value in content.items() if key not in _NOT_OURS}, 'name_or_path': name_or_path})
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, token=token or None)
    except (ValueError, KeyError) as e:
        if not trust_remote_code and ('auto_map' in content or 'trust_remote_code' in str(e)):
            raise ValueError(
                f'{name_or_path!r} (model type {content.get("model_type")!r}) brings its own Python code, which is not run unless you allow it. If you trust that code, set '
                'model.trust_remote_code: true (and tokenizer.kwargs.trust_remote_code: true where its tokenizer has code too).',
            ) from e
        raise


def _mpt_config(config: MPTConfig, attn_implementation: str | None, overrides: Mapping[str, Any]) -> MPTConfig:
    """Applies the settings of ``hf_causal_lm`` to one of our own configs, which checks its rules again."""
    name_or_path = config.name_or_path
    # Without packed rows this changes nothing, with them it is what keeps documents apart.
    config.attn_config['attn_uses_sequence_id'] = True
    if config.attn_config['attn_impl'] == 'flash' and importlib.util.find_spec('flash_attn') is None:
        config.attn_config['attn_impl'] = 'torch'
    apply_config_overrides(config, overrides)
    if attn_implementation is not None:
        config.attn_config['attn_impl'] = 'flash' if attn_implementation == 'flash_attention_2' else 'torch'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # said once already
        checked = MPTConfig.from_dict({**config.to_dict(), 'init_device': 'cpu'})
    checked.use_cache, checked.name_or_path = False, name_or_path
    return checked


def auto_class(config: PretrainedConfig) -> Any:
    """The class whose ``from_config`` and ``from_pretrained`` build the language model of ``config``: our own for MPT."""
    if isinstance(config, MPTConfig):
        return _OwnMPT
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


class _OwnMPT:
    """Our MPT behind the calls of an auto class."""

    @staticmethod
    def from_config(config: MPTConfig, **kwargs: Any) -> MPTForCausalLM:
        return MPTForCausalLM(config)

    @staticmethod
    def from_pretrained(name_or_path: str, config: MPTConfig, **kwargs: Any) -> MPTForCausalLM:
        kept = {key: value for key, value in kwargs.items() if key in (DTYPE_KEY, 'token', 'quantization_config')}
        return MPTForCausalLM.from_pretrained(name_or_path, config=config, **kept)


def apply_config_overrides(config: PretrainedConfig, overrides: Mapping[str, Any], path: str = 'config_overrides') -> None:
    """Sets attributes of a config, in place; dicts are merged into dicts and nested configs.

    ``rope_theta`` and ``rope_scaling`` mean the same where transformers keeps them in one dict, ``rope_parameters`` (since version 5).

    Args:
        config: the config.
        overrides: attribute -> value.
        path: key path for error texts.

    Raises:
        ValueError: the attribute does not exist (a misspelt key would otherwise train another model than the one asked for), a nested key is
            unknown, or a nested config is given something that is not a mapping.
    """
    for key, value in overrides.items():
        where = f'{path}.{key}'
        if key in ('rope_theta', 'rope_scaling') and 'rope_type' in (getattr(config, 'rope_parameters', None) or {}):
            config.rope_parameters = _rope_parameters(config.rope_parameters, key, value, where)
            config.standardize_rope_params()
            continue
        if not hasattr(config, key):
            raise ValueError(f'{where}: {type(config).__name__} has no attribute {key!r}, so it cannot be overridden with {value!r}.')
        current = getattr(config, key)
        if isinstance(current, PretrainedConfig):
            if not isinstance(value, Mapping):
                raise ValueError(f'{where}: expected a mapping of attributes of {type(current).__name__}, got {value!r}.')
            apply_config_overrides(current, value, where)
        elif isinstance(current, Mapping) and isinstance(value, Mapping):
            setattr(config, key, _merge(current, value, where))
        else:
            setattr(config, key, dict(value) if isinstance(value, Mapping) else value)


def _merge(current: Mapping[str, Any], value: Mapping[str, Any], where: str) -> dict[str, Any]:
    unknown = sorted(set(value) - set(current))
    if unknown:
        raise ValueError(f'{where}: unknown keys {unknown}; the config has {sorted(current)}.')
    return {**current, **value}


def _rope_parameters(current: Mapping[str, Any], key: str, value: Any, where: str) -> dict[str, Any]:
    """``rope_parameters`` with ``rope_theta`` or ``rope_scaling`` overridden. A model without scaling has the type ``default`` there, and theta must outlive a new scaling."""
    if key == 'rope_theta':
        return {**current, key: value}
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f'{where}: expected a mapping or null, got {value!r}.')
    if value is not None and current['rope_type'] != 'default':
        return _merge(current, value, where)
    kept = {name: current[name] for name in ('rope_theta', 'partial_rotary_factor') if name in current}
    scaling = dict(value or {})
    return {**kept, 'rope_type': scaling.pop('type', 'default'), **scaling}


def load_model(
    name_or_path: str,
    config: PretrainedConfig,
    pretrained: bool,
    init_device: str,
    trust_remote_code: bool = False,
    token: bool | str | None = None,
    load_in_8bit: bool = False,
) -> PreTrainedModel:
    """Builds the model, with the Hub's or a folder's weights if ``pretrained``.

    With ``mixed`` only global rank 0 holds weights; the others build on the meta device and receive them when the model is sharded.

    Raises:
        ValueError: an unknown ``init_device``; ``meta`` on rank 0 with ``pretrained``: weights would be loaded and thrown away.
        RuntimeError: another rank failed; the text names the ranks and their errors.
    """
    if init_device not in ('cpu', 'meta', 'mixed'):
        raise ValueError(f'init_device={init_device!r} is not known; choose one of: cpu, meta, mixed.')
    is_first = dist.get_global_rank() == 0
    on_meta = init_device == 'meta' or (init_device == 'mixed' and not is_first)
    kwargs: dict[str, Any] = {'trust_remote_code': trust_remote_code, DTYPE_KEY: torch.float32}
    attn_implementation = getattr(config, '_attn_implementation_internal', None) or getattr(config, '_attn_implementation', None)
    if attn_implementation is not None:
        kwargs['attn_implementation'] = attn_implementation

    def build() -> PreTrainedModel:
        if on_meta:
            if pretrained and is_first:
                raise ValueError('init_device: meta with pretrained: true would throw the loaded weights away; use init_device: mixed (or cpu).')
            with init_empty_weights():
                return auto_class(config).from_config(config, **kwargs)
        if not pretrained:
            return auto_class(config).from_config(config, **kwargs)
        if load_in_8bit:
            kwargs['quantization_config'] = transformers.BitsAndBytesConfig(load_in_8bit=True)
        # transformers prefers safetensors by itself, and falls back to pickled weights, which is all that old repositories have.
        return auto_class(config).from_pretrained(name_or_path, config=config, token=token or None, **kwargs)

    # Local rank 0 goes first, so that a download happens once per node. Every rank joins, whether it loads or not.
    with dist.local_rank_zero_first() if pretrained else contextlib.nullcontext():
        model, error = _attempt(build)
    _raise_on_all_ranks(error)
    if pretrained:
        _load_generation_config(model, name_or_path, token)
    return model


def _attempt(build: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel | None, Exception | None]:
    try:
        return build(), None
    except Exception as e:  # raised by _raise_on_all_ranks
        return None, e


def _raise_on_all_ranks(error: Exception | None) -> None:
    """When one rank has failed every rank raises, instead of waiting for it in the next collective."""
    errors = dist.all_gather_objects(None if error is None else f'{type(error).__name__}: {error}')
    failed = {rank: text for rank, text in enumerate(errors) if text is not None}
    if not failed:
        return
    if len(errors) == 1:
        raise error  # type: ignore[misc]
    listed = '; '.join(f'rank {rank}: {text}' for rank, text in failed.items())
    raise RuntimeError(f'Loading the model failed on rank(s) {sorted(failed)}. {listed}') from error


def _load_generation_config(model: PreTrainedModel, name_or_path: str, token: bool | str | None) -> None:
    try:
        model.generation_config = GenerationConfig.from_pretrained(name_or_path, token=token or None)
    except OSError:
        log.warning('%s has no generation_config.json; generation starts from the defaults of transformers.', name_or_path)

