"""Public import path of the mixture of experts, which lives in ``moe``."""

from llmfoundry.models.layers.moe import dMoE

__all__ = ['dMoE']
