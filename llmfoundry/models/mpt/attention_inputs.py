"""From the masks of a batch to what attention layers need: one ``AttentionInputs`` per forward.

The aim is to need no bias at all. Padding on the right needs none, since no real token comes before it; documents packed in a row need none on the CPU, where each is
attended on its own. Only padding on the left or inside, cached keys behind such padding, and packed rows on other devices lead to a bias. Deciding costs one look
at the mask's values per forward (one synchronisation on a GPU), which a bias in every layer would cost many times over.

Shapes: b batch, s new tokens, k cached and new tokens.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F

from llmfoundry.models.layers.attention_impls import is_flash_v2_installed
from llmfoundry.models.layers.attention_kernels import AttentionMask

__all__ = [
    'apply_sequence_id',
    'build_mask',
    'check_sequence_id',
    'gen_attention_mask_in_length',
    'gen_flash_attn_padding_info',
    'gen_position_ids',
    'gen_sequence_id_info',
    'is_left_padded',
    'positions_within_documents',
]


def is_left_padded(attention_mask: torch.Tensor) -> bool:
    """Whether any row of (b, k) that has real tokens begins with padding."""
    mask = attention_mask.bool()
    return bool((~mask[:, 0] & mask.any(dim=1)).any())


def is_right_padded_only(attention_mask: torch.Tensor) -> bool:
    """Whether every row of (b, k) is real tokens followed by padding, which causal attention never sees."""
    mask = attention_mask.bool()
    return bool((mask[:, :-1] | ~mask[:, 1:]).all())


def check_sequence_id(sequence_id: torch.Tensor | None, attn_uses_sequence_id: bool, seq_len: int, training: bool) -> torch.Tensor | None:
    """Returns the ids (b, k) to use, or None.

    Raises:
        ValueError: ids are missing in training, or of another length than the tokens.
    """
    if not attn_uses_sequence_id:
        if sequence_id is not None:
            warnings.warn(
                'sequence_id was given but is not used, since attn_config.attn_uses_sequence_id is false: packed documents attend to each other.'
            )
        return None
    if sequence_id is None:
        if training:
            raise ValueError(
                'sequence_id is None, but attn_config.attn_uses_sequence_id is true and the model is in training mode; '
                'let the data loader make it (dataset.eos_token_id or bos_token_id) or set attn_uses_sequence_id: false',
            )
        return None
    if sequence_id.shape[-1] != seq_len:
        raise ValueError(f'sequence_id has length {sequence_id.shape[-1]}, but there are {seq_len} tokens; they must be equal')
    return sequence_id


def build_mask(
    attention_mask: torch.Tensor | None,
    sequence_id: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
) -> AttentionMask:
    """The cheapest exact mask.

    Args:
        attention_mask: (b, k) bool, True at real tokens, or None.
        sequence_id: (b, k) document ids, or None.
        alibi_slopes: (h,), or None.
    """
    key_padding = None if attention_mask is None or is_right_padded_only(attention_mask) else attention_mask
    if sequence_id is None:
        return AttentionMask(key_padding=key_padding, alibi_slopes=alibi_slopes)
    lengths = document_lengths(sequence_id) if key_padding is None and sequence_id.device.type == 'cpu' else None
    return AttentionMask(key_padding=key_padding, sequence_id=sequence_id, doc_lengths=lengths, alibi_slopes=alibi_slopes)


def document_lengths(sequence_id: torch.Tensor) -> list[int] | None:
    """Lengths of the runs of equal ids of all rows one after the other; None if an id returns after another one, so that a document is no run."""
    lengths = run_lengths(sequence_id)
    n_documents = sum(row.unique().numel() for row in sequence_id)
    return lengths.tolist() if lengths.numel() == n_documents else None


def run_lengths(sequence_id: torch.Tensor) -> torch.Tensor:
    """(n,) int64 lengths of the runs of equal ids, one row after the other; padding counts as a run."""
    starts = _starts(sequence_id).flatten().nonzero().flatten()
    return F.pad(starts, (0, 1), value=sequence_id.numel()).diff()


def _starts(sequence_id: torch.Tensor) -> torch.Tensor:
    """(b, k) bool: where a document begins."""
    return torch.cat([torch.ones_like(sequence_id[:, :1], dtype=torch.bool), sequence_id[:, 1:] != sequence_id[:, :-1]], dim=1)


def positions_within_documents(sequence_id: torch.Tensor) -> torch.Tensor:
    """(b, k) positions that begin at 0 in every document, so that a packed document gets the positions that it has alone."""
    index = torch.arange(sequence_id.shape[1], device=sequence_id.device).expand_as(sequence_id)
    return index - torch.where(_starts(sequence_id), index, 0).cummax(dim=1).values


def gen_position_ids(
    past_len: int,
    seq_len: int,
    attention_mask: torch.Tensor | None,
    sequence_id: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Positions (1 or b, s) of the new tokens: from 0 in each document; padding before a token does not count."""
    if sequence_id is not None:
        return positions_within_documents(sequence_id)[:, past_len:]
    positions = torch.arange(past_len, past_len + seq_len, device=device)[None]
    if attention_mask is None:
        return positions
    padding_before = (~attention_mask.bool()).int().cumsum(dim=1)[:, past_len:]
    return (positions - padding_before).clamp(min=0)


