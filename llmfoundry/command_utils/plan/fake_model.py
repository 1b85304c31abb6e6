"""Builds the model of a config on fake tensors, placed and sharded as the run would place and shard it: no weights, no data, no network beyond a model's config."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any, Iterator

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from llmfoundry import builders
from llmfoundry.command_utils.parallelism import recomputes_unsharded, resolve_placement
from llmfoundry.command_utils.sharding import build_sharding_config
from llmfoundry.config.train import TrainConfig
from llmfoundry.errors import ConfigError, ConfigProblem
from llmfoundry.models.meta_device import init_empty_weights

__all__ = ['Target', 'build_model', 'fake_weights', 'process_group_of', 'shard']


@dataclass(frozen=True)
class Target:
    """The machine that is planned for.

    Attributes:
        device_type: ``cpu`` or ``cuda``.
        devices: number of ranks.
        per_node: ranks of one node at most.
    """

    device_type: str
    devices: int
    per_node: int = 8

    @property
    def on_cuda(self) -> bool:
        return self.device_type == 'cuda'


def build_model(cfg: TrainConfig, tokenizer: Any) -> nn.Module:
    """The composer model, its parameters on the meta device.

    Raises:
        ConfigError: the config of a Hugging Face model cannot be read, or the model refuses its settings.
    """
    name, kwargs = builders.split_name(cfg.model, 'model')
    dtype = kwargs.pop('master_weights_dtype', None)
    # The context below keeps weights off memory; the model itself refuses meta where it would train on nothing (adapters, pretrained weights).
    kwargs['init_device'] = 'cpu'
    if kwargs.get('pretrained'):
        kwargs['pretrained'] = False
    try:
        return builders.build_composer_model(name, kwargs, tokenizer, init_empty_weights(), dtype)
    except OSError as e:
        path = kwargs.get('pretrained_model_name_or_path', name)
        raise ConfigError([ConfigProblem(
            'model.pretrained_model_name_or_path', f'the config of {path!r} cannot be read: {str(e).splitlines()[0]} The plan needs no weights but the config; give a local folder with config.json.',
        )]) from e


def fake_weights(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces parameters, buffers and tensors kept as plain attributes by fake ones on the CPU, in place; ties stay ties."""
    made: dict[torch.Tensor, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if tensor not in made:
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device='cpu')
            if isinstance(tensor, nn.Parameter):
                like = nn.Parameter(like, requires_grad=tensor.requires_grad)
                like.__dict__.update(tensor.__dict__)
            made[tensor] = like
        return made[tensor]

    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers, module.__dict__):
                for key, value in list(tensors.items()):
                    if isinstance(value, torch.Tensor):
                        tensors[key] = fake(value)


@contextlib.contextmanager
def process_group_of(devices: int) -> Iterator[None]:
    """A process group of ``devices`` ranks that communicate with nobody; this process is rank 0. Nothing for one device."""
    if devices == 1:
        yield
        return
    import torch.distributed._tools.fake_collectives  # shapes of collectives on fake tensors
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group('fake', rank=0, world_size=devices, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def shard(cfg: TrainConfig, model: nn.Module, target: Target) -> bool:
    """Applies FSDP2 and activation checkpointing as the Trainer does; returns whether weights are sharded.

    Raises:
        ConfigError: settings that FSDP2 does not have.
    """
    from composer.core import Precision
    from composer.distributed.activation_checkpointing import apply_ac, generate_composer_model_check_fn
    from composer.distributed.fsdp2 import prepare_fully_shard
    from composer.distributed.fsdp2_utils import generate_composer_model_policy

    if recomputes_unsharded(cfg.fsdp_config, target.devices):
        apply_ac(model, True, False, generate_composer_model_check_fn(model))
        return False
    placement = resolve_placement(
        None, cfg.fsdp_config, cfg.tp_config, world_size=target.devices, rank=0, has_cuda=target.on_cuda, master_weights_dtype=cfg.model.get('master_weights_dtype'),
    )
    if placement.tp_config is not None:
        raise ConfigError([ConfigProblem('tp_config', 'tensor parallelism is not planned; remove it, or plan without')])
    if placement.fsdp_config is None or target.devices == 1:
        return False
    with unset_fake_temporarily():
        fsdp, _ = build_sharding_config(placement.fsdp_config, data_ranks=target.devices, local_world_size=min(target.devices, target.per_node), has_cuda=target.on_cuda)
        fsdp.device_mesh = _mesh(target.devices, fsdp.data_parallel_replicate_degree)
    if fsdp.activation_checkpointing or fsdp.activation_cpu_offload:
        apply_ac(model, fsdp.activation_checkpointing, fsdp.activation_cpu_offload, generate_composer_model_check_fn(model))
    # On the CPU the Trainer is told fp32 (see models/cpu_autocast.py).
    precision = Precision(cfg.precision) if target.on_cuda else Precision.FP32
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        prepare_fully_shard(model, fsdp, precision, generate_composer_model_policy(model))
    return True


def _mesh(devices: int, replicas: int | None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    if replicas is None:
        return init_device_mesh('cpu', (devices,), mesh_dim_names=('dp_shard',))
    return init_device_mesh('cpu', (replicas, devices // replicas), mesh_dim_names=('dp_replicate', 'dp_shard'))
