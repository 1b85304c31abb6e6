"""Rebuilds the trained model from a checkpoint, in memory or as an empty shell, without allocating its weights twice.

The shell (parameters on the meta device, buffers real) answers which names and shapes the architecture wants before anything is written; the whole model is the
shell with the checkpoint's memory-mapped tensors put in.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Mapping

import torch
import transformers
from torch import nn

from llmfoundry.checkpoint.hub_export import MPT_CLASSES
from llmfoundry.checkpoint.reader import Checkpoint, LazyTensor
from llmfoundry.checkpoint.weights import cast, name_list
from llmfoundry.errors import CheckpointError
from llmfoundry.models.mpt.configuration_mpt import MPTConfig
from llmfoundry.models.mpt.modeling_mpt import MPTForCausalLM

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ['build_config', 'build_shell', 'check_weights', 'fill', 'is_mpt', 'meta_parameters']


def is_mpt(checkpoint: Checkpoint) -> bool:
    """Whether the model is our MPT, rather than transformers' ``MptForCausalLM`` of the same model type."""
    return checkpoint.class_name in MPT_CLASSES


@contextlib.contextmanager
def meta_parameters() -> Iterator[None]:
    """Modules built inside have their parameters on the meta device and their buffers where they belong."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            attributes = vars(parameter)
            parameter = type(parameter)(parameter.to('meta'), requires_grad=parameter.requires_grad)
            parameter.__dict__.update(attributes)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def build_config(checkpoint: Checkpoint, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config that the model was trained with.

    Raises:
        ValueError: the architecture is code of the Hub and ``trust_remote_code`` is off, or unknown to this transformers.
    """
    content = dict(checkpoint.config)
    if is_mpt(checkpoint):
        return MPTConfig.from_dict({k: v for k, v in content.items() if k not in {'auto_map', 'architectures', 'transformers_version'}})
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'config.json').write_text(json.dumps(content), encoding='utf-8')
        try:
            return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except ValueError as e:
            raise ValueError(
                f'{checkpoint.source!r} holds a model of type {content.get("model_type")!r} (class {checkpoint.class_name}), which cannot be built: {e}. If its code lies on '
                'the Hub and you trust it, pass --trust_remote_code.',
            ) from e


def build_shell(checkpoint: Checkpoint, config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The architecture without weights, tied as the config says."""
    config.use_cache = False
    with meta_parameters():
        if is_mpt(checkpoint):
            config.init_device = 'cpu'
            model: PreTrainedModel = MPTForCausalLM(config)
        else:
            cls = checkpoint.model_class or getattr(transformers, checkpoint.class_name, None)
            if cls is not None and issubclass(cls, transformers.PreTrainedModel):
                model = cls(config)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    return model.eval()


def check_weights(model: PreTrainedModel, weights: Mapping[str, LazyTensor], source: str) -> None:
    """Every parameter and persistent buffer has its weight, of the right shape, and no weight is left over.

    Raises:
        CheckpointError: names what is missing, left over or misshapen. Without this check a loader fills in random values.
    """
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    same: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        same.setdefault(id(parameter), []).append(name)
    shared_with_present = {n for group in same.values() if any(g in weights for g in group) for n in group}
    missing = [n for n in wanted if n not in weights and n not in shared_with_present]
    unexpected = [n for n in weights if n not in wanted]
    misshapen = [f'{n}: {weights[n].shape} instead of {s}' for n, s in wanted.items() if n in weights and weights[n].shape != s]
    problems = [f'{what}: {name_list(names)}' for what, names in (('missing', missing), ('left over', unexpected), ('of the wrong shape', misshapen)) if names]
    if problems:
        raise CheckpointError(f'{source!r} does not fit the model that its own config describes. Weights {"; ".join(problems)}')


def fill(model: PreTrainedModel, weights: Mapping[str, LazyTensor], rounded_to: torch.dtype = torch.float32) -> PreTrainedModel:
    """Puts the weights into a shell, in fp32.

    Args:
        rounded_to: precision that the values pass through first, so that the result equals an export in that precision.
    """
    state: dict[str, Any] = {}
    for name, weight in weights.items():
        tensor = weight.load()
        state[name] = cast(name, cast(name, tensor, rounded_to), torch.float32) if tensor.is_floating_point() else tensor
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    empty = [n for n, p in model.named_parameters() if p.is_meta]
    if empty:
        raise CheckpointError(f'no weights for {name_list(empty)}')
    return model.eval()
