"""Callbacks for the `callbacks` block, one class per file."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'HuggingFaceCheckpointer': 'llmfoundry.callbacks.hf_checkpointer',
        'RunTimeoutCallback': 'llmfoundry.callbacks.run_timeout_callback',
    },
)
