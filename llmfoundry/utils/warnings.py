"""Import path of plug-ins for ``llmfoundry.experimental``."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

_NAMES = {
    'ExperimentalWarning': 'llmfoundry.experimental',
    'VersionedDeprecationWarning': 'llmfoundry.experimental',
    'experimental_class': 'llmfoundry.experimental',
    'experimental_function': 'llmfoundry.experimental',
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _NAMES)
