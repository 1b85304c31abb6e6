"""LLM Foundry: pretrain, finetune, evaluate and export language models from one YAML.

Importing the package costs milliseconds: sub-packages and public names are imported at first access, so that command lines
answer at once and a machine without torch can still validate a config.
"""

from __future__ import annotations

from llmfoundry._version import __version__
from llmfoundry.lazy import lazy_exports

_NAMES = {
    'ComposerHFCausalLM': 'llmfoundry.models.hf.causal_lm',
    'ComposerMPTCausalLM': 'llmfoundry.models.mpt.composer_mpt',
    'DecoupledLionW': 'llmfoundry.optim.lion',
    'MPTConfig': 'llmfoundry.models.mpt.configuration_mpt',
    'MPTForCausalLM': 'llmfoundry.models.mpt.modeling_mpt',
    'MPTModel': 'llmfoundry.models.mpt.modeling_mpt',
    'MPTPreTrainedModel': 'llmfoundry.models.mpt.modeling_mpt',
    'StreamingFinetuningDataset': 'llmfoundry.data.finetuning.streaming_dataset',
    'StreamingTextDataset': 'llmfoundry.data.text_data',
}
_SUBMODULES = (
    'algorithms', 'callbacks', 'cli', 'command_utils', 'data', 'eval', 'interfaces', 'layers_registry', 'loggers', 'metrics', 'models', 'optim',
    'registry', 'tokenizers', 'tp', 'utils',
)

__getattr__, __dir__, _exported = lazy_exports(__name__, _NAMES, _SUBMODULES)
__all__ = ['__version__', *_exported]  # noqa: PLE0604
