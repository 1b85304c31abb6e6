"""Import path of plug-ins for token counts, data specs and the replication check; see ``batch_stats``, ``dataloader``, ``streams`` and ``text_collators``."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'LossGeneratingTokensCollatorWrapper': 'llmfoundry.data.batch_stats',
        'get_data_spec': 'llmfoundry.data.dataloader',
        'get_text_collator': 'llmfoundry.data.text_collators:build_text_collator',
        'get_tokens_per_batch_func': 'llmfoundry.data.batch_stats',
        'validate_ds_replication': 'llmfoundry.data.streams',
    },
)
