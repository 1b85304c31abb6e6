"""Import paths of plug-ins: re-exports of what lives in other rooms, no logic."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'edit_files_for_hf_compatibility': 'llmfoundry.checkpoint.flatten_imports',
        'load_prompts': 'llmfoundry.command_utils.inference.prompts',
        'load_prompts_from_file': 'llmfoundry.command_utils.inference.prompts',
    },
    ('builders', 'config_utils', 'consts', 'exceptions', 'prompt_files', 'registry_utils', 'warnings'),
)
