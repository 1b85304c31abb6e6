"""softmax(QK)V on every device: torch's scaled_dot_product_attention (SDPA) by the cheapest exact route, else a plain product.

Routes of ``attend``, first that fits:

1. *documents*: packed sequences on the CPU, one ``is_causal`` call per document: no score between documents is ever computed.
2. *causal*: no bias is needed, SDPA's own ``is_causal``.
3. *chunks*: alibi, sliding windows, padding inside the sequence, cached keys. Queries are cut in chunks of ``CPU_CHUNK`` and each meets only the
   keys that it may see. Causality, window and alibi depend on ``key - query`` alone, so one template (heads, chunk, seq) serves all chunks, layers and rows.
4. *eager*: logit softcap or wanted weights, which SDPA cannot give; the same chunks, recomputed in the backward pass.

Why chunks and not a full bias: B2 H12 T1024 D64 alibi, fp32, 1 CPU thread, forward + backward in ms: full bias 82 + 192, chunks of 128: 53 + 133, of 64: 49 + 154,
of 512: 66 + 153; SDPA ``is_causal`` without alibi: 57 + 141. Also tried: alibi folded into an extra feature of q and k (66 + 161, and wrong by 4e-5, the
rounding of ``slope * position``), and a hand-written forward and backward of batched products (75 + 148). The chunks also need 1/8 of the bias memory.

Shapes: b batch, h heads, g key/value heads, q query length, k key length, d head_dim.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

__all__ = ['AttentionMask', 'KernelOptions', 'attend']

CPU_CHUNK = 128
# Elsewhere kernels want more rows; two chunks at 2,048 tokens still skip a quarter of the scores and half of the bias memory.
OTHER_CHUNK = 1024


class AttentionMask:
    """Which keys a query may see, and alibi. One object serves all layers of a forward and caches what they share.

    A plain class and not a dataclass: sharded training casts tensors inside dataclass arguments to bf16, and biases must stay fp32.

    Attributes:
        is_causal: keys after the query are hidden; queries are the last ones of the keys.
        key_padding: (b, k) bool, False at keys to hide; None when causality already hides them.
        sequence_id: (b, k) document ids; keys of other documents are hidden. None when not packed.
        doc_lengths: lengths of the documents of all rows one after the other (sum b * k), if ids form runs; None to use ``sequence_id``.
        alibi_slopes: (h,) fp32, or None.
    """

    def __init__(
        self,
        is_causal: bool = True,
        key_padding: torch.Tensor | None = None,
        sequence_id: torch.Tensor | None = None,
        doc_lengths: list[int] | None = None,
        alibi_slopes: torch.Tensor | None = None,
    ) -> None:
        self.is_causal = is_causal
        self.key_padding = key_padding
        self.sequence_id = sequence_id
        self.doc_lengths = doc_lengths
        self.alibi_slopes = alibi_slopes
        self._template_len = 0
        self._cache: dict[tuple[object, ...], torch.Tensor] = {}

    def within_document(self) -> AttentionMask:
        """The mask between tokens of one document; it shares the cached templates."""
        inner = AttentionMask(self.is_causal, alibi_slopes=self.alibi_slopes)
        inner._template_len = max(self.doc_lengths or [0])
        inner._cache = self._cache
        return inner

    def template(self, rows: int, k_len: int, window: int, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Bias of ``rows`` consecutive queries as a function of ``key - query``: (1, h or 1, rows, k_len + rows).

        Column ``m`` of row ``r`` holds the bias at ``key - query = m - k_len - r``.
        """
        found = self._cache.get(('template', rows, window))
        if found is not None and found.shape[-1] - rows >= k_len:
            return found[..., found.shape[-1] - rows - k_len :]
        wanted, k_len = k_len, max(k_len, self._template_len)
        distance = torch.arange(-k_len, rows, device=device) - torch.arange(rows, device=device)[:, None]
        hidden = distance > 0 if self.is_causal else torch.zeros_like(distance, dtype=torch.bool)
        if window >= 0:
            hidden = hidden | (distance < -window) | (distance > window)
        bias = torch.zeros(1, 1, 1, 1, device=device) if self.alibi_slopes is None else self.alibi_slopes.float().view(1, -1, 1, 1)
        bias = (bias * -distance.abs()).masked_fill(hidden, float('-inf')).to(dtype)
        self._cache[('template', rows, window)] = bias
        return bias[..., k_len - wanted :]

    def chunk_bias(self, queries: tuple[int, int], keys: tuple[int, int], past: int, window: int, template: torch.Tensor) -> torch.Tensor:
        """Bias of the queries in a range (query 0 is position ``past``) over the keys in a range: (b or 1, h or 1, queries, keys)."""
        (start, stop), (first_key, last_key) = queries, keys
        k_len = template.shape[-1] - template.shape[-2]
        offset = k_len - past - start
        bias = template[..., : stop - start, offset + first_key : offset + last_key]
        if self.key_padding is None and self.sequence_id is None:
            return bias
        key = ('chunk', start, stop, first_key, last_key, past, window)
        if key not in self._cache:
            hidden = torch.zeros((), dtype=torch.bool, device=bias.device)
            if self.key_padding is not None:
                hidden = hidden | ~self.key_padding[:, None, None, first_key:last_key]
            if self.sequence_id is not None:
                ids = self.sequence_id
                hidden = hidden | (ids[:, None, past + start : past + stop, None] != ids[:, None, None, first_key:last_key])
            bias = bias.masked_fill(hidden, float('-inf'))
            if self.is_causal:
                # A padding query sees at least itself: a row without any key would be NaN and spread through the gradient.
                bias.diagonal(past + start - first_key, -2, -1).fill_(0.0)
            if bias.shape[1] > 1:
                return bias
            self._cache[key] = bias
        return self._cache[key]


