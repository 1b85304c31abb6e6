"""Public import path of the initialisation functions, which live in ``param_init`` and ``param_init_rules``."""

from llmfoundry.models.param_init import generic_param_init_fn_
from llmfoundry.models.param_init_rules import (
    embedding_init,
    fc_init,
    fused_init_helper_,
    fused_param_init_helper,
    moe_init,
    multihead_attention_init,
    norm_init,
    stacked_param_init_helper,
    te_layernorm_mlp_init,
)

__all__ = [
    'embedding_init',
    'fc_init',
    'fused_init_helper_',
    'fused_param_init_helper',
    'generic_param_init_fn_',
    'moe_init',
    'multihead_attention_init',
    'norm_init',
    'stacked_param_init_helper',
    'te_layernorm_mlp_init',
]
