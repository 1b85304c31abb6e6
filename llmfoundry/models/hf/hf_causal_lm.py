"""Import path of plug-ins for Hugging Face causal language models."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'ComposerHFCausalLM': 'llmfoundry.models.hf.causal_lm',
    },
)
