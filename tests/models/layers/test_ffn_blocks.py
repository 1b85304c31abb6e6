"""Feed-forward blocks against their formulas, and the errors of their builders."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmfoundry import registry
from llmfoundry.models.layers.ffn import MPTGLU, MPTMLP, quickgelu_activation, resolve_ffn_act_fn, resolve_ffn_hidden_size
from llmfoundry.models.layers.layer_builders import build_attention_layer, build_fc, build_ffn, split_fc_type

D = 16


def _linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


@pytest.mark.parametrize('bias', [True, False])
def test_mlp_is_its_formula(bias: bool) -> None:
    torch.manual_seed(0)
    mlp, x = build_ffn('mptmlp', D, 4, 'cpu', bias, {'fc_type': {'name': 'torch'}}), torch.randn(2, 3, D)
    hidden = _linear(mlp.up_proj, x)
    expected = _linear(mlp.down_proj, 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)))
    torch.testing.assert_close(mlp(x), expected)
    assert mlp.up_proj.weight.shape == (4 * D, D) and (mlp.up_proj.bias is not None) == bias


def test_glu_is_its_formula() -> None:
    torch.manual_seed(0)
    glu, x = build_ffn('MPTGLU', D, 2.5, 'cpu', False, {'ffn_act_fn': {'name': 'silu'}}), torch.randn(2, 3, D)
    gate, up = _linear(glu.gate_proj, x), _linear(glu.up_proj, x)
    torch.testing.assert_close(glu(x), _linear(glu.down_proj, gate * torch.sigmoid(gate) * up))
    assert isinstance(glu, MPTGLU) and glu.gate_proj.weight.shape == (40, D)


def test_residual_projections_are_marked_for_initialisation() -> None:
    glu = build_ffn('mptglu', D, 2, 'cpu', True, {})
    assert [name for name, module in glu.named_modules() if getattr(module, '_is_residual', False)] == ['down_proj']


def test_hidden_size() -> None:
    assert resolve_ffn_hidden_size(16, 4) == 64
    assert resolve_ffn_hidden_size(16, 2.5) == 40
    assert resolve_ffn_hidden_size(16, 4, 5) == 5
    assert build_ffn('mptmlp', D, 4, 'cpu', True, {'ffn_hidden_size': 7}).up_proj.out_features == 7
    with pytest.raises(ValueError) as error:
        resolve_ffn_hidden_size(10, 2.25)
    assert str(error.value) == 'd_model * expansion_ratio must be a whole number, got 10 * 2.25 = 22.5: change one or set ffn_hidden_size'


def test_activations() -> None:
    x = torch.linspace(-3, 3, 50)
    torch.testing.assert_close(resolve_ffn_act_fn(None)(x), F.gelu(x))
    torch.testing.assert_close(resolve_ffn_act_fn({'name': 'gelu', 'approximate': 'tanh'})(x), F.gelu(x, approximate='tanh'))
    torch.testing.assert_close(resolve_ffn_act_fn({'name': 'leaky_relu', 'negative_slope': 0.5})(x), torch.where(x > 0, x, x / 2))
    torch.testing.assert_close(resolve_ffn_act_fn({'name': 'quick_gelu'})(x), x / (1 + torch.exp(-1.702 * x)))
    assert resolve_ffn_act_fn({'name': 'quick_gelu'}) is quickgelu_activation


@pytest.mark.parametrize('config', [{'name': 'gelo'}, {'approximate': 'tanh'}, {'name': 3}])
def test_unknown_activation(config: dict) -> None:
    with pytest.raises(ValueError) as error:
        resolve_ffn_act_fn(config)
    assert str(error.value) == f"ffn_config.ffn_act_fn.name: {config.get('name')!r} is neither quick_gelu nor a function of torch.nn.functional (gelu, silu, relu, ...)"


def test_fc_arguments_reach_the_layer() -> None:
    assert split_fc_type('te') == ('te', {})
    assert split_fc_type({'name': 'te', 'a': 1}) == ('te', {'a': 1})
    layer = build_fc('TORCH', 3, 5, {'bias': False, 'device': 'meta'})
    assert layer.weight.is_meta and layer.weight.shape == (5, 3) and layer.bias is None
    with pytest.raises(ValueError, match="fc_type must be a name or a dict with the key 'name', got {'bias': True}"):
        split_fc_type({'bias': True})


def test_a_registered_layer_takes_the_place_of_ours() -> None:
    class Scaled(torch.nn.Linear):
        def __init__(self, *args: object, scale: float, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            self.scale = scale

    with registry.save_registry():
        registry.fcs.register('scaled', func=Scaled)
        mlp = build_ffn('mptmlp', D, 4, 'cpu', False, {'fc_type': {'name': 'scaled', 'scale': 3.0}})
    assert mlp.up_proj.scale == mlp.down_proj.scale == 3.0 and mlp.up_proj.bias is None


@pytest.mark.parametrize(
    ('build', 'error_cls', 'text'),
    [
        (lambda: build_fc('torhc', 1, 2), ValueError, "Cannot find 'torhc' in the registry llmfoundry -> fcs. Did you mean 'torch'? Available names: torch"),
        (lambda: build_fc('te', 1, 2), ImportError, "fc_type: Cannot find 'te' in the registry llmfoundry -> fcs. 'te' needs the package 'transformer_engine', which is not installed. Available names: torch"),
        (lambda: build_ffn('mlp', D, 4, 'cpu', True), ValueError, "ffn_config.ffn_type: 'mlp' is no feed-forward block. Available names: mptglu, mptmlp, torch_dmoe"),
        (
            lambda: build_ffn('te_ln_mlp', D, 4, 'cpu', True), ImportError,
            "ffn_config.ffn_type: Cannot find 'te_ln_mlp' in the registry llmfoundry -> ffns_with_norm. 'te_ln_mlp' needs the package 'transformer_engine', which is not installed. Available names: none",
        ),
        (
            lambda: build_ffn('mb_dmoe', D, 4, 'cpu', True), ImportError,
            "ffn_config.ffn_type: Cannot find 'mb_dmoe' in the registry llmfoundry -> ffns_with_megablocks. 'mb_dmoe' needs the package 'megablocks', which is not installed. Available names: none",
        ),
    ],
)  # fmt: skip
def test_builder_errors(build, error_cls: type[Exception], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('llmfoundry.typed_registry._is_importable', lambda module: module not in ('transformer_engine', 'megablocks'))
    with pytest.raises(error_cls) as error:
        build()
    assert str(error.value) == text


def test_unknown_attention_class() -> None:
    with pytest.raises(ValueError, match="Cannot find 'multihed_attention' in the registry llmfoundry -> attention_classes. Did you mean 'multihead_attention'?"):
        build_attention_layer('multihed_attention', {})


def test_unknown_keys_of_a_block_are_errors() -> None:
    with pytest.raises(TypeError, match='moe_num_experts'):
        build_ffn('mptmlp', D, 4, 'cpu', True, {'moe_num_experts': 4})


def test_mlp_keeps_no_more_for_backward_than_its_two_activations() -> None:
    """Input, hidden and activated hidden state, besides weights: (T, d), (T, 4d), (T, 4d)."""
    mlp, x = MPTMLP(D, 4, bias=False), torch.randn(32, D, requires_grad=True)
    kept: dict[int, int] = {}
    weights = {param.data_ptr() for param in mlp.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(x)
    assert sum(kept.values()) <= 32 * D * (1 + 4 + 4)
