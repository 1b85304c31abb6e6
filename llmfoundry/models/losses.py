"""Every training loss: linear head and cross entropy in one, summed over tokens.

``fused_linear_cross_entropy`` never holds the (tokens, vocab) logits: it walks over the tokens in chunks, and computes each chunk's loss *and*
its gradients while the chunk's logits are still at hand, so the backward pass only multiplies by a scalar. Compared with logits followed by
``F.cross_entropy`` this saves several (tokens, vocab) float32 matrices and costs no extra matrix product. The price: the gradients of hidden
states and head live from forward to backward, and double backward is not offered. Recomputing the logits in the backward pass was dropped: it
saves that memory but costs one more product with the head, about 8 % of a step of MPT-125M.

Both losses return *sums* and counts, not means: the mean over tokens is exact for any split into microbatches and ranks only if it is taken once.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, Callable, NamedTuple

import torch
import torch.nn.functional as F

from llmfoundry.models.chunked_cross_entropy import ChunkedLinearCrossEntropy, HeadOptions

__all__ = ['CROSS_ENTROPY_IGNORE_INDEX', 'LOSS_FUNCTIONS', 'LossOutput', 'fused_linear_cross_entropy', 'get_loss_fn', 'head_logits', 'loss_from_logits', 'shift_labels', 'torch_linear_cross_entropy']

CROSS_ENTROPY_IGNORE_INDEX = -100

# Bytes of float32 logits alive at a time. On a CPU 96 MiB (about 500 tokens of GPT-2's vocabulary) is where the products reach their full rate;
# a GPU wants more rows per product to fill its multiprocessors.
DEFAULT_CHUNK_BYTES = {'cpu': 96 * 2**20, 'cuda': 768 * 2**20}


class LossOutput(NamedTuple):
    """What a loss function returns.

    A named tuple, so that DDP, FSDP and pytree utilities find the tensors inside a model's output.

    Attributes:
        loss_sum: float32 scalar with gradient, sum of -log p(target) in nats over all tokens that have a target.
        num_targets: int64 scalar, number of those tokens.
        num_correct: int64 scalar, number of those tokens whose target has the highest logit; None where the kernel does not report it.
    """

    loss_sum: torch.Tensor
    num_targets: torch.Tensor
    num_correct: torch.Tensor | None = None

    def mean(self) -> torch.Tensor:
        """Mean loss per token; 0 with a zero gradient, not NaN, if no token has a target."""
        return self.loss_sum / self.num_targets.clamp(min=1)


LossFn = Callable[..., LossOutput]


def shift_labels(labels: torch.Tensor, ignore_index: int = CROSS_ENTROPY_IGNORE_INDEX) -> torch.Tensor:
    """Targets of next-token prediction: ``targets[:, i] = labels[:, i + 1]``, nothing for the last position.

    Args:
        labels: (batch, seq) token ids, ``ignore_index`` where there is none.
    """
    return F.pad(labels[..., 1:], (0, 1), value=ignore_index)


def fused_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float | None = None,
    softcap: float | None = None,
    ignore_index: int = CROSS_ENTROPY_IGNORE_INDEX,
    chunk_bytes: int | None = None,
) -> LossOutput:
    """Cross entropy of ``softcap(logit_scale * (hidden @ weight.T + bias))`` without ever holding all logits.

    Tokens without a target cost nothing. Under autocast the products run in the autocast dtype; softmax, loss and the accumulation of the head's
    gradient stay in float32. On CUDA Liger's Triton kernel is used if it is installed and can express the arguments.

    Args:
        hidden: (..., d_model) last hidden states.
        weight: (vocab, d_model) weight of the head; may be the embedding itself (tied), may be a DTensor.
        targets: (...) int64 target of each position (already shifted), ``ignore_index`` for none.
        bias: (vocab,) or None.
        logit_scale: factor on the logits.
        softcap: c in ``c * tanh(logits / c)`` (Gemma 2, arXiv:2408.00118).
        chunk_bytes: bytes of float32 logits alive at a time; None picks a default for the device.

    Raises:
        ValueError: shapes do not fit, or softcap or chunk_bytes are not positive.
    """
    _check_shapes(hidden, weight, targets, softcap)
    if chunk_bytes is not None and chunk_bytes <= 0:
        raise ValueError(f'chunk_bytes={chunk_bytes} must be positive; leave it out for the default.')
    hidden, weight, targets, bias = _flatten(hidden, weight, targets, bias)
    if hidden.is_cuda and bias is None and _liger_function() is not None:
        return _liger_cross_entropy(hidden, weight, targets, logit_scale, softcap, ignore_index)
    chunk_bytes = chunk_bytes or DEFAULT_CHUNK_BYTES.get(hidden.device.type, DEFAULT_CHUNK_BYTES['cuda'])
    return _chunked(hidden, weight, bias, targets, HeadOptions(1.0 if logit_scale is None else logit_scale, softcap, chunk_bytes, torch.is_grad_enabled()), ignore_index)


@torch.compiler.disable
def _chunked(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, options: HeadOptions, ignore_index: int) -> LossOutput:
    """Runs the chunk loop outside of torch.compile, whose graphs cannot hold a loop of data-dependent length."""
    rows = (targets != ignore_index).nonzero().squeeze(-1)  # (tokens,) positions with a target
    loss_sum, num_correct = ChunkedLinearCrossEntropy.apply(hidden, weight, bias, targets, rows, options)
    return LossOutput(loss_sum, torch.tensor(rows.numel(), device=hidden.device), num_correct)


def torch_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float | None = None,
    softcap: float | None = None,
    ignore_index: int = CROSS_ENTROPY_IGNORE_INDEX,
) -> LossOutput:
    """The same loss by torch's own operators, with all logits in memory: the yardstick, and for anyone who needs autograd through everything.

    Arguments and result as in ``fused_linear_cross_entropy``.
    """
    _check_shapes(hidden, weight, targets, softcap)
    hidden, weight, targets, bias = _flatten(hidden, weight, targets, bias)
    return loss_from_logits(head_logits(hidden, weight, bias, logit_scale, softcap), targets, ignore_index)


def head_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    logit_scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """(..., vocab) logits ``softcap(logit_scale * (hidden @ weight.T + bias))``; arguments as in ``fused_linear_cross_entropy``."""
    logits = F.linear(hidden, _gather(weight), bias)
    if logit_scale is not None and logit_scale != 1.0:
        logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def loss_from_logits(logits: torch.Tensor, targets: torch.Tensor, ignore_index: int = CROSS_ENTROPY_IGNORE_INDEX) -> LossOutput:
    """The same loss from logits that exist already.

    Args:
        logits: (..., vocab).
        targets: (...) int64, already shifted.
        ignore_index: target of positions that have none.
    """
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss_sum = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction='sum')
    has_target = targets != ignore_index
    num_correct = ((logits.detach().argmax(-1) == targets) & has_target).sum()
    return LossOutput(loss_sum, has_target.sum(), num_correct)


LOSS_FUNCTIONS: dict[str, LossFn] = {
    'fused_crossentropy': fused_linear_cross_entropy,
    'torch_crossentropy': torch_linear_cross_entropy,
}


def get_loss_fn(name: str) -> LossFn:
    """The loss function that ``loss_fn: <name>`` of a model config asks for.

    Raises:
        ValueError: the name is not one of ``LOSS_FUNCTIONS``.
    """
    if name not in LOSS_FUNCTIONS:
        raise ValueError(f'loss_fn={name!r} is not known; choose one of: {", ".join(sorted(LOSS_FUNCTIONS))}.')
    return LOSS_FUNCTIONS[name]


def _check_shapes(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None) -> None:
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f'hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} do not fit: '
            'expected (..., d_model), (vocab, d_model) and (...).',
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f'softcap={softcap} must be positive; leave it out (null) for no cap.')


def _flatten(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(tokens, d_model), whole weight, (tokens,), whole bias: a head sharded by tensor parallelism is gathered, differentiably."""
    hidden, weight = _gather(hidden), _gather(weight)
    return hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), None if bias is None else _gather(bias)


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


