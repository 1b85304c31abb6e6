"""Where metrics go, beside what Composer offers."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'JSONLLogger': 'llmfoundry.loggers.jsonl_logger',
    },
)
