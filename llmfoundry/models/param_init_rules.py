"""How each kind of module is initialised: one rule per kind, tried in the order of the registry ``module_init_fns``.

A rule looks at one module (not its children), returns False if it is not of its kind, and else initialises it and returns True. The rule
says where weights, biases and scales are; which distribution the weights get is the ``init_fn_`` that it is handed.

Three marks on modules change what happens: ``_fused = (dim, [positions])`` splits the weight at these positions and initialises each slice by
itself, so that fusing projections does not change their statistics; ``_is_residual = True`` divides the weight by the residual divisor;
``ffn_hidden_size`` of stacked experts says how many rows one expert has.
"""

from __future__ import annotations

import warnings
from typing import Any, Callable, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llmfoundry.layers_registry import fcs, norms

__all__ = [
    'embedding_init',
    'fc_init',
    'fused_init_helper_',
    'fused_param_init_helper',
    'init_param_',
    'moe_init',
    'multihead_attention_init',
    'norm_init',
    'stacked_param_init_helper',
    'te_layernorm_mlp_init',
]

InitFn = Callable[[torch.Tensor], Any]


def init_param_(param: torch.Tensor, init_fn_: InitFn) -> None:
    """Initialises ``param`` in place by ``init_fn_``, which gets a whole plain tensor.

    A sharded parameter (DTensor) is materialised, initialised and redistributed, because fans and slices are properties of the whole
    tensor. The values of the first rank of the mesh win, so ranks need not share a seed.
    """
    with torch.no_grad():
        if not isinstance(param, DTensor):
            init_fn_(param)
            return
        local = param.to_local()
        whole = torch.empty(param.shape, dtype=param.dtype, device=local.device)
        init_fn_(whole)
        local.copy_(distribute_tensor(whole, param.device_mesh, param.placements).to_local())


def _zeros_(param: torch.Tensor | None) -> None:
    if param is not None:
        init_param_(param, nn.init.zeros_)


def _divide_(param: torch.Tensor, divisor: float) -> None:
    with torch.no_grad():
        param.div_(divisor)


def fused_param_init_helper(param: torch.Tensor, init_fn_: InitFn, fused_parameters: tuple[int, Sequence[int]]) -> None:
    """Initialises each slice of a fused parameter by itself.

    Args:
        param: the weight.
        init_fn_: called with each slice.
        fused_parameters: the dimension that is split and the ascending positions of the cuts (without 0 and the size).
    """
    dim, cuts = fused_parameters
    bounds = [0, *cuts, param.shape[dim]]

    def init_slices(whole: torch.Tensor) -> None:
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            init_fn_(whole.narrow(dim, start, end - start))

    init_param_(param, init_slices)


def fused_init_helper_(module: nn.Module, init_fn_: InitFn, name_param: str = 'weight') -> None:
    """Initialises the fused parameter ``name_param`` of a module that has ``_fused``.

    Raises:
        RuntimeError: the module has no ``_fused``.
    """
    fused = getattr(module, '_fused', None)
    if fused is None:
        raise RuntimeError(f'{type(module).__name__} has no attribute _fused = (dim, [positions]), so its {name_param} cannot be initialised slice by slice')
    fused_param_init_helper(getattr(module, name_param), init_fn_, fused)


def stacked_param_init_helper(param: torch.Tensor, init_fn_: InitFn, stack_dim: int) -> None:
    """Initialises each index of ``stack_dim`` by itself, for parameters that stack several weights in a dimension of its own."""

    def init_stack(whole: torch.Tensor) -> None:
        for weight in whole.unbind(stack_dim):
            init_fn_(weight)

    init_param_(param, init_stack)


def _is_any(module: nn.Module, registry_entries: dict[str, Any]) -> bool:
    """Whether the module is an instance of a class in the registry; entries may be builder functions, which say nothing."""
    return isinstance(module, tuple(entry for entry in registry_entries.values() if isinstance(entry, type)))


def fc_init(module: nn.Module, init_fn_: InitFn, init_div_is_residual: Any = False, div_is_residual: float = 1.0, **_: Any) -> bool:
    """Fully connected layers of the registry ``fcs``: weight by ``init_fn_``, bias zero, residual projections divided."""
    if not _is_any(module, fcs.get_all()):
        return False
    if hasattr(module, '_fused'):
        fused_init_helper_(module, init_fn_)
    else:
        init_param_(module.weight, init_fn_)
    _zeros_(getattr(module, 'bias', None))
    if init_div_is_residual is not False and getattr(module, '_is_residual', False):
        _divide_(module.weight, div_is_residual)
    return True


def _embedding_init_fn(init_fn_: InitFn, emb_init_std: float | None, emb_init_uniform_lim: float | Sequence[float] | None) -> InitFn:
    if emb_init_std is not None:
        if emb_init_std == 0:
            warnings.warn('init_config.emb_init_std is 0: the embeddings are initialised to zero')
        return lambda weight: nn.init.normal_(weight, mean=0.0, std=emb_init_std)
    if emb_init_uniform_lim is None:
        return init_fn_
    if isinstance(emb_init_uniform_lim, (int, float)):
        low, high = -emb_init_uniform_lim, emb_init_uniform_lim
    elif len(emb_init_uniform_lim) == 2:
        low, high = emb_init_uniform_lim
    else:
        raise ValueError(f'init_config.emb_init_uniform_lim must be a number or [low, high], got {list(emb_init_uniform_lim)}')
    if low == high:
        warnings.warn(f'init_config.emb_init_uniform_lim: both limits are {low}, so the embeddings are constant')
    return lambda weight: nn.init.uniform_(weight, low, high)