@dataclass(frozen=True)
class KernelOptions:
    """What a layer adds to the mask.

    Attributes:
        scale: factor on the scores.
        window: a query sees itself and this many keys before it; -1 for all.
        softcap: c in ``c * tanh(scores / c)``, or None.
        dropout_p: dropout on the attention weights; 0 outside training.
        needs_weights: also return the weights.
    """

    scale: float
    window: int = -1
    softcap: float | None = None
    dropout_p: float = 0.0
    needs_weights: bool = False


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: AttentionMask,
    options: KernelOptions,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by the cheapest exact route; see the module docstring.

    Args:
        query: (b, h, q, d); the queries are the last ``q`` of the ``k`` positions.
        key: (b, g, k, d) with g dividing h.
        value: (b, g, k, d).

    Returns:
        Context (b, q, h * d), and the weights (b, h, q, k) if wanted.
    """
    batch, n_heads, q_len, head_dim = query.shape
    k_len = key.shape[2]
    if options.window >= k_len:
        options = _replace_window(options)
    is_eager = options.needs_weights or options.softcap is not None
    if mask.doc_lengths is not None and q_len == k_len and not options.needs_weights:
        return _attend_documents(query, key, value, mask, options), None
    is_plain = mask.key_padding is None and mask.sequence_id is None and mask.alibi_slopes is None and options.window < 0 and not is_eager
    if is_plain and (not mask.is_causal or q_len == k_len or q_len == 1):
        context = _sdpa(query, key, value, None, options, is_causal=mask.is_causal and q_len > 1)
        return context.transpose(1, 2).reshape(batch, q_len, n_heads * head_dim), None
    contexts, weights = _attend_chunks(query, key, value, mask, options)
    # Chunks come laid out as (b, q, h, d), so this is one copy; joined as (b, h, q, d) it would be two.
    context = torch.cat([chunk.transpose(1, 2) for chunk in contexts], dim=1)
    return context.reshape(batch, q_len, n_heads * head_dim), weights


def _replace_window(options: KernelOptions) -> KernelOptions:
    return KernelOptions(options.scale, -1, options.softcap, options.dropout_p, options.needs_weights)


def _attend_documents(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: AttentionMask, options: KernelOptions) -> torch.Tensor:
    """Attention within each document of packed rows, (b, q, h * d).

    Rows are laid end to end and split, not sliced: the gradient of a split is one concatenation, that of slices is one zero tensor each.
    """
    batch, n_heads, q_len, head_dim = query.shape
    inner = mask.within_document()
    documents = (x.transpose(1, 2).reshape(batch * q_len, x.shape[1], head_dim).split(mask.doc_lengths) for x in (query, key, value))
    contexts = [
        attend(q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], inner, options)[0][0]
        for q, k, v in zip(*documents, strict=True)
    ]
    return torch.cat(contexts).view(batch, q_len, n_heads * head_dim)


def _attend_chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: AttentionMask,
    options: KernelOptions,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Routes 3 and 4: contexts (b, h, chunk, d) of the chunks, and the weights if wanted."""
    q_len, k_len = query.shape[2], key.shape[2]
    past = k_len - q_len
    key, value = _repeat_heads(key, query.shape[1]), _repeat_heads(value, query.shape[1])
    is_cpu = query.device.type == 'cpu'
    is_chunked = mask.is_causal and not options.needs_weights
    # A power of two, so that packed documents of many lengths need few templates.
    rows = min(CPU_CHUNK if is_cpu else OTHER_CHUNK, 1 << (q_len - 1).bit_length()) if is_chunked else q_len
    # Only the CPU kernel takes an fp32 bias with bf16 queries; elsewhere one cast here serves all layers.
    template = mask.template(rows, k_len, options.window, query.device, torch.float32 if is_cpu else _compute_dtype(query))
    contexts: list[torch.Tensor] = []
    weights = None
    for start in range(0, q_len, rows):
        stop = min(start + rows, q_len)
        last_key = past + stop if mask.is_causal else k_len
        first_key = max(0, past + start - options.window) if options.window >= 0 and is_chunked else 0
        bias = mask.chunk_bias((start, stop), (first_key, last_key), past, options.window, template)
        parts = query[:, :, start:stop], key[:, :, first_key:last_key], value[:, :, first_key:last_key], bias
        if options.needs_weights:
            context, weights = _eager(*parts, options)
        elif options.softcap is not None:
            context = _checkpointed_eager(*parts, options)
        else:
            context = _sdpa(*parts, options)
        contexts.append(context)
    return contexts, weights


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    options: KernelOptions,
    is_causal: bool = False,
) -> torch.Tensor:
    """SDPA, (b, h, q, d). Autocast is off inside, since it would round the bias to bf16."""
    dtype = _compute_dtype(query)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    kwargs: dict[str, bool] = {}
    if key.shape[1] != query.shape[1]:
        if query.is_cuda and bias is None:
            kwargs['enable_gqa'] = True
        else:
            key, value = _repeat_heads(key, query.shape[1]), _repeat_heads(value, query.shape[1])
    if bias is not None:
        bias = bias.expand(query.shape[0], query.shape[1], -1, -1)
    with torch.autocast(query.device.type, enabled=False):
        return F.scaled_dot_product_attention(query, key, value, bias, options.dropout_p, is_causal, scale=options.scale, **kwargs)


