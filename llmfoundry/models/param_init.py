"""Ways to initialise a model, named by ``init_config.name``.

Each function initialises the parameters of one module (FSDP calls it module by module when it materialises a model from the meta device;
``model.apply`` does the same on the CPU), by choosing a distribution for weights and leaving to ``param_init_rules`` where weights are.
All take ``(module, n_layers, d_model=None, **init_config)``, and ignore keys of ``init_config`` that belong to another function.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import warnings
from typing import Any, Callable, Sequence

import torch
from torch import nn

from llmfoundry.layers_registry import module_init_fns, param_init_fns

__all__ = [
    'baseline_',
    'default_',
    'generic_param_init_fn_',
    'get_param_init_fn',
    'kaiming_normal_',
    'kaiming_uniform_',
    'neox_init_',
    'residual_divisor',
    'small_init_',
    'xavier_normal_',
    'xavier_uniform_',
]

# Keys of init_config, see MPTConfig. Configs of released checkpoints also have 'verbose', which does nothing.
INIT_CONFIG_KEYS = ('name', 'fan_mode', 'init_nonlinearity', 'init_div_is_residual', 'emb_init_std', 'emb_init_uniform_lim', 'init_std', 'init_gain', 'verbose')


def residual_divisor(init_div_is_residual: bool | float | str, n_layers: int) -> float:
    """The number by which weights of residual projections (``_is_residual``) are divided.

    True is ``sqrt(2 * n_layers)``, as in GPT-2 (Radford et al., 2019, section 2.3): two additions to the residual stream per layer. False is 1.

    Raises:
        ValueError: neither a bool nor a number nor a numeric string.
    """
    if init_div_is_residual is False:
        return 1.0
    if init_div_is_residual is True:
        return math.sqrt(2 * n_layers)
    try:
        return float(init_div_is_residual)
    except (TypeError, ValueError):
        raise ValueError(f'init_config.init_div_is_residual must be a boolean or a number, got {init_div_is_residual!r}') from None


def generic_param_init_fn_(
    module: nn.Module,
    init_fn_: Callable[[torch.Tensor], Any],
    n_layers: int,
    d_model: int | None = None,
    init_div_is_residual: bool | float | str = True,
    emb_init_std: float | None = None,
    emb_init_uniform_lim: float | Sequence[float] | None = None,
    **_: Any,
) -> None:
    """Initialises the parameters that ``module`` itself holds; its children are not visited.

    Args:
        module: any module of a model.
        init_fn_: fills a weight in place.
        n_layers: depth of the model, for the residual divisor.
        d_model: width of the model.
        init_div_is_residual: see ``residual_divisor``.
        emb_init_std: standard deviation of normal embeddings; wins over the next.
        emb_init_uniform_lim: limits of uniform embeddings, a number or [low, high].

    Raises:
        NotImplementedError: the module holds parameters and no rule knows it.
    """
    kwargs = {
        'init_fn_': init_fn_,
        'd_model': d_model,
        'init_div_is_residual': init_div_is_residual,
        'div_is_residual': residual_divisor(init_div_is_residual, n_layers),
        'emb_init_std': emb_init_std,
        'emb_init_uniform_lim': emb_init_uniform_lim,
    }
    for rule in _rules():
        if rule(module=module, **kwargs):
            return
    held = [name for name, _ in module.named_parameters(recurse=False)]
    if held:
        raise NotImplementedError(
            f'{type(module).__name__} holds parameters ({", ".join(held)}) that no module_init_fn initialises. Known: {", ".join(name for name, _ in _rule_items())}. '
            'Register one for it: llmfoundry.registry.module_init_fns.register(name, func=rule).',
        )


def _rule_items() -> list[tuple[str, Any]]:
    """Rules in the order in which they are tried: our own as the registry lists them, then plug-ins."""
    own = ('fc', 'embedding', 'norm', 'multihead_attention', 'te_layernorm_mlp', 'moe')
    names = module_init_fns.names()
    ordered = [name for name in own if name in names] + [name for name in names if name not in own]
    return [(name, module_init_fns.get(name)) for name in ordered]


def _rules() -> list[Any]:
    return [rule for _, rule in _rule_items()]


def default_(module: nn.Module, n_layers: int | None = None, d_model: int | None = None, **_: Any) -> None:
    """torch's own initialisation, ``module.reset_parameters()``.

    Raises:
        NotImplementedError: the module holds parameters and has no such method, so they would stay whatever memory held.
    """
    reset = getattr(module, 'reset_parameters', None) or getattr(module, '_reset_parameters', None)
    held = [name for name, _ in module.named_parameters(recurse=False)]
    if callable(reset):
        with torch.no_grad():
            reset()
    elif held:
        raise NotImplementedError(f'{type(module).__name__} holds parameters ({", ".join(held)}) and has no reset_parameters, which init_config.name default_ calls')


def _normal(std: float) -> Callable[[torch.Tensor], Any]:
    return functools.partial(nn.init.normal_, mean=0.0, std=std)


def baseline_(module: nn.Module, n_layers: int, d_model: int | None = None, init_std: float | None = None, **init_config: Any) -> None:
    """Normal with standard deviation ``init_std``.

    Raises:
        ValueError: ``init_std`` is None.
    """
    if init_std is None:
        raise ValueError('init_config.init_std must be a number when init_config.name is baseline_, got None (0.02 is usual)')
    generic_param_init_fn_(module, _normal(init_std), n_layers, d_model, **init_config)


def _small_init_std(d_model: int | None, name: str) -> float:
    """``sqrt(2 / (5 d))``, from "Transformers without Tears" (https://arxiv.org/abs/1910.05895), section 2.2."""
    if d_model is None:
        raise ValueError(f'init_config.name {name} needs d_model, got None')
    return math.sqrt(2 / (5 * d_model))


def small_init_(module: nn.Module, n_layers: int, d_model: int | None = None, **init_config: Any) -> None:
    """Normal with standard deviation ``sqrt(2 / (5 * d_model))`` (https://arxiv.org/abs/1910.05895)."""
    generic_param_init_fn_(module, _normal(_small_init_std(d_model, 'small_init_')), n_layers, d_model, **init_config)


def neox_init_(module: nn.Module, n_layers: int, d_model: int | None = None, **init_config: Any) -> None:
    """As ``small_init_``, with residual projections divided by ``n_layers / sqrt(10)``, hence std ``2 / (n_layers * sqrt(d_model))`` (GPT-NeoX-20B, https://arxiv.org/abs/2204.06745, section 2.1)."""
    init_config['init_div_is_residual'] = n_layers / math.sqrt(10)
    generic_param_init_fn_(module, _normal(_small_init_std(d_model, 'neox_init_')), n_layers, d_model, **init_config)


def _kaiming(init_: Callable[..., Any], fan_mode: str, init_nonlinearity: str, init_gain: float) -> Callable[[torch.Tensor], Any]:
    return functools.partial(init_, a=init_gain, mode=fan_mode, nonlinearity=init_nonlinearity)


def kaiming_uniform_(
    module: nn.Module,
    n_layers: int,
    d_model: int | None = None,
    fan_mode: str = 'fan_in',
    init_nonlinearity: str = 'leaky_relu',
    init_gain: float = 0.0,
    **init_config: Any,
) -> None:
    """Uniform within ``gain * sqrt(3 / fan)`` (https://arxiv.org/abs/1502.01852).

    Args:
        fan_mode: ``fan_in`` or ``fan_out``.
        init_nonlinearity: name that ``torch.nn.init.calculate_gain`` knows.
        init_gain: negative slope of ``leaky_relu``; other nonlinearities do not use it.
    """
    generic_param_init_fn_(module, _kaiming(nn.init.kaiming_uniform_, fan_mode, init_nonlinearity, init_gain), n_layers, d_model, **init_config)


def kaiming_normal_(
    module: nn.Module,
    n_layers: int,
    d_model: int | None = None,
    fan_mode: str = 'fan_in',
    init_nonlinearity: str = 'leaky_relu',
    init_gain: float = 0.0,
    **init_config: Any,
) -> None:
    """Normal with standard deviation ``gain / sqrt(fan)`` (https://arxiv.org/abs/1502.01852); arguments as ``kaiming_uniform_``."""
    generic_param_init_fn_(module, _kaiming(nn.init.kaiming_normal_, fan_mode, init_nonlinearity, init_gain), n_layers, d_model, **init_config)


def _xavier_gain(init_gain: float) -> float:
    """``init_gain``, or 1 for 0: 0 is the default that MPTConfig shares with kaiming, where it is a slope, and would make every weight zero here."""
    return init_gain if init_gain != 0 else 1.0


def xavier_uniform_(module: nn.Module, n_layers: int, d_model: int | None = None, init_gain: float = 0.0, **init_config: Any) -> None:
    """Uniform within ``gain * sqrt(6 / (fan_in + fan_out))`` (Glorot and Bengio, 2010); ``init_gain`` 0, the default, means gain 1."""
    init_fn_ = functools.partial(nn.init.xavier_uniform_, gain=_xavier_gain(init_gain))
    generic_param_init_fn_(module, init_fn_, n_layers, d_model, **init_config)


def xavier_normal_(module: nn.Module, n_layers: int, d_model: int | None = None, init_gain: float = 0.0, **init_config: Any) -> None:
    """Normal with standard deviation ``gain * sqrt(2 / (fan_in + fan_out))`` (Glorot and Bengio, 2010); ``init_gain`` 0, the default, means gain 1."""
    init_fn_ = functools.partial(nn.init.xavier_normal_, gain=_xavier_gain(init_gain))
    generic_param_init_fn_(module, init_fn_, n_layers, d_model, **init_config)


def get_param_init_fn(init_config: dict[str, Any], n_layers: int, d_model: int) -> Callable[[nn.Module], None]:
    """Returns the function that initialises one module as ``init_config`` says; ``model.apply`` it, or hand it to FSDP.

    Raises:
        ValueError: no ``name``, an unknown one (RegistryError), or a key that no init function knows.
    """
    kwargs = dict(init_config)
    name = kwargs.pop('name', None)
    if name is None:
        raise ValueError(f"init_config needs the key 'name', got {init_config!r}. Available names: {', '.join(param_init_fns.names())}")
    init_fn = param_init_fns.get(name)
    known = {*INIT_CONFIG_KEYS, *inspect.signature(init_fn).parameters}
    for key in kwargs:
        if key not in known and init_fn.__module__ == __name__:
            near = difflib.get_close_matches(key, INIT_CONFIG_KEYS, n=1)
            raise ValueError(f'init_config.{key}: unknown key' + (f' (did you mean {near[0]!r}?)' if near else f'. Known: {", ".join(INIT_CONFIG_KEYS)}'))
    if kwargs.get('init_div_is_residual') is not None and name not in ('default_', 'neox_init_'):
        residual_divisor(kwargs['init_div_is_residual'], n_layers)
    if kwargs.get('emb_init_std') is not None and kwargs.get('emb_init_uniform_lim') is not None:
        warnings.warn('init_config: emb_init_std is used, emb_init_uniform_lim is not')
    return functools.partial(init_fn, n_layers=n_layers, d_model=d_model, **kwargs)
