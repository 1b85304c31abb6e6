"""Import path of plug-ins for the plain token datasets and for the encodings of token columns; see ``concat`` and ``text_data``."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'AbstractConcatTokensDataset': 'llmfoundry.data.concat',
        'ConcatTokensDataset': 'llmfoundry.data.concat',
        'NoConcatDataset': 'llmfoundry.data.concat',
        'SUPPORTED_MDS_ENCODING_TYPES': 'llmfoundry.data.text_data',
    },
)