def embedding_init(
    module: nn.Module,
    init_fn_: InitFn,
    emb_init_std: float | None = None,
    emb_init_uniform_lim: float | Sequence[float] | None = None,
    **_: Any,
) -> bool:
    """Embeddings: normal with ``emb_init_std`` if given, else uniform within ``emb_init_uniform_lim`` if given, else ``init_fn_``; the padding row is zero.

    Raises:
        ValueError: ``emb_init_uniform_lim`` is a list of other than two numbers.
    """
    if not isinstance(module, nn.Embedding):
        return False
    init_rows = _embedding_init_fn(init_fn_, emb_init_std, emb_init_uniform_lim)

    def init_weight(weight: torch.Tensor) -> None:
        init_rows(weight)
        if module.padding_idx is not None:
            weight[module.padding_idx].zero_()

    init_param_(module.weight, init_weight)
    return True


def norm_init(module: nn.Module, **_: Any) -> bool:
    """Norms of the registry ``norms``: scale one, bias zero."""
    if not _is_any(module, norms.get_all()):
        return False
    if getattr(module, 'weight', None) is not None:
        init_param_(module.weight, nn.init.ones_)
    _zeros_(getattr(module, 'bias', None))
    return True


def multihead_attention_init(
    module: nn.Module,
    init_fn_: InitFn,
    d_model: int | None = None,
    init_div_is_residual: Any = False,
    div_is_residual: float = 1.0,
    **_: Any,
) -> bool:
    """``torch.nn.MultiheadAttention``, whose projections are parameters of its own, fused if all widths are equal."""
    if not isinstance(module, nn.MultiheadAttention):
        return False
    if module._qkv_same_embed_dim:
        width = d_model or module.embed_dim
        fused_param_init_helper(module.in_proj_weight, init_fn_, (0, [width, 2 * width]))
    else:
        for weight in (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight):
            init_param_(weight, init_fn_)
    for bias in (module.in_proj_bias, module.bias_k, module.bias_v, module.out_proj.bias):
        _zeros_(bias)
    init_param_(module.out_proj.weight, init_fn_)
    if init_div_is_residual is not False and getattr(module.out_proj, '_is_residual', False):
        _divide_(module.out_proj.weight, div_is_residual)
    return True


def te_layernorm_mlp_init(module: nn.Module, init_fn_: InitFn, init_div_is_residual: Any = False, div_is_residual: float = 1.0, **_: Any) -> bool:
    """TransformerEngine's ``LayerNormMLP``, known by its parameters so that TransformerEngine is not imported."""
    if not (hasattr(module, 'fc1_weight') and hasattr(module, 'fc2_weight') and hasattr(module, 'layer_norm_weight')):
        return False
    init_param_(module.layer_norm_weight, nn.init.ones_)
    for name in ('layer_norm_bias', 'fc1_bias', 'fc2_bias'):
        _zeros_(getattr(module, name, None))
    init_param_(module.fc1_weight, init_fn_)
    init_param_(module.fc2_weight, init_fn_)
    if init_div_is_residual is not False:
        _divide_(module.fc2_weight, div_is_residual)
    return True


def moe_init(module: nn.Module, init_fn_: InitFn, init_div_is_residual: Any = False, div_is_residual: float = 1.0, **_: Any) -> bool:
    """Stacked experts, ours and megablocks' (known by their parameters w1 and w2), and the bias that is added to their sum.

    Each expert's weight is initialised by itself. The last one maps F to H but is stored (F, H), so ``init_fn_`` sees it transposed, as (out, in).
    """
    if _holds_experts(getattr(module, 'mlp', None)):
        _zeros_(getattr(module, 'bias', None))
        return True
    if not _holds_experts(module):
        return False
    for name in ('w1', 'v1', 'w2'):
        weight = getattr(module, name, None)
        if weight is not None:
            _init_experts_(weight, init_fn_, module.ffn_hidden_size, transpose=name == 'w2' or weight.dim() == 3)
    if init_div_is_residual is not False:
        _divide_(module.w2, div_is_residual)
    return True


def _holds_experts(module: Any) -> bool:
    return isinstance(getattr(module, 'w1', None), nn.Parameter) and isinstance(getattr(module, 'w2', None), nn.Parameter)


def _init_experts_(weight: torch.Tensor, init_fn_: InitFn, ffn_hidden_size: int, transpose: bool) -> None:
    """Initialises stacked expert weights of shape (E * F, H), or (E, in, out) as megablocks' MoE keeps them."""

    def init_each(whole: torch.Tensor) -> None:
        stacked = whole if whole.dim() == 3 else whole.view(-1, ffn_hidden_size, whole.shape[-1])
        for expert in stacked.unbind(0):
            init_fn_(expert.t() if transpose else expert)

    init_param_(weight, init_each)
