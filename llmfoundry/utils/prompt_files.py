"""Import path of plug-ins for ``llmfoundry.command_utils.inference.prompts``."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

_NAMES = {
    'load_prompts': 'llmfoundry.command_utils.inference.prompts',
    'load_prompts_from_file': 'llmfoundry.command_utils.inference.prompts',
}

__getattr__, __dir__, __all__ = lazy_exports(__name__, _NAMES)
