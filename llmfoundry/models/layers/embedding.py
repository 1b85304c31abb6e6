"""The token embedding whose weight can also serve as the output head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ['SharedEmbedding']


class SharedEmbedding(nn.Embedding):
    """An embedding that maps ids to vectors, or with ``unembed`` vectors to logits by the same weight.

    Doing both in this module's ``forward`` keeps the tied head right when the weight is sharded: the unsharding hooks sit on the module call.
    """

    def forward(self, input: torch.Tensor, unembed: bool = False) -> torch.Tensor:
        """Embeds or unembeds.

        Args:
            input: ids (batch, seq), or with ``unembed`` hidden states (..., embedding_dim).

        Returns:
            Vectors (batch, seq, embedding_dim), or logits (..., num_embeddings).
        """
        if unembed:
            return F.linear(input, self.weight)
        return super().forward(input)
