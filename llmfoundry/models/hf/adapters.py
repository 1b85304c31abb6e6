"""PEFT adapters around a transformers model: built from the YAML, loaded from a folder, checked against the base model, and told apart from it in checkpoints.

Every method of the installed PEFT that trains a causal LM with an ordinary step works; the few that need more are refused by name, with what they would need. Composer
knows LoRA only and, when it saves adapters alone, goes by the letters ``lora_`` in names, which loses ``modules_to_save``; so adapters are put on here, and what belongs to the
base model is known by the tensors that were there before.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any, Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from llmfoundry.errors import AdapterMismatchError

__all__ = [
    'FROZEN_NAMES', 'RESIZED', 'add_adapter', 'build_peft_config', 'check_adapter_fits', 'embedding_names', 'import_peft', 'is_same_base', 'load_adapter', 'read_adapter',
    'supported_peft_types',
]

log = logging.getLogger(__name__)

# Attribute of an adapted model: names in its state dict that are weights of the base model and stay as they were.
FROZEN_NAMES = 'frozen_base_names'
# Attribute of a base model whose embeddings were resized: they are saved with the adapter.
RESIZED = 'has_resized_embeddings'

_UNSUPPORTED = {
    'ADALORA': 'its ranks are reallocated by a call after each step',
    'ADAPTION_PROMPT': 'its layers are swapped in and out of the model, so checkpoints do not hold them',
    'CARTRIDGE': 'its prefix is distilled from a corpus, not trained on labels',
    'CPT': 'each batch would need the token types of its context',
    'MULTITASK_PROMPT_TUNING': 'each batch would need task_ids',
    'POLY': 'each batch would need task_ids',
    'SHADOW': 'its forward replaces the loss of the model',
    'XLORA': 'it mixes adapters that are trained already',
}
_LIST_AT_MOST = 8


def import_peft(key: str) -> Any:
    """The ``peft`` package.

    Args:
        key: the setting that needs it, for the error.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module('peft')
    except ImportError as e:
        raise ImportError(f"{key} needs the peft package: pip install -e '.[peft]'") from e


def supported_peft_types() -> list[str]:
    """Values of ``peft_config.peft_type`` with the installed PEFT, sorted."""
    mapping = import_peft('peft_config').mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    return sorted(name for entry in mapping if (name := str(getattr(entry, 'value', entry))) not in _UNSUPPORTED)


def build_peft_config(peft_config: Mapping[str, Any], task_type: str = 'CAUSAL_LM') -> Any:
    """Turns the ``peft_config`` block into the config class of its ``peft_type`` (default LORA).

    Raises:
        ImportError: peft is not installed.
        ValueError: a ``peft_type`` that is unknown or does not fit this trainer, a ``task_type`` other than that of the model (both in any case), or arguments that
            the method does not have.
    """
    options = dict(peft_config)
    peft_type = str(options.pop('peft_type', 'LORA')).upper()
    given_task = options.pop('task_type', task_type)
    peft = import_peft('peft_config')
    if str(given_task).upper() != task_type:
        raise ValueError(f'peft_config.task_type: got {given_task!r}, only {task_type} is supported for this model.')
    if peft_type in _UNSUPPORTED:
        raise ValueError(f'peft_config.peft_type: {peft_type} cannot be trained here: {_UNSUPPORTED[peft_type]}. Supported: {", ".join(supported_peft_types())}.')
    if peft_type not in supported_peft_types():
        raise ValueError(f'peft_config.peft_type: got {peft_type!r}, PEFT {peft.__version__} has no such method. Supported: {", ".join(supported_peft_types())}.')
    config_class = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[getattr(peft.PeftType, peft_type)]
    try:
        config = config_class(task_type=task_type, **options)
    except TypeError as e:
        raise ValueError(f'peft_config: {e}. The other keys are the arguments of peft.{config_class.__name__}.') from e
    if options.get('init_lora_weights') == 'eva':
        raise ValueError('peft_config.init_lora_weights: eva needs a pass over the data before training, which is not made here; use true, pissa, olora or orthogonal.')
    return config


def add_adapter(model: PreTrainedModel, config: Any) -> Any:
    """Freezes ``model`` and puts a new adapter on it.

    Returns:
        ``peft.PeftModel``, with ``FROZEN_NAMES`` set.

    Raises:
        ValueError: the config does not fit the model, e.g. ``target_modules`` that it does not have; the text lists those it has.
    """
    base = _tensors_of(model)
    if getattr(model, RESIZED, False):
        kept = {id(model.get_parameter(name)) for name in embedding_names(model)}
        base = {key: tensor for key, tensor in base.items() if key not in kept}
    on_meta = any(p.is_meta for p in model.parameters())
    recorded = config.base_model_name_or_path
    try:
        adapted = import_peft('peft_config').get_peft_model(model, config, low_cpu_mem_usage=on_meta)
    except ValueError as e:
        raise ValueError(f'peft_config does not fit {type(model).__name__}: {e} Its linear layers are called {", ".join(_linear_names(model))}.') from e
    finally:
        if recorded:  # which PEFT has replaced by the name of this model
            config.base_model_name_or_path = recorded
    setattr(adapted, FROZEN_NAMES, _frozen_names(adapted, base))
    return adapted


