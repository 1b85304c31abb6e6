"""Registries of the layers that MPT is built from.

Kept apart from ``registry`` because exported model folders carry this file: it may import the standard library only, and its
targets are relative to this package.
"""

from __future__ import annotations

from .typed_registry import TypedRegistry

__all__ = [
    'attention_classes',
    'attention_implementations',
    'fcs',
    'ffns',
    'ffns_with_megablocks',
    'ffns_with_norm',
    'module_init_fns',
    'norms',
    'param_init_fns',
]

norms = TypedRegistry(
    ('llmfoundry', 'norms'),
    generic_type='type[torch.nn.Module]',
    description='Normalisation layers, built as norm(normalized_shape, eps=..., device=...) with names compared in lower case.',
    builtins={
        'layernorm': '.models.layers.norm:LayerNorm',
        'low_precision_layernorm': '.models.layers.norm:LPLayerNorm',
        'rmsnorm': '.models.layers.norm:RMSNorm',
        'low_precision_rmsnorm': '.models.layers.norm:LPRMSNorm',
        'triton_rmsnorm': '.models.layers.norm:TritonRMSNorm',
    },
)

fcs = TypedRegistry(
    ('llmfoundry', 'fcs'),
    generic_type='type[torch.nn.Module]',
    description='Fully connected layers, built as fc(in_features, out_features, bias=..., device=..., **kwargs).',
    builtins={'torch': '.models.layers.fc:TorchLinear', 'te': '.models.layers.fc:TELinear'},
    requires={'te': 'transformer_engine'},
)

ffns = TypedRegistry(
    ('llmfoundry', 'ffns'),
    generic_type='Callable[..., torch.nn.Module]',
    description='Feed-forward blocks, built as ffn(d_model, expansion_ratio, device, bias, **kwargs).',
    builtins={
        'mptmlp': '.models.layers.ffn:build_mptmlp',
        'mptglu': '.models.layers.ffn:build_mptglu',
        'torch_dmoe': '.models.layers.ffn:build_torch_dmoe',
    },
)

ffns_with_norm = TypedRegistry(
    ('llmfoundry', 'ffns_with_norm'),
    generic_type='Callable[..., torch.nn.Module]',
    description='Feed-forward blocks that contain the norm before them, so that the block builds no norm_2.',
    builtins={'te_ln_mlp': '.models.layers.ffn_external:build_te_ln_mlp'},
    requires={'te_ln_mlp': 'transformer_engine'},
)

ffns_with_megablocks = TypedRegistry(
    ('llmfoundry', 'ffns_with_megablocks'),
    generic_type='Callable[..., torch.nn.Module]',
    description='Mixture-of-experts feed-forward blocks of the megablocks library.',
    builtins={'mb_moe': '.models.layers.ffn_external:build_mb_moe', 'mb_dmoe': '.models.layers.ffn_external:build_mb_dmoe'},
    requires={'mb_moe': 'megablocks', 'mb_dmoe': 'megablocks'},
)

attention_classes = TypedRegistry(
    ('llmfoundry', 'attention_classes'),
    generic_type='type[torch.nn.Module]',
    description='Attention modules: projections, positions, cache; they call an attention implementation.',
    builtins={
        'multihead_attention': '.models.layers.attention:MultiheadAttention',
        'multiquery_attention': '.models.layers.attention:MultiQueryAttention',
        'grouped_query_attention': '.models.layers.attention:GroupedQueryAttention',
    },
)

attention_implementations = TypedRegistry(
    ('llmfoundry', 'attention_implementations'),
    generic_type='Callable[..., tuple]',
    description='Functions that compute softmax(QK)V from projected query, key and value.',
    builtins={
        'torch': '.models.layers.attention:scaled_multihead_dot_product_attention',
        'flash': '.models.layers.attention:flash_attn_fn',
    },
)

param_init_fns = TypedRegistry(
    ('llmfoundry', 'param_init_fns'),
    generic_type='Callable[..., None]',
    description='Ways to initialise the parameters of a model, named by init_config.name.',
    builtins={
        name: f'.models.param_init:{name}'
        for name in (
            'default_',
            'baseline_',
            'kaiming_uniform_',
            'kaiming_normal_',
            'neox_init_',
            'small_init_',
            'xavier_uniform_',
            'xavier_normal_',
        )
    },
)

# Order matters: the first function that returns True has initialised the module.
module_init_fns = TypedRegistry(
    ('llmfoundry', 'module_init_fns'),
    generic_type='Callable[..., bool]',
    description='Initialisers of one kind of module each, tried in order; the first that returns True has handled the module.',
    builtins={
        'fc': '.models.param_init_rules:fc_init',
        'embedding': '.models.param_init_rules:embedding_init',
        'norm': '.models.param_init_rules:norm_init',
        'multihead_attention': '.models.param_init_rules:multihead_attention_init',
        'te_layernorm_mlp': '.models.param_init_rules:te_layernorm_mlp_init',
        'moe': '.models.param_init_rules:moe_init',
    },
)
