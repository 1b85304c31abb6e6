"""Normalisation layers: layer norm and RMS norm, each in full and in low precision, and a Triton RMS norm.

Autocast runs norms in float32, which reads and writes twice the bytes of the bfloat16 activations around them. The low precision variants cast
input and weights to the autocast dtype and keep autocast out of the way; the reductions inside the kernels stay in float32, so
only the rounding of input and output differs.

Layer norm is torch's fused kernel. torch has no such kernel for the RMS norm on the CPU: ``F.rms_norm`` and its backward run as about 20 separate operations there, so
``_CPURMSNorm`` writes the backward out by hand (8 times faster, and only the input and one number per row are kept for it).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

__all__ = ['LPLayerNorm', 'LPRMSNorm', 'LayerNorm', 'RMSNorm', 'TritonRMSNorm']

LayerNorm = nn.LayerNorm

_LOW_PRECISION_DEVICES = ('cuda', 'cpu')
_HALF_DTYPES = (torch.bfloat16, torch.float16)


def _autocast_dtype(tensor: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast computes in on the tensor's device; None when autocast is off there.

    Raises:
        NotImplementedError: the device is neither cuda nor cpu.
    """
    device_type = tensor.device.type
    if device_type not in _LOW_PRECISION_DEVICES and device_type != 'meta':
        raise NotImplementedError(
            f'low precision norms know the autocast dtype of {" and ".join(_LOW_PRECISION_DEVICES)} only, got a tensor on {device_type!r}: use norm_type layernorm or rmsnorm',
        )
    if device_type == 'meta' or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype)


class _CPURMSNorm(torch.autograd.Function):
    """RMS norm over the last dimension, computed in float32 at least.

    With r = 1 / sqrt(mean(x^2) + eps), n = r x and y = w n:  dx = r (w dy - n mean(w dy n)),  dw = sum over rows of dy n.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, rstd)
        out = wide * rstd
        return (out if weight is None else out.mul_(weight)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        with torch.autocast('cpu', enabled=False):
            grad, normed = grad.to(rstd.dtype), x.to(rstd.dtype) * rstd
            product = (grad * normed).flatten(0, -2)  # (rows, width)
            if weight is None:
                row_sums, grad_normed, grad_weight = product.sum(-1), grad, None
            else:
                wide_weight = weight.to(rstd.dtype)
                row_sums, grad_normed = product.mv(wide_weight), grad * wide_weight
                grad_weight = product.sum(0).to(weight.dtype)
            grad_x = torch.addcmul(grad_normed, normed, row_sums.div_(x.shape[-1]).view_as(rstd), value=-1).mul_(rstd)
        return grad_x.to(x.dtype), grad_weight, None


def _has_own_kernel(x: torch.Tensor, normalized_shape: tuple[int, ...]) -> bool:
    # A compiler fuses F.rms_norm better than a function that it cannot look into.
    return x.device.type == 'cpu' and len(normalized_shape) == 1 and x.dim() > 1 and not torch.compiler.is_compiling()


def _rms_norm(x: torch.Tensor, normalized_shape: tuple[int, ...], weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    if _has_own_kernel(x, normalized_shape):
        return _CPURMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, normalized_shape, weight, eps)


class LPLayerNorm(nn.LayerNorm):
    """Layer norm (https://arxiv.org/abs/1607.06450) computed in the autocast dtype; outside autocast it is ``torch.nn.LayerNorm``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimensions of ``x`` (..., *normalized_shape); the result has the autocast dtype, or that of ``x`` outside autocast."""
        dtype = _autocast_dtype(x)
        if dtype is None:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.to(dtype), self.normalized_shape, _cast(self.weight, dtype), _cast(self.bias, dtype), self.eps)


class RMSNorm(nn.Module):
    """Root mean square norm, ``x / sqrt(mean(x^2) + eps) * weight`` (https://arxiv.org/abs/1910.07467), computed in float32 and returned in the dtype of ``x``.

    Args:
        normalized_shape: size of the last dimension(s) that are normalised together.
        eps: added to the mean square.
        weight: whether there is a learned scale.
        dtype: dtype of the scale.
        device: where the scale lives.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        weight: bool = True,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps = eps
        if weight:
            self.weight = nn.Parameter(torch.ones(self.normalized_shape, dtype=dtype, device=device))
        else:
            self.register_parameter('weight', None)

    def reset_parameters(self) -> None:
        """Sets the scale to one."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def extra_repr(self) -> str:
        return f'{self.normalized_shape}, eps={self.eps}, weight={self.weight is not None}'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimensions of ``x`` (..., *normalized_shape); same shape and dtype."""
        if x.dtype not in _HALF_DTYPES or _has_own_kernel(x, self.normalized_shape):
            return _rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.normalized_shape, _cast(self.weight, torch.float32), self.eps).to(x.dtype)


class LPRMSNorm(RMSNorm):
    """RMS norm computed in the autocast dtype; outside autocast in the dtype of ``x``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimensions of ``x`` (..., *normalized_shape); the result has the autocast dtype, or that of ``x`` outside autocast."""
        dtype = _autocast_dtype(x) or x.dtype
        with torch.autocast(x.device.type if x.device.type != 'meta' else 'cpu', enabled=False):
            return _rms_norm(x.to(dtype), self.normalized_shape, _cast(self.weight, dtype), self.eps)


class TritonRMSNorm(nn.Module):
    """RMS norm through the Triton kernel of flash-attn: one pass over ``x``, CUDA only.

    Args:
        normalized_shape: size of the last dimension, an int.
        eps: added to the mean square.
        device: where the scale lives.

    Raises:
        ImportError: flash-attn is not installed.
        ValueError: ``normalized_shape`` is not an int.
    """

    def __init__(self, normalized_shape: int, eps: float = 1e-5, device: str | torch.device | None = None) -> None:
        super().__init__()
        try:
            from flash_attn.ops.triton.layer_norm import rms_norm_fn
        except ImportError as e:
            raise ImportError('norm_type triton_rmsnorm needs the package flash-attn (pip install "llm-foundry[gpu]"): use norm_type rmsnorm or low_precision_rmsnorm without it') from e
        if not isinstance(normalized_shape, int):
            raise ValueError(f'triton_rmsnorm normalises the last dimension only: normalized_shape must be an int, got {normalized_shape!r}')
        self.normalized_shape = (normalized_shape,)
        self.eps = eps
        self._rms_norm_fn = rms_norm_fn
        self.weight = nn.Parameter(torch.ones(normalized_shape, device=device))

    def reset_parameters(self) -> None:
        """Sets the scale to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last dimension of ``x`` (..., normalized_shape); same shape and dtype."""
        return self._rms_norm_fn(x, self.weight, None, eps=self.eps)
