"""Feed-forward blocks that other packages supply: TransformerEngine's MLP with norm, and the mixtures of experts of megablocks.

Both packages need CUDA and are imported when a block is built, so that this module imports anywhere.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from llmfoundry.models.layers.fc import import_te
from llmfoundry.models.layers.ffn import resolve_ffn_act_fn, resolve_ffn_hidden_size

__all__ = ['build_mb_dmoe', 'build_mb_moe', 'build_te_ln_mlp', 'import_megablocks']

_MEGABLOCKS_CLASSES = {'mb_moe': ('megablocks.layers.moe', 'MoE'), 'mb_dmoe': ('megablocks.layers.dmoe', 'dMoE')}


def import_megablocks(module: str, wanted_by: str) -> Any:
    """Returns a module of megablocks.

    Args:
        module: its full name.
        wanted_by: the config value that asks for it, for the error text.

    Raises:
        ImportError: megablocks is not installed, or finds no CUDA device.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, AssertionError) as e:
        raise ImportError(f'{wanted_by} needs megablocks and a CUDA device (pip install megablocks): {e}. On other machines use ffn_type torch_dmoe') from e


def build_te_ln_mlp(
    d_model: int,
    expansion_ratio: float,
    fc_type: str | dict[str, Any] = 'te',
    ffn_hidden_size: int | None = None,
    ffn_act_fn: dict[str, Any] | None = None,
    device: str | None = None,
    bias: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Builds TransformerEngine's ``LayerNormMLP``, which contains the norm before the MLP.

    Args:
        fc_type: accepted because MPT passes it to every block; not used.
        kwargs: any other argument of ``LayerNormMLP``.

    Raises:
        ImportError: TransformerEngine is not installed.
        ValueError: ``ffn_act_fn`` is set; ``activation`` is TransformerEngine's own key.
    """
    if ffn_act_fn is not None:
        raise ValueError(f'ffn_config.ffn_act_fn: te_ln_mlp cannot take a torch function, got {ffn_act_fn!r}: set ffn_config.activation to a name that TransformerEngine knows')
    hidden_size = resolve_ffn_hidden_size(d_model, expansion_ratio, ffn_hidden_size)
    te = import_te('ffn_type te_ln_mlp')
    return te.LayerNormMLP(hidden_size=d_model, ffn_hidden_size=hidden_size, bias=bias, device=device, **kwargs)


def _megablocks_arguments(ffn_type: str, hidden_size: int, ffn_hidden_size: int, bias: bool, device: str | None, kwargs: dict[str, Any]) -> Any:
    """Fills megablocks' ``Arguments``; keys that it does not have are errors.

    Raises:
        ValueError: unknown keys, with the allowed ones.
    """
    arguments_cls = import_megablocks('megablocks.layers.arguments', f'ffn_type {ffn_type}').Arguments
    allowed = {field.name for field in dataclasses.fields(arguments_cls)}
    unknown = sorted(set(kwargs) - allowed)
    if unknown:
        raise ValueError(f'ffn_config of {ffn_type} has unknown keys: {", ".join(unknown)}. Allowed, as in megablocks: {", ".join(sorted(allowed))}')
    # Weights are made in float32, as those of every other layer: both flags off, or megablocks makes them in float16.
    values = {'fp16': False, 'bf16': False, 'return_bias': False, **kwargs}
    values = {key: value for key, value in values.items() if key in allowed}
    return arguments_cls(hidden_size=hidden_size, ffn_hidden_size=ffn_hidden_size, bias=bias, device=torch.device(device or 'cuda'), **values)


def _build_megablocks(ffn_type: str, d_model: int, ffn_hidden_size: int, bias: bool, device: str | None, kwargs: dict[str, Any]) -> nn.Module:
    """Builds the block and, under expert parallelism, makes its experts' weights DTensors that FSDP shards over the weight-parallel ranks only."""
    module, cls_name = _MEGABLOCKS_CLASSES[ffn_type]
    # These served config_megablocks_moe_args and the loss; megablocks does not know them.
    own = {key: kwargs.pop(key, None) for key in ('ffn_type', 'moe_world_size', 'device_mesh', 'lbl_process_group', 'ffn_act_fn')}
    if own['ffn_act_fn'] is not None:
        kwargs['activation_fn'] = resolve_ffn_act_fn(own['ffn_act_fn'])
    args = _megablocks_arguments(ffn_type, d_model, ffn_hidden_size, bias, device, kwargs)
    ffn = getattr(import_megablocks(module, f'ffn_type {ffn_type}'), cls_name)(args)
    experts = ffn.experts
    experts.mlp.ffn_hidden_size = ffn_hidden_size  # param_init slices the stacked weights by it
    mesh = own['device_mesh']
    if isinstance(mesh, DeviceMesh):
        for name, param in list(experts.mlp.named_parameters(recurse=False)):
            sharded = DTensor.from_local(param.detach(), mesh['expert_parallel'], [Shard(0)], run_check=False)
            experts.mlp.register_parameter(name, nn.Parameter(sharded))
        experts._fsdp_kwargs_dict = {'device_mesh': mesh['weight_parallel']}
    return ffn


def build_mb_moe(
    d_model: int,
    expansion_ratio: float,
    fc_type: str | dict[str, Any] = 'torch',
    ffn_hidden_size: int | None = None,
    device: str | None = None,
    bias: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Builds megablocks' ``MoE`` (tokens beyond an expert's capacity are dropped).

    Args:
        fc_type: accepted because MPT passes it to every block; not used.
        kwargs: any field of megablocks' ``Arguments``, as completed by ``config_megablocks_moe_args``.

    Raises:
        ImportError: megablocks cannot be imported.
        ValueError: unknown keys.
    """
    hidden_size = resolve_ffn_hidden_size(d_model, expansion_ratio, ffn_hidden_size)
    return _build_megablocks('mb_moe', d_model, hidden_size, bias, device, kwargs)


def build_mb_dmoe(
    d_model: int,
    expansion_ratio: float,
    fc_type: str | dict[str, Any] = 'torch',
    ffn_hidden_size: int | None = None,
    device: str | None = None,
    bias: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Builds megablocks' dropless ``dMoE``; arguments and errors as ``build_mb_moe``."""
    hidden_size = resolve_ffn_hidden_size(d_model, expansion_ratio, ffn_hidden_size)
    return _build_megablocks('mb_dmoe', d_model, hidden_size, bias, device, kwargs)
