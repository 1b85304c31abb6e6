"""The autograd function behind ``fused_linear_cross_entropy``: loss and gradients chunk by chunk.

For a token with hidden state h, target t and logits z = f(W h + b), the gradient of -log softmax(z)[t] with respect to z is
softmax(z) - onehot(t). It is computed in place of the logits of one chunk of tokens, and turned at once into the gradients of h, W and b.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ['ChunkedLinearCrossEntropy', 'HeadOptions']


@dataclass(frozen=True)
class HeadOptions:
    """Constants of the head.

    Attributes:
        logit_scale: factor on the logits.
        softcap: c in ``c * tanh(logits / c)``, or None.
        chunk_bytes: bytes of float32 logits alive at a time.
        grad_enabled: whether gradients are wanted at all (inside ``autograd.Function.forward`` grad mode is always off).
    """

    logit_scale: float
    softcap: float | None
    chunk_bytes: int
    grad_enabled: bool


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """``apply(hidden (n, d), weight (vocab, d), bias (vocab,) or None, targets (n,), rows (m,), options) -> (loss_sum, num_correct)``.

    ``rows`` are the positions that have a target.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        rows: torch.Tensor,
        options: HeadOptions,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = [needed and options.grad_enabled for needed in ctx.needs_input_grad[:3]]
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
        with torch.autocast(device_type, enabled=False):
            run = _Run(hidden, weight, bias, dtype, options, wanted)
            run.run(targets, rows)
        ctx.grads = run.grads
        ctx.mark_non_differentiable(run.num_correct)
        return run.loss_sum, run.num_correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError('fused_crossentropy cannot go backward twice through one forward pass; use loss_fn: torch_crossentropy for that.')
        # In place, and handed over: a copy of the head's gradient would raise peak memory exactly where it peaks.
        grads = [None if grad is None else grad.mul_(grad_loss) for grad in ctx.grads]
        ctx.grads = None
        return *grads, None, None, None


class _Run:
    """State of one pass over the chunks."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        options: HeadOptions,
        wanted: list[bool],
    ) -> None:
        self.hidden, self.weight, self.bias, self.options = hidden, weight, bias, options
        self.head = weight.to(dtype)
        self.dtype = dtype
        self.grad_hidden = torch.zeros_like(hidden) if wanted[0] else None
        # Sums over chunks are kept in float32 whatever the dtype of the products.
        self.grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if wanted[1] else None
        self.grad_bias = torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32)) if wanted[2] and bias is not None else None
        self.loss_sum = torch.zeros((), dtype=torch.float32, device=hidden.device)
        self.num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)

    @property
    def grads(self) -> tuple[torch.Tensor | None, ...]:
        """Gradients of hidden, weight and bias, in the dtype of each."""
        pairs = ((self.grad_hidden, self.hidden), (self.grad_weight, self.weight), (self.grad_bias, self.bias))
        return tuple(None if grad is None else grad.to(like.dtype) for grad, like in pairs)

    def run(self, targets: torch.Tensor, rows: torch.Tensor) -> None:
        num_rows = rows.numel()
        if num_rows == 0:
            return
        acc_dtype = torch.promote_types(self.dtype, torch.float32)
        chunk_rows = max(1, self.options.chunk_bytes // (4 * self.weight.shape[0]))
        num_chunks = -(-num_rows // chunk_rows)
        chunk_rows = -(-num_rows // num_chunks)  # even chunks: a short last one would run its products at a lower rate
        buffer = torch.empty(chunk_rows, self.weight.shape[0], dtype=acc_dtype, device=self.hidden.device)
        losses = torch.empty(num_rows, dtype=acc_dtype, device=self.hidden.device)
        for start in range(0, num_rows, chunk_rows):
            chunk = rows[start:start + chunk_rows]
            losses[start:start + chunk_rows] = self._chunk(chunk, targets[chunk], buffer[:chunk.numel()])
        self.loss_sum.copy_(losses.sum())

    def _chunk(self, rows: torch.Tensor, targets: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        """Losses (rows,) of one chunk; adds to the gradients. ``buffer`` (rows, vocab) holds logits, then log-probabilities, then their gradient."""
        hidden = self.hidden[rows].to(self.dtype)
        if self.options.logit_scale != 1.0 and self.bias is None:
            hidden = hidden * self.options.logit_scale
        slope = self._logits(hidden, buffer)
        self.num_correct += (buffer.argmax(-1) == targets).sum()
        _log_softmax_(buffer)
        losses = -buffer.gather(1, targets.unsqueeze(1)).squeeze(1)
        if self.grad_hidden is not None or self.grad_weight is not None or self.grad_bias is not None:
            buffer.exp_()
            buffer[torch.arange(rows.numel(), device=rows.device), targets] -= 1
            if slope is not None:
                buffer.mul_(slope)
            self._add_gradients(rows, hidden, buffer)
        return losses

    def _logits(self, hidden: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor | None:
        """Fills ``buffer`` with the logits; returns d logits / d (W h + b), elementwise, where it is not constant (softcap)."""
        if self.dtype == buffer.dtype:
            torch.mm(hidden, self.head.t(), out=buffer)
        else:
            buffer.copy_(torch.mm(hidden, self.head.t()))
        if self.bias is not None:
            buffer.add_(self.bias)
            if self.options.logit_scale != 1.0:
                buffer.mul_(self.options.logit_scale)
        if self.options.softcap is None:
            return None
        buffer.div_(self.options.softcap).tanh_()
        slope = 1 - buffer.square()
        buffer.mul_(self.options.softcap)
        return slope

    def _add_gradients(self, rows: torch.Tensor, hidden: torch.Tensor, grad_logits: torch.Tensor) -> None:
        scale = self.options.logit_scale
        if scale != 1.0 and self.bias is not None:
            grad_logits.mul_(scale)
        if self.grad_bias is not None:
            self.grad_bias += grad_logits.sum(0)
        grad_logits = grad_logits.to(self.dtype)
        if self.grad_hidden is not None:
            grad_hidden = torch.mm(grad_logits, self.head)
            if scale != 1.0 and self.bias is None:
                grad_hidden.mul_(scale)  # the scale sits in `hidden`, as its chain rule does here
            self.grad_hidden[rows] = grad_hidden.to(self.grad_hidden.dtype)
        if self.grad_weight is not None:
            if self.dtype == self.grad_weight.dtype:
                self.grad_weight.addmm_(grad_logits.t(), hidden)
            else:
                self.grad_weight += torch.mm(grad_logits.t(), hidden)


def _log_softmax_(logits: torch.Tensor) -> None:
    """Log-softmax over the last dimension, in place: torch's CPU kernel reads a row wholly before it writes it."""
    if logits.device.type == 'cpu':
        torch.log_softmax(logits, -1, out=logits)
    else:
        logits.copy_(torch.log_softmax(logits, -1))