def load_adapter(model: PreTrainedModel, adapter: str, token: bool | str | None = None) -> Any:
    """Puts the adapter in the folder (or Hub repository) ``adapter`` on ``model``, to go on training it.

    Raises:
        AdapterMismatchError: (a ValueError) it was made for another base model.
        ValueError: not an adapter, or of a kind that cannot be trained on.
    """
    config, weights = read_adapter(adapter, token)
    if config.is_prompt_learning:
        raise ValueError(f'{adapter!r} is a {config.peft_type.value} adapter: PEFT saves the learned prompt without what produced it, so training cannot go on from it; resume from the Composer checkpoint.')
    config.inference_mode = False
    recorded = config.base_model_name_or_path
    if not is_same_base(recorded, model.name_or_path):
        log.warning('the adapter %s names %r as its base model, and it is put on %r; shapes and layers are checked, values cannot be', adapter, recorded, model.name_or_path)
    try:
        adapted = add_adapter(model, config)
    except ValueError as e:
        raise AdapterMismatchError(f'The adapter {adapter!r} was made for another base model (it names {recorded!r}) than {model.name_or_path!r}: {e}') from e
    check_adapter_fits(adapted, {name: tuple(weight.shape) for name, weight in weights.items()}, adapter, model.name_or_path)
    config.base_model_name_or_path = model.name_or_path
    peft = import_peft('pretrained_lora_id_or_path')
    peft.set_peft_model_state_dict(adapted, weights, low_cpu_mem_usage=any(p.is_meta for p in adapted.parameters()))
    return adapted


def read_adapter(adapter: str, token: bool | str | None = None) -> tuple[Any, dict[str, torch.Tensor]]:
    """Config and weights (on the CPU, by their names in the file) of an adapter folder or Hub repository.

    Raises:
        ValueError: there is no adapter.
    """
    peft = import_peft('an adapter')
    try:
        config = peft.PeftConfig.from_pretrained(adapter, token=token or None)
        return config, peft.load_peft_weights(adapter, device='cpu', token=token or None)
    except (ValueError, OSError) as e:
        raise ValueError(f'{adapter!r} holds no PEFT adapter: a folder with adapter_config.json and adapter_model.safetensors is needed. Cause: {" ".join(str(e).split())[:300]}') from e


def check_adapter_fits(adapted: Any, shapes: Mapping[str, tuple[int, ...]], adapter: str, base_name: str) -> None:
    """Compares the names and shapes in an adapter's file with those that its config makes on the base model. PEFT itself passes over layers that the base does not have.

    Args:
        adapted: the base model with an adapter of that config on it; may be on the meta device.
        shapes: name in the file -> shape.
        adapter: what to call the adapter in the error.
        base_name: what to call the base model.

    Raises:
        AdapterMismatchError: names what differs, and both base models.
    """
    peft = import_peft('an adapter')
    config = adapted.peft_config['default']
    wanted = {name: tuple(tensor.shape) for name, tensor in peft.get_peft_model_state_dict(adapted, save_embedding_layers=False).items()}
    embeddings = {f'base_model.model.{name}': tuple(adapted.get_base_model().get_parameter(name).shape) for name in embedding_names(adapted.get_base_model())}
    missing = [name for name in wanted if name not in shapes]
    unexpected = [name for name in shapes if name not in wanted and name not in embeddings]
    known = {**embeddings, **wanted}
    misshapen = [f'{name} {list(shape)} instead of {list(known[name])}' for name, shape in shapes.items() if name in known and known[name] != shape]
    problems = [
        f'{what}: {_some(names)}' for what, names in (('sizes differ', misshapen), ('layers that this base does not have', unexpected), ('layers without weights', missing)) if names
    ]
    if problems:
        raise AdapterMismatchError(f'The adapter {adapter!r} was made for another base model (it names {config.base_model_name_or_path!r}) than {base_name!r}: {"; ".join(problems)}.')


def embedding_names(model: PreTrainedModel) -> list[str]:
    """Names of the weights of the token embedding and of the head."""
    wanted = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    return [f'{name}.weight' for name, module in model.named_modules() if any(module is w for w in wanted) and hasattr(module, 'weight')]


def is_same_base(one: str | None, other: str | None) -> bool:
    """Whether two names may mean the same base model: equal last parts (``org/Name``, ``/models/name``, a folder of the Hub's cache), or one of them unknown."""
    if not one or not other:
        return True
    return _short_name(one) == _short_name(other)


def _short_name(name: str) -> str:
    parts = [part for part in str(name).replace('\\', '/').split('/') if part not in ('', '.')]
    for part in parts:
        if part.startswith('models--'):
            return part.rpartition('--')[2].lower()
    return parts[-1].lower() if parts else ''


def _tensors_of(model: nn.Module) -> dict[int, torch.Tensor]:
    """The tensors of the state dict by identity; holding them keeps the identities from being given again."""
    return {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values() if isinstance(tensor, torch.Tensor)}


def _frozen_names(adapted: nn.Module, base: Mapping[int, torch.Tensor]) -> frozenset[str]:
    return frozenset(name for name, tensor in adapted.state_dict(keep_vars=True).items() if id(tensor) in base and not tensor.requires_grad)


def _linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of linear layers, the values that ``target_modules`` takes."""
    return sorted({name.rpartition('.')[2] for name, module in model.named_modules() if isinstance(module, nn.Linear) or type(module).__name__ == 'Conv1D'})


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f' and {len(listed) - _LIST_AT_MOST} more' if len(listed) > _LIST_AT_MOST else ''
    return ', '.join(listed[:_LIST_AT_MOST]) + more
