"""Data loaders, the datasets and collators behind them, and what they share."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'ConcatTokensDataset': 'llmfoundry.data.concat',
        'ConcatenatedSequenceCollatorWrapper': 'llmfoundry.data.text_collators',
        'LossGeneratingTokensCollatorWrapper': 'llmfoundry.data.batch_stats',
        'NoConcatDataset': 'llmfoundry.data.concat',
        'SUPPORTED_MDS_ENCODING_TYPES': 'llmfoundry.data.text_data',
        'StreamingTextDataset': 'llmfoundry.data.text_data',
        'build_dataloader': 'llmfoundry.data.dataloader',
        'build_finetuning_dataloader': 'llmfoundry.data.finetuning.dataloader',
        'build_text_dataloader': 'llmfoundry.data.text_data',
        'get_tokens_per_batch_func': 'llmfoundry.data.batch_stats',
    },
    ('batch_stats', 'concat', 'data', 'dataloader', 'finetuning', 'packing', 'streams', 'text_data', 'utils'),
)
