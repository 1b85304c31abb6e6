"""Import path of plug-ins for what Composer asks of a Hugging Face model before it shards it."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'prepare_hf_model_for_fsdp': 'llmfoundry.models.hf.fsdp',
        'rgetattr': 'llmfoundry.models.hf.fsdp',
        'rhasattr': 'llmfoundry.models.hf.fsdp',
    },
)
