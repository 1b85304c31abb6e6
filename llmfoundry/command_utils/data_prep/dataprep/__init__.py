"""``dataprep``: rows of input, contexts and response -> packed rows of token ids and labels, from one YAML."""

from __future__ import annotations

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        'DataprepConfig': 'llmfoundry.command_utils.data_prep.dataprep.config',
        'DataprepSummary': 'llmfoundry.command_utils.data_prep.dataprep.run',
        'dataprep': 'llmfoundry.command_utils.data_prep.dataprep.run',
        'load_dataprep_config': 'llmfoundry.command_utils.data_prep.dataprep.config',
        'pack_rows': 'llmfoundry.command_utils.data_prep.dataprep.packing',
    },
)
