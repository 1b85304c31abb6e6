"""Tensor-parallel strategies."""

from llmfoundry.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(__name__, {'ffn_tp_strategy': 'llmfoundry.tp.ffn'}, ('ffn',))
