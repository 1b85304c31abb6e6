"""Norms against their formulas, and the dtypes that they compute in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmfoundry.models.layers import norm as norm_module
from llmfoundry.models.layers.layer_builders import build_norm
from llmfoundry.models.layers.norm import LPLayerNorm, LPRMSNorm, RMSNorm, TritonRMSNorm

WIDTH = 24


def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def _randomised(name: str, eps: float = 1e-3) -> torch.nn.Module:
    norm = build_norm(name, WIDTH, eps, 'cpu')
    with torch.no_grad():
        for param in norm.parameters():
            param.normal_()
    return norm


@pytest.mark.parametrize('name', ['layernorm', 'low_precision_layernorm', 'Low_Precision_LayerNorm'])
def test_layer_norm_is_its_formula(name: str) -> None:
    torch.manual_seed(0)
    norm, x = _randomised(name), torch.randn(3, 5, WIDTH)
    torch.testing.assert_close(norm(x), _layer_norm(x, norm.weight, norm.bias, 1e-3))


@pytest.mark.parametrize('name', ['rmsnorm', 'low_precision_rmsnorm'])
def test_rms_norm_is_its_formula(name: str) -> None:
    torch.manual_seed(0)
    norm, x = _randomised(name), torch.randn(3, 5, WIDTH)
    torch.testing.assert_close(norm(x), _rms_norm(x, norm.weight, 1e-3))


@pytest.mark.parametrize('name', ['layernorm', 'low_precision_layernorm', 'rmsnorm', 'low_precision_rmsnorm'])
def test_gradients(name: str) -> None:
    torch.manual_seed(0)
    norm = _randomised(name).double()
    assert torch.autograd.gradcheck(norm, torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize('shape', [(5, WIDTH), (2, 3, WIDTH)])
@pytest.mark.parametrize('has_weight', [True, False])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_own_backward_of_the_rms_norm_equals_torchs(shape: tuple[int, ...], has_weight: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight = torch.randn(WIDTH, dtype=dtype, requires_grad=True) if has_weight else None
    wanted = [x, weight] if has_weight else [x]
    grad = torch.randn(shape, dtype=dtype)
    ours, torchs = norm_module._rms_norm(x, (WIDTH,), weight, 1e-5), F.rms_norm(x, (WIDTH,), weight, 1e-5)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ours, torchs, atol=tolerance, rtol=tolerance)
    for a, b in zip(torch.autograd.grad(ours, wanted, grad), torch.autograd.grad(torchs, wanted, grad), strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_rms_norm_keeps_its_input_and_one_number_per_row() -> None:
    kept: list[int] = []
    norm, x = RMSNorm(WIDTH), torch.randn(7, WIDTH, requires_grad=True)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(0 if tensor.data_ptr() in (x.data_ptr(), norm.weight.data_ptr()) else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        norm(x)
    assert sum(kept) == 7


@pytest.mark.parametrize('norm_cls', [LPLayerNorm, LPRMSNorm])
def test_low_precision_norms_take_the_autocast_dtype_and_cast_weights_first(norm_cls: type) -> None:
    torch.manual_seed(0)
    norm = norm_cls(WIDTH)
    with torch.no_grad():
        norm.weight.fill_(1.0 + 2**-10)  # rounds to 1 in bfloat16
    x = torch.randn(4, WIDTH)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), norm_cls(WIDTH)(x.bfloat16().float()), atol=2e-2, rtol=8e-3)
    with torch.no_grad():
        norm.weight.fill_(1.0)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(y, norm(x))
    assert norm(x).dtype == torch.float32


def test_low_precision_layer_norm_adds_its_bias() -> None:
    norm, x = _randomised('low_precision_layernorm'), torch.randn(4, WIDTH)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = norm(x)
    torch.testing.assert_close(y.float(), norm(x), atol=5e-2, rtol=5e-2)


def test_rms_norm_computes_in_float32_and_keeps_the_dtype_of_its_input() -> None:
    torch.manual_seed(0)
    x = (100 * torch.randn(4, WIDTH)).bfloat16()
    norm = RMSNorm(WIDTH)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, _rms_norm(x.float(), norm.weight, 1e-5).bfloat16())


@pytest.mark.parametrize('norm_cls', [LPLayerNorm, LPRMSNorm])
def test_low_precision_norms_refuse_devices_whose_autocast_is_unknown(norm_cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('llmfoundry.models.layers.norm._LOW_PRECISION_DEVICES', ('cuda',))
    with pytest.raises(NotImplementedError, match="got a tensor on 'cpu': use norm_type layernorm or rmsnorm"):
        norm_cls(WIDTH)(torch.randn(2, WIDTH))


def test_shape_of_weights_follows_the_argument() -> None:
    assert RMSNorm((2, 3)).weight.shape == (2, 3)
    assert RMSNorm(4, weight=False).weight is None
    assert build_norm('rmsnorm', 4, None, 'meta').weight.is_meta
    assert [name for name, _ in build_norm('rmsnorm', 4).named_parameters()] == ['weight']


def test_unknown_norm_lists_the_options() -> None:
    with pytest.raises(NotImplementedError) as error:
        build_norm('rmsnom', 4)
    assert str(error.value) == (
        "norm_type: Cannot find 'rmsnom' in the registry llmfoundry -> norms. Did you mean 'rmsnorm'? "
        'Available names: layernorm, low_precision_layernorm, low_precision_rmsnorm, rmsnorm, triton_rmsnorm'
    )


def test_triton_rms_norm_names_the_package_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__('sys').modules, 'flash_attn.ops.triton.layer_norm', None)
    with pytest.raises(ImportError) as error:
        TritonRMSNorm(8)
    assert str(error.value) == (
        'norm_type triton_rmsnorm needs the package flash-attn (pip install "llm-foundry[gpu]"): use norm_type rmsnorm or low_precision_rmsnorm without it'
    )


def test_triton_rms_norm_with_a_stand_in_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    kernel = types.ModuleType('flash_attn.ops.triton.layer_norm')
    kernel.rms_norm_fn = lambda x, weight, bias, eps: _rms_norm(x, weight, eps)
    for name in ('flash_attn', 'flash_attn.ops', 'flash_attn.ops.triton'):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    x = torch.randn(2, 8)
    torch.testing.assert_close(build_norm('triton_rmsnorm', 8, 1e-5)(x), RMSNorm(8)(x))
    with pytest.raises(ValueError, match='normalized_shape must be an int, got \\[8\\]'):
        build_norm('triton_rmsnorm', [8])
