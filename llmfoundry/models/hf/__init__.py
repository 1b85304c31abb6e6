"""Hugging Face models under Composer."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'BaseHuggingFaceModel': 'llmfoundry.models.composer_base',
        'ComposerHFCausalLM': 'llmfoundry.models.hf.causal_lm',
        'ComposerHFT5': 'llmfoundry.models.hf.t5',
    },
    ('hf_base', 'hf_causal_lm', 'hf_fsdp', 'hf_t5'),
)
