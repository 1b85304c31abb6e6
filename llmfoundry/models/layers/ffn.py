"""Feed-forward blocks of our own: the two-layer MLP, the gated linear unit and the builder of the mixture of experts (``moe``).

Every block maps (..., d_model) to (..., d_model). The projection back to ``d_model`` is tagged ``_is_residual``, which
``param_init`` reads to scale down what is added to the residual stream.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import nn

from llmfoundry.models.layers.layer_builders import build_fc, split_fc_type
from llmfoundry.models.layers.moe import dMoE

__all__ = [
    'MPTGLU',
    'MPTMLP',
    'build_mptglu',
    'build_mptmlp',
    'build_torch_dmoe',
    'quickgelu_activation',
    'resolve_ffn_act_fn',
    'resolve_ffn_hidden_size',
]

log = logging.getLogger(__name__)

ActFn = Callable[[torch.Tensor], torch.Tensor]

_DEFAULT_ACT_FN = {'name': 'gelu', 'approximate': 'none'}


def quickgelu_activation(input: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(1.702 x)``, the sigmoid approximation of GELU (https://arxiv.org/abs/1606.08415, section 2)."""
    return input * torch.sigmoid(1.702 * input)


def resolve_ffn_act_fn(config: dict[str, Any] | None = None) -> ActFn:
    """Returns the activation named by ``ffn_config.ffn_act_fn``.

    Args:
        config: ``{'name': ..., **kwargs}`` with a function of ``torch.nn.functional`` or ``quick_gelu``; None is exact GELU.

    Raises:
        ValueError: no such function.
    """
    kwargs = dict(config) if config else dict(_DEFAULT_ACT_FN)
    name = kwargs.pop('name', None)
    act_fn = quickgelu_activation if name == 'quick_gelu' else getattr(F, name, None) if isinstance(name, str) else None
    if not callable(act_fn):
        raise ValueError(f'ffn_config.ffn_act_fn.name: {name!r} is neither quick_gelu nor a function of torch.nn.functional (gelu, silu, relu, ...)')
    return functools.partial(act_fn, **kwargs) if kwargs else act_fn


def resolve_ffn_hidden_size(d_model: int, expansion_ratio: float, ffn_hidden_size: int | None = None) -> int:
    """Returns the hidden size: ``ffn_hidden_size`` if given, else ``d_model * expansion_ratio``.

    Raises:
        ValueError: the product is not a whole number.
    """
    if ffn_hidden_size is not None:
        log.info('ffn_hidden_size=%d is used; expansion_ratio=%s is not', ffn_hidden_size, expansion_ratio)
        return ffn_hidden_size
    hidden_size = int(d_model * expansion_ratio)
    if hidden_size != d_model * expansion_ratio:
        raise ValueError(f'd_model * expansion_ratio must be a whole number, got {d_model} * {expansion_ratio} = {d_model * expansion_ratio}: change one or set ffn_hidden_size')
    return hidden_size


