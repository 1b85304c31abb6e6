"""Import path of plug-ins for helpers of data preparation."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'DownloadingIterable': 'llmfoundry.command_utils.data_prep.downloading',
        'merge_shard_groups': 'llmfoundry.command_utils.data_prep.convert_text_to_mds',
    },
)
