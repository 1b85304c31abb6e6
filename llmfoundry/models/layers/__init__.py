"""The layers that MPT is built from, one concept per file."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'GroupedQueryAttention': 'llmfoundry.models.layers.attention',
        'LPLayerNorm': 'llmfoundry.models.layers.norm',
        'LPRMSNorm': 'llmfoundry.models.layers.norm',
        'MPTBlock': 'llmfoundry.models.layers.blocks',
        'MPTGLU': 'llmfoundry.models.layers.ffn',
        'MPTMLP': 'llmfoundry.models.layers.ffn',
        'MultiQueryAttention': 'llmfoundry.models.layers.attention',
        'MultiheadAttention': 'llmfoundry.models.layers.attention',
        'RMSNorm': 'llmfoundry.models.layers.norm',
        'build_alibi_bias': 'llmfoundry.models.layers.position',
    },
    ('attention', 'blocks', 'fc', 'ffn', 'layer_builders', 'norm', 'position'),
)
