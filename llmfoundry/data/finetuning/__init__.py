"""Finetuning data: from rows of any form to batches in which exactly the wanted tokens are trained."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'Seq2SeqFinetuningCollator': 'llmfoundry.data.finetuning.collator',
        'build_finetuning_dataloader': 'llmfoundry.data.finetuning.dataloader',
        'dataset_constructor': 'llmfoundry.data.finetuning.tasks',
    },
    ('collator', 'dataloader', 'tasks'),
)
