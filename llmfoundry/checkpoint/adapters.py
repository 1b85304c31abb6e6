"""Writes PEFT adapters in PEFT's own format: ``adapter_config.json`` and ``adapter_model.safetensors``, with tokenizer and generation settings beside them.

Only what is not the frozen base model is gathered from the ranks, so a save costs the size of the adapter, whatever the size of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping

import torch
from torch.distributed.tensor import DTensor

from llmfoundry.checkpoint.weights import cast
from llmfoundry.models.hf.adapters import RESIZED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmfoundry.models.composer_base import BaseHuggingFaceModel

__all__ = ['gather_adapter', 'write_adapter']


def gather_adapter(model: BaseHuggingFaceModel) -> dict[str, torch.Tensor]:
    """Everything of an adapted model that is not the frozen base model: name in the ``PeftModel`` -> whole tensor on the CPU. Every rank must call it."""
    weights = {}
    for name, tensor in model.adapter_state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        weights[name] = whole.detach().cpu()
    return weights


def write_adapter(
    folder: Path, model: Any, weights: Mapping[str, torch.Tensor], tokenizer: PreTrainedTokenizerBase | None = None, dtype: torch.dtype | None = None,
) -> None:
    """Writes the adapter of ``model`` into an existing folder.

    Args:
        folder: where to.
        model: the ``PeftModel``, whose config and base model's generation settings are written.
        weights: as ``gather_adapter`` gives them.
        tokenizer: saved with it.
        dtype: precision of the floating-point weights; None keeps theirs.
    """
    if dtype is not None:
        weights = {name: cast(name, tensor, dtype) for name, tensor in weights.items()}
    base = model.get_base_model()
    # 'auto', PEFT's default, asks the Hub for the base model's vocabulary.
    model.save_pretrained(folder, state_dict=dict(weights), save_embedding_layers=bool(getattr(base, RESIZED, False)))
    generation = getattr(base, 'generation_config', None)
    if generation is not None:
        generation.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
