"""Import path of plug-ins for constants."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

_NAMES = {
    'CROSS_ENTROPY_IGNORE_INDEX': 'llmfoundry.models.mpt.modeling_mpt',
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _NAMES)