def apply_sequence_id(attn_bias: torch.Tensor, sequence_id: torch.Tensor, max_seq_len: int) -> torch.Tensor:
    """Hides keys of other documents in an explicit bias.

    Args:
        attn_bias: (1 or b, h or 1, max_seq_len, max_seq_len).
        sequence_id: (b, s) with s at most ``max_seq_len``.
        max_seq_len: longest sequence.

    Returns:
        (b, h or 1, s, s), with the type's lowest value at hidden keys.

    Raises:
        ValueError: s is above ``max_seq_len``.
    """
    seq_len = sequence_id.shape[-1]
    if seq_len > max_seq_len:
        raise ValueError(f'sequence_id has length {seq_len}, which is above max_seq_len {max_seq_len}')
    attn_bias = attn_bias[..., :seq_len, :seq_len]
    hidden = (sequence_id[:, :, None] != sequence_id[:, None, :])[:, None]
    return attn_bias.masked_fill(hidden, torch.finfo(attn_bias.dtype).min)


def gen_attention_mask_in_length(
    sequence_id: torch.Tensor | None,
    S: int,  # noqa: N803
    attn_uses_sequence_id: bool,
    attn_impl: str,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor | None:
    """Lengths of the documents of each row, as flash-attn's ``unpad_input_for_concatenated_sequences`` takes them.

    Args:
        sequence_id: (b, S) ids 0, 1, ... in order; anything at padding.
        S: number of tokens in a row.
        attn_uses_sequence_id: whether documents are separated.
        attn_impl: only ``flash`` needs the lengths.
        attention_mask: (b, S), True at real tokens, which must be on the left.

    Returns:
        (b, S) int64, row by row the lengths and then zeros; None where they are not needed.

    Raises:
        ValueError: wrong length of ``sequence_id``.
        NotImplementedError: padding on the left.
    """
    if sequence_id is None or not attn_uses_sequence_id or attn_impl != 'flash':
        return None
    if attention_mask is not None and is_left_padded(attention_mask):
        raise NotImplementedError('attn_impl flash with attn_uses_sequence_id cannot take padding on the left; pad on the right')
    if sequence_id.shape[-1] != S:
        raise ValueError(f'sequence_id has length {sequence_id.shape[-1]}, but there are {S} tokens; they must be equal')
    document = _starts(sequence_id).long().cumsum(dim=1) - 1
    real = torch.ones_like(document) if attention_mask is None else attention_mask.long()
    return torch.zeros_like(document).scatter_add(1, document, real)


def gen_sequence_id_info(
    sequence_id: torch.Tensor | None,
    S: int,  # noqa: N803
    attn_uses_sequence_id: bool,
    attn_impl: str,
    attention_mask: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The lengths of ``gen_attention_mask_in_length``, and each token's position in its document (b, S) or None without ids."""
    lengths = gen_attention_mask_in_length(sequence_id, S, attn_uses_sequence_id, attn_impl, attention_mask)
    positions = positions_within_documents(sequence_id) if sequence_id is not None and attn_uses_sequence_id else None
    return lengths, positions


def gen_flash_attn_padding_info(
    bsz: int,
    S: int,  # noqa: N803
    past_key_len: int,
    device: torch.device,
    attention_mask_in_length: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Indices and cumulated lengths for flash-attn's variable-length kernels.

    Args:
        bsz: b.
        S: new tokens per row.
        past_key_len: cached tokens per row.
        device: of the batch.
        attention_mask_in_length: document lengths (b, S); only without cached tokens.
        attention_mask: (b, past_key_len + S), used when there are no document lengths.

    Returns:
        ``indices_q``, ``indices_k``, ``indices_v``: places of real tokens in the flattened batch; ``cu_seqlens_q``, ``cu_seqlens_k``: int32, from 0;
        ``max_seqlen_q``, ``max_seqlen_k``: ints.
    """
    if attention_mask_in_length is not None:
        real = torch.arange(S, device=device)[None] < attention_mask_in_length.sum(dim=1, keepdim=True)
        lengths_q = lengths_k = attention_mask_in_length[attention_mask_in_length > 0]
        query_real = key_real = real
    else:
        key_real = torch.ones(bsz, past_key_len + S, dtype=torch.bool, device=device) if attention_mask is None else attention_mask.bool()
        query_real = key_real[:, -S:]
        lengths_q, lengths_k = query_real.sum(dim=1), key_real.sum(dim=1)
    indices_k = key_real.flatten().nonzero().flatten()
    return {
        'indices_q': query_real.flatten().nonzero().flatten(),
        'indices_k': indices_k,
        'indices_v': indices_k,
        'cu_seqlens_q': F.pad(lengths_q.cumsum(0), (1, 0)).to(torch.int32),
        'cu_seqlens_k': F.pad(lengths_k.cumsum(0), (1, 0)).to(torch.int32),
        'max_seqlen_q': int(lengths_q.max()) if lengths_q.numel() else 0,
        'max_seqlen_k': int(lengths_k.max()) if lengths_k.numel() else 0,
    }


def flash_padding_info_for(
    attn_impl: str,
    shape: tuple[int, int, int],
    device: torch.device,
    attention_mask: torch.Tensor | None,
    sequence_id: torch.Tensor | None,
) -> dict[str, Any] | None:
    """``gen_flash_attn_padding_info`` where flash-attn will run and something is padded or packed, else None.

    Args:
        attn_impl: from the config.
        shape: b, s and the number of cached tokens.
        device: of the batch.
        attention_mask: (b, k), or None when nothing is padded.
        sequence_id: (b, k), or None.
    """
    if attn_impl != 'flash' or device.type != 'cuda' or not is_flash_v2_installed() or (attention_mask is None and sequence_id is None):
        return None
    batch, seq_len, past_len = shape
    lengths = gen_attention_mask_in_length(sequence_id, seq_len, sequence_id is not None, attn_impl, attention_mask)
    return gen_flash_attn_padding_info(batch, seq_len, past_len, device, lengths, attention_mask)
