"""Metrics that take logits or the loss itself."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'LanguageCrossEntropy': 'llmfoundry.metrics.language',
        'LanguagePerplexity': 'llmfoundry.metrics.language',
        'TokenAccuracy': 'llmfoundry.metrics.token_acc',
    },
)
