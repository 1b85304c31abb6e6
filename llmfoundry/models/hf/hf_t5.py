"""Import path of plug-ins for encoder-decoder language models."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'ComposerHFT5': 'llmfoundry.models.hf.t5',
    },
)
