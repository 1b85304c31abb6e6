"""Import path of plug-ins for the base of Composer models."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'BaseHuggingFaceModel': 'llmfoundry.models.composer_base',
    },
)