@functools.lru_cache(maxsize=1)
def _liger_function() -> Any:
    """Liger's autograd function if it is installed and reports token accuracy, which our metrics need; else None."""
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return None
    known = inspect.signature(LigerFusedLinearCrossEntropyFunction.forward).parameters
    return LigerFusedLinearCrossEntropyFunction if {'accum_dtype', 'return_token_accuracy', 'softcap'} <= set(known) else None


@torch.compiler.disable
def _liger_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    logit_scale: float | None,
    softcap: float | None,
    ignore_index: int,
) -> LossOutput:
    if logit_scale is not None and logit_scale != 1.0:
        hidden = hidden * logit_scale
    options = {'ignore_index': ignore_index, 'reduction': 'sum', 'softcap': softcap, 'accum_dtype': torch.float32, 'return_token_accuracy': True}
    function = _liger_function()
    # autograd.Function.apply takes no keywords: fill the parameters (after ctx) up to the last one we set.
    parameters = list(inspect.signature(function.forward).parameters.values())[1:]
    given = {'_input': hidden, 'weight': weight, 'target': targets, **options}
    last = max(i for i, p in enumerate(parameters) if p.name in given)
    outputs = function.apply(*(given.get(p.name, p.default) for p in parameters[:last + 1]))
    num_targets = (targets != ignore_index).sum()
    num_correct = (outputs[2].detach() * num_targets).round().long()
    return LossOutput(outputs[0].float(), num_targets, torch.where(num_targets > 0, num_correct, 0))
