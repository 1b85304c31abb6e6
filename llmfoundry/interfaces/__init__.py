"""Base classes for plug-ins."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'CallbackWithConfig': 'llmfoundry.interfaces.callback_with_config',
    },
)
