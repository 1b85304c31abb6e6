"""Import path of plug-ins for the registry mechanism."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

_NAMES = {
    'TypedRegistry': 'llmfoundry.registry',
    'construct_from_registry': 'llmfoundry.registry',
    'create_registry': 'llmfoundry.registry',
    'import_file': 'llmfoundry.registry',
    'save_registry': 'llmfoundry.registry',
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _NAMES)
