"""Networks and losses."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'ComposerHFCausalLM': 'llmfoundry.models.hf.causal_lm',
        'ComposerMPTCausalLM': 'llmfoundry.models.mpt.composer_mpt',
        'MPTConfig': 'llmfoundry.models.mpt.configuration_mpt',
        'MPTForCausalLM': 'llmfoundry.models.mpt.modeling_mpt',
        'MPTModel': 'llmfoundry.models.mpt.modeling_mpt',
        'MPTPreTrainedModel': 'llmfoundry.models.mpt.modeling_mpt',
    },
    ('hf', 'layers', 'losses', 'mpt', 'utils'),
)