class MPTMLP(nn.Module):
    """``down_proj(act_fn(up_proj(x)))``.

    Args:
        d_model: width of input and output.
        expansion_ratio: hidden size over ``d_model``, unless ``ffn_hidden_size`` is given.
        fc_type: name of the fully connected layer, or dict of name and arguments.
        ffn_hidden_size: hidden size.
        act_fn: activation.
        device: where the weights live.
        bias: whether the projections have a bias.
    """

    def __init__(
        self,
        d_model: int,
        expansion_ratio: float,
        fc_type: str | dict[str, Any] = 'torch',
        ffn_hidden_size: int | None = None,
        act_fn: ActFn | None = None,
        device: str | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_size = resolve_ffn_hidden_size(d_model, expansion_ratio, ffn_hidden_size)
        name, fc_kwargs = split_fc_type(fc_type)
        fc_kwargs = {**fc_kwargs, 'bias': bias, 'device': device}
        self.up_proj = build_fc(name, d_model, hidden_size, fc_kwargs)
        self.act = act_fn or resolve_ffn_act_fn()
        self.down_proj = build_fc(name, hidden_size, d_model, fc_kwargs)
        self.down_proj._is_residual = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_model) -> (..., d_model)."""
        return self.down_proj(self.act(self.up_proj(x)))


class MPTGLU(MPTMLP):
    """``down_proj(act_fn(gate_proj(x)) * up_proj(x))`` (https://arxiv.org/abs/2002.05202); arguments as ``MPTMLP``."""

    def __init__(
        self,
        d_model: int,
        expansion_ratio: float,
        fc_type: str | dict[str, Any] = 'torch',
        ffn_hidden_size: int | None = None,
        act_fn: ActFn | None = None,
        device: str | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(d_model, expansion_ratio, fc_type, ffn_hidden_size, act_fn, device, bias)
        name, fc_kwargs = split_fc_type(fc_type)
        self.gate_proj = build_fc(name, d_model, self.up_proj.out_features, {**fc_kwargs, 'bias': bias, 'device': device})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., d_model) -> (..., d_model)."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def build_mptmlp(
    d_model: int,
    expansion_ratio: float,
    fc_type: str | dict[str, Any] = 'torch',
    ffn_hidden_size: int | None = None,
    ffn_act_fn: dict[str, Any] | None = None,
    device: str | None = None,
    bias: bool = True,
) -> nn.Module:
    """Builds ``MPTMLP`` from the keys of ``ffn_config``."""
    return MPTMLP(d_model, expansion_ratio, fc_type, ffn_hidden_size, resolve_ffn_act_fn(ffn_act_fn), device, bias)


def build_mptglu(
    d_model: int,
    expansion_ratio: float,
    fc_type: str | dict[str, Any] = 'torch',
    ffn_hidden_size: int | None = None,
    ffn_act_fn: dict[str, Any] | None = None,
    device: str | None = None,
    bias: bool = True,
) -> nn.Module:
    """Builds ``MPTGLU`` from the keys of ``ffn_config``."""
    return MPTGLU(d_model, expansion_ratio, fc_type, ffn_hidden_size, resolve_ffn_act_fn(ffn_act_fn), device, bias)


_DMOE_KEYS = ('moe_num_experts', 'moe_top_k', 'mlp_type', 'moe_jitter_eps', 'moe_normalize_expert_weights', 'uniform_expert_assignment')


def build_torch_dmoe(
    d_model: int,
    expansion_ratio: float,
    fc_type: str | dict[str, Any] = 'torch',
    ffn_hidden_size: int | None = None,
    ffn_act_fn: dict[str, Any] | None = None,
    device: str | None = None,
    bias: bool = True,
    **moe_kwargs: Any,
) -> nn.Module:
    """Builds the mixture of experts in plain torch.

    ``fc_type`` is accepted because MPT passes it to every block; the experts are stacked weights and do not use it.

    Args:
        moe_kwargs: exactly moe_num_experts, moe_top_k, mlp_type, moe_jitter_eps, moe_normalize_expert_weights, uniform_expert_assignment.

    Raises:
        KeyError: one of them is missing.
        ValueError: there is another key.
    """
    missing = [key for key in _DMOE_KEYS if key not in moe_kwargs]
    if missing:
        raise KeyError(f'ffn_config of torch_dmoe needs all of {", ".join(_DMOE_KEYS)}; missing: {", ".join(missing)}')
    unknown = sorted(set(moe_kwargs) - set(_DMOE_KEYS))
    if unknown:
        raise ValueError(f'ffn_config of torch_dmoe has unknown keys: {", ".join(unknown)}. Allowed: ffn_hidden_size, ffn_act_fn, {", ".join(_DMOE_KEYS)}')
    return dMoE(
        hidden_size=d_model,
        ffn_hidden_size=resolve_ffn_hidden_size(d_model, expansion_ratio, ffn_hidden_size),
        activation_fn=resolve_ffn_act_fn(ffn_act_fn),
        bias=bias,
        device=device,
        **moe_kwargs,
    )
