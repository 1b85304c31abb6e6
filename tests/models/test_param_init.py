"""What each init function gives to weights, biases, norms and embeddings."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from llmfoundry import registry
from llmfoundry.models.layers.ffn import build_mptmlp
from llmfoundry.models.layers.layer_builders import build_ffn, build_norm
from llmfoundry.models.param_init import generic_param_init_fn_, get_param_init_fn, residual_divisor
from llmfoundry.models.utils.param_init_fns import fc_init, fused_param_init_helper, stacked_param_init_helper

NAMES = ['default_', 'baseline_', 'kaiming_uniform_', 'kaiming_normal_', 'neox_init_', 'small_init_', 'xavier_uniform_', 'xavier_normal_']
N_LAYERS, D = 8, 256
MOE = {
    'moe_num_experts': 4, 'moe_top_k': 2, 'mlp_type': 'glu', 'moe_jitter_eps': None, 'moe_normalize_expert_weights': None, 'uniform_expert_assignment': False,
}  # fmt: skip


def _init(module: nn.Module, name: str = 'kaiming_normal_', d_model: int = D, **config: object) -> nn.Module:
    torch.manual_seed(0)
    module.apply(get_param_init_fn({'name': name, **config}, N_LAYERS, d_model))
    return module


def _residual(in_features: int = D, out_features: int = D) -> nn.Linear:
    layer = nn.Linear(in_features, out_features)
    layer._is_residual = True
    return layer


def test_the_eight_names_are_registered() -> None:
    assert sorted(registry.param_init_fns.names()) == sorted(NAMES)


@pytest.mark.parametrize(
    ('name', 'config', 'std'),
    [
        ('baseline_', {'init_std': 0.02}, 0.02),
        ('small_init_', {}, math.sqrt(2 / (5 * D))),
        ('neox_init_', {}, math.sqrt(2 / (5 * D))),
        ('kaiming_normal_', {'init_nonlinearity': 'relu'}, math.sqrt(2 / D)),
        ('kaiming_normal_', {'init_nonlinearity': 'relu', 'fan_mode': 'fan_out'}, math.sqrt(2 / (2 * D))),
        ('kaiming_normal_', {'init_nonlinearity': 'leaky_relu', 'init_gain': 2.0}, math.sqrt(2 / (1 + 4) / D)),
        ('kaiming_uniform_', {'init_nonlinearity': 'linear'}, math.sqrt(1 / D)),
        ('xavier_normal_', {'init_gain': 3.0}, 3 * math.sqrt(2 / (D + 2 * D))),
        ('xavier_uniform_', {'init_gain': 1.0}, math.sqrt(2 / (D + 2 * D))),
        ('xavier_uniform_', {}, math.sqrt(2 / (D + 2 * D))),
    ],
)
def test_standard_deviation_of_a_weight(name: str, config: dict, std: float) -> None:
    weight = _init(nn.Linear(D, 2 * D), name, **config).weight
    assert weight.std().item() == pytest.approx(std, rel=0.02)
    assert abs(weight.mean().item()) < 4 * std / math.sqrt(weight.numel())
    if name.endswith('uniform_'):
        assert weight.abs().max().item() == pytest.approx(std * math.sqrt(3), rel=0.01)


def test_biases_are_zero_and_norms_one() -> None:
    model = nn.Sequential(nn.Linear(D, D), build_norm('low_precision_layernorm', D), build_norm('rmsnorm', D))
    for param in model.parameters():
        nn.init.normal_(param.data)
    _init(model)
    assert not model[0].bias.any() and not model[1].bias.any()
    assert (model[1].weight == 1).all() and (model[2].weight == 1).all()


def test_default_is_torchs_own() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    expected = layer.weight.clone()
    assert torch.equal(_init(layer, 'default_').weight, expected)


def test_default_needs_a_method_to_call() -> None:
    with pytest.raises(NotImplementedError) as error:
        _init(_Own(), 'default_')
    assert str(error.value) == '_Own holds parameters (gate) and has no reset_parameters, which init_config.name default_ calls'


@pytest.mark.parametrize(
    ('value', 'divisor'),
    [(True, math.sqrt(2 * N_LAYERS)), (False, 1.0), (3, 3.0), (2.5, 2.5), ('4.0', 4.0)],
)
def test_residual_divisor(value: object, divisor: float) -> None:
    assert residual_divisor(value, N_LAYERS) == pytest.approx(divisor)
    plain = _init(nn.Linear(D, D), init_div_is_residual=value).weight
    torch.testing.assert_close(_init(_residual(), init_div_is_residual=value).weight, plain / divisor)


def test_neox_has_its_own_divisor() -> None:
    plain = _init(nn.Linear(D, D), 'neox_init_', init_div_is_residual=False).weight
    residual = _init(_residual(), 'neox_init_', init_div_is_residual=False).weight
    torch.testing.assert_close(residual, plain * math.sqrt(10) / N_LAYERS)
    assert residual.std().item() == pytest.approx(2 / (N_LAYERS * math.sqrt(D)), rel=0.02)


def test_wrong_residual_divisor() -> None:
    with pytest.raises(ValueError) as error:
        get_param_init_fn({'name': 'small_init_', 'init_div_is_residual': 'yes'}, N_LAYERS, D)
    assert str(error.value) == "init_config.init_div_is_residual must be a boolean or a number, got 'yes'"


def test_down_projection_of_a_built_block_is_divided() -> None:
    mlp = _init(build_mptmlp(D, 2), 'baseline_', init_std=1.0)
    assert mlp.down_proj.weight.std().item() == pytest.approx(1 / 4, rel=0.02)
    assert mlp.up_proj.weight.std().item() == pytest.approx(1.0, rel=0.02)


# Embeddings ----------------------------------------------------------------------------------------------------------------------


def test_embedding_by_std_wins_over_limits() -> None:
    with pytest.warns(UserWarning, match='emb_init_std is used, emb_init_uniform_lim is not'):
        embedding = _init(nn.Embedding(512, D), emb_init_std=0.5, emb_init_uniform_lim=7)
    assert embedding.weight.std().item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(('limits', 'low', 'high'), [(0.25, -0.25, 0.25), ([-0.1, 0.3], -0.1, 0.3)])
def test_embedding_limits(limits: object, low: float, high: float) -> None:
    weight = _init(nn.Embedding(512, D), emb_init_uniform_lim=limits).weight
    assert weight.min().item() == pytest.approx(low, abs=1e-4) and weight.max().item() == pytest.approx(high, abs=1e-4)


def test_embedding_by_the_init_function_otherwise() -> None:
    assert _init(nn.Embedding(512, D), 'baseline_', init_std=0.02).weight.std().item() == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize('config', [{}, {'emb_init_std': 1.0}, {'emb_init_uniform_lim': 1.0}])
def test_padding_row_is_zero(config: dict) -> None:
    weight = _init(nn.Embedding(10, 4, padding_idx=3), **config).weight
    assert not weight[3].any() and weight[2].all() and weight[4].all()


def test_embedding_warnings_and_errors() -> None:
    with pytest.warns(UserWarning, match='init_config.emb_init_std is 0: the embeddings are initialised to zero'):
        assert not _init(nn.Embedding(4, 4), emb_init_std=0.0).weight.any()
    with pytest.warns(UserWarning, match='both limits are 0.5, so the embeddings are constant'):
        _init(nn.Embedding(4, 4), emb_init_uniform_lim=[0.5, 0.5])
    with pytest.raises(ValueError) as error:
        _init(nn.Embedding(4, 4), emb_init_uniform_lim=[0.1, 0.2, 0.3])
    assert str(error.value) == 'init_config.emb_init_uniform_lim must be a number or [low, high], got [0.1, 0.2, 0.3]'


# Fused, stacked and nested weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['kaiming_normal_', 'xavier_uniform_', 'kaiming_uniform_', 'small_init_'])
@pytest.mark.parametrize('fan_mode', ['fan_in', 'fan_out'])
def test_fusing_does_not_change_the_statistics_of_a_head(name: str, fan_mode: str) -> None:
    head_dim, n_heads = 32, 6
    fused = nn.Linear(D, head_dim * n_heads)
    fused._fused = (0, [head_dim * i for i in range(1, n_heads)])
    config = {'fan_mode': fan_mode, 'init_gain': 1.0}
    one_head = _init(nn.Linear(D, head_dim), name, **config).weight
    slices = _init(fused, name, **config).weight.split(head_dim)
    assert torch.equal(slices[0], one_head)
    for weight in slices:
        assert weight.std().item() == pytest.approx(one_head.std().item(), rel=0.05)
    if name.startswith('xavier') or fan_mode == 'fan_out' and name.startswith('kaiming'):
        whole = _init(nn.Linear(D, head_dim * n_heads), name, **config).weight
        assert whole.std().item() < 0.95 * one_head.std().item()


def test_fused_residual_projection_is_divided_once() -> None:
    fused, plain = _residual(), nn.Linear(D, D)
    for layer in (fused, plain):
        layer._fused = (1, [100])
    torch.testing.assert_close(_init(fused).weight * math.sqrt(2 * N_LAYERS), _init(plain).weight)


def test_helpers_hand_out_each_slice_once() -> None:
    seen: list[tuple[int, ...]] = []

    def note(weight: torch.Tensor) -> None:
        seen.append(tuple(weight.shape))
        weight.fill_(len(seen))

    param = nn.Parameter(torch.zeros(4, 6))
    fused_param_init_helper(param, note, (1, [1, 3]))
    assert seen == [(4, 1), (4, 2), (4, 3)] and param[0].tolist() == [1, 2, 2, 3, 3, 3]
    seen.clear()
    stacked = nn.Parameter(torch.zeros(2, 3, 4))
    stacked_param_init_helper(stacked, note, 1)
    assert seen == [(2, 4)] * 3 and stacked[0, :, 0].tolist() == [1, 2, 3]
    assert param.requires_grad and param.grad_fn is None


def test_attention_of_torch_is_initialised_by_projection() -> None:
    attention = nn.MultiheadAttention(D, 4)
    attention.out_proj._is_residual = True
    _init(attention, 'xavier_normal_')
    expected = math.sqrt(2 / (2 * D))
    assert [w.std().item() for w in attention.in_proj_weight.split(D)] == pytest.approx([expected] * 3, rel=0.02)
    assert attention.out_proj.weight.std().item() == pytest.approx(expected / 4, rel=0.02)
    assert not attention.in_proj_bias.any() and not attention.out_proj.bias.any()
    split = _init(nn.MultiheadAttention(D, 4, kdim=64, vdim=64, add_bias_kv=True), 'xavier_normal_')
    assert split.k_proj_weight.std().item() == pytest.approx(math.sqrt(2 / (D + 64)), rel=0.02)
    assert not split.bias_k.any()


@pytest.mark.parametrize('mlp_type', ['mlp', 'glu'])
def test_experts_are_initialised_one_by_one_with_their_own_fan(mlp_type: str) -> None:
    moe_config = {**MOE, 'mlp_type': mlp_type}
    moe = build_ffn('torch_dmoe', D, 2, 'cpu', True, moe_config)
    nn.init.normal_(moe.experts.bias)
    _init(moe, 'kaiming_normal_', init_nonlinearity='linear')
    mlp = moe.experts.mlp
    for name in ('w1', 'v1') if mlp_type == 'glu' else ('w1',):
        assert [w.std().item() for w in getattr(mlp, name).split(2 * D)] == pytest.approx([D**-0.5] * 4, rel=0.02)
    assert [w.std().item() for w in mlp.w2.split(2 * D)] == pytest.approx([(2 * D) ** -0.5 / 4] * 4, rel=0.02)
    assert moe.router.layer.weight.std().item() == pytest.approx(D**-0.5, rel=0.1)
    assert not moe.experts.bias.any()
    xavier = _init(build_ffn('torch_dmoe', D, 2, 'cpu', True, moe_config), 'xavier_normal_').experts.mlp.w1
    assert xavier.std().item() == pytest.approx(math.sqrt(2 / (3 * D)), rel=0.02)


def test_transformer_engine_mlp_is_known_by_its_parameters() -> None:
    module = nn.Module()
    for name, shape in {'layer_norm_weight': 8, 'layer_norm_bias': 8, 'fc1_weight': (D, D), 'fc1_bias': 8, 'fc2_weight': (D, D), 'fc2_bias': 8}.items():
        module.register_parameter(name, nn.Parameter(torch.full((shape,) if isinstance(shape, int) else shape, 5.0)))
    _init(module, 'baseline_', init_std=1.0)
    assert (module.layer_norm_weight == 1).all() and not any(p.any() for p in (module.layer_norm_bias, module.fc1_bias, module.fc2_bias))
    assert module.fc1_weight.std().item() == pytest.approx(1, rel=0.02) and module.fc2_weight.std().item() == pytest.approx(1 / 4, rel=0.02)


# Errors, extension, meta device ---------------------------------------------------------------------------------------------------------


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.ones(3))


def test_a_module_that_no_rule_knows() -> None:
    with pytest.raises(NotImplementedError) as error:
        _init(nn.Sequential(nn.Linear(2, 2), _Own()))
    assert str(error.value) == (
        '_Own holds parameters (gate) that no module_init_fn initialises. Known: fc, embedding, norm, multihead_attention, te_layernorm_mlp, moe. '
        'Register one for it: llmfoundry.registry.module_init_fns.register(name, func=rule).'
    )


def test_a_registered_rule_handles_it_and_knows_the_settings() -> None:
    def rule(module: nn.Module, init_fn_, d_model: int, div_is_residual: float, **kwargs: object) -> bool:
        if not isinstance(module, _Own):
            return False
        module.gate.data.fill_(d_model * div_is_residual)
        return True

    with registry.save_registry():
        registry.module_init_fns.register('own', func=rule)
        assert _init(_Own(), d_model=10).gate.tolist() == [40.0] * 3


def test_config_errors() -> None:
    with pytest.raises(ValueError, match="init_config needs the key 'name', got {'init_std': 1}. Available names: baseline_, default_"):
        get_param_init_fn({'init_std': 1}, 1, 1)
    with pytest.raises(ValueError, match="Cannot find 'kaiming_' in the registry llmfoundry -> param_init_fns"):
        get_param_init_fn({'name': 'kaiming_'}, 1, 1)
    with pytest.raises(ValueError) as error:
        get_param_init_fn({'name': 'kaiming_normal_', 'init_gian': 1}, 1, 1)
    assert str(error.value) == "init_config.init_gian: unknown key (did you mean 'init_gain'?)"
    with pytest.raises(ValueError) as error:
        _init(nn.Linear(2, 2), 'baseline_')
    assert str(error.value) == 'init_config.init_std must be a number when init_config.name is baseline_, got None (0.02 is usual)'


def test_mpts_whole_init_config_is_accepted_by_every_name() -> None:
    """MPTConfig hands the keys of all functions to each; released configs add ``verbose``."""
    config = {
        'fan_mode': 'fan_in', 'init_nonlinearity': 'relu', 'init_div_is_residual': True, 'emb_init_std': None, 'emb_init_uniform_lim': None, 'init_std': 0.02,
        'init_gain': 0.0, 'verbose': 0,
    }  # fmt: skip
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), build_norm('layernorm', 8))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for name in NAMES:
            assert _init(model, name, **config)[1].weight.any()


def test_public_signature_of_rules_and_the_generic_function() -> None:
    layer = nn.Linear(3, 3)
    assert fc_init(module=layer, init_fn_=nn.init.ones_, init_div_is_residual=False, div_is_residual=1.0) and (layer.weight == 1).all()
    assert not fc_init(module=nn.ReLU(), init_fn_=nn.init.ones_)
    generic_param_init_fn_(layer, nn.init.zeros_, n_layers=2, d_model=3, init_div_is_residual=False, emb_init_std=None, emb_init_uniform_lim=None)
    assert not layer.weight.any()


@pytest.mark.parametrize('name', NAMES)
def test_a_model_from_the_meta_device_equals_one_from_the_cpu(name: str) -> None:
    def build(device: str) -> nn.Module:
        moe = build_ffn('torch_dmoe', 8, 2, device, True, MOE)
        return nn.Sequential(nn.Embedding(16, 8, device=device), build_mptmlp(8, 2, device=device), build_norm('rmsnorm', 8, 1e-5, device), moe)

    on_cpu, from_meta = build('cpu'), build('meta')
    from_meta.to_empty(device='cpu')
    for param in from_meta.parameters():
        param.data.fill_(float('nan'))
    _init(on_cpu, name, init_std=0.1)
    _init(from_meta, name, init_std=0.1)
    for (path, expected), param in zip(on_cpu.named_parameters(), from_meta.parameters(), strict=True):
        assert torch.equal(param, expected), path