def _compute_dtype(query: torch.Tensor) -> torch.dtype:
    device = query.device.type
    return torch.get_autocast_dtype(device) if device != 'meta' and torch.is_autocast_enabled(device) else query.dtype


def _eager(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    options: KernelOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with all scores in memory, softmax in fp32: context (b, h, q, d) and weights (b, h, q, k)."""
    scores = torch.matmul(query * options.scale, key.transpose(-1, -2)).float()
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    weights = torch.softmax(scores + bias, dim=-1)
    dropped = F.dropout(weights, options.dropout_p) if options.dropout_p else weights
    return torch.matmul(dropped.to(value.dtype), value), weights


def _checkpointed_eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, options: KernelOptions) -> torch.Tensor:
    """``_eager`` whose scores are computed again in the backward pass instead of kept: they are h * k / d times the size of the output."""
    run = functools.partial(_eager_context, options=options)
    return checkpoint(run, query, key, value, bias, use_reentrant=False) if torch.is_grad_enabled() else run(query, key, value, bias)


def _eager_context(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, options: KernelOptions) -> torch.Tensor:
    return _eager(query, key, value, bias, options)[0]


def _repeat_heads(x: torch.Tensor, n_heads: int) -> torch.Tensor:
    """(b, g, k, d) -> (b, h, k, d). A view for one head; otherwise a copy, which on the CPU is cheaper than SDPA's ``enable_gqa`` (it drops to the math kernel)."""
    batch, n_kv_heads, k_len, head_dim = x.shape
    if n_kv_heads == n_heads:
        return x
    if n_kv_heads == 1:
        return x.expand(batch, n_heads, k_len, head_dim)
    return x[:, :, None].expand(batch, n_kv_heads, n_heads // n_kv_heads, k_len, head_dim).reshape(batch, n_heads, k_len, head_dim)
