"""Mixture of experts in plain torch, dropless: every token reaches each of its top-k experts, whatever their load.

Tokens are sorted by expert and each expert multiplies its contiguous run, so the arithmetic is that of the chosen experts only and
no capacity has to be guessed. The alternative, megablocks' block-sparse kernels, is faster with many experts but needs CUDA.
Parameter names and shapes are those of megablocks' dMoE (router.layer, experts.mlp.{w1,v1,w2}, experts.bias), so weights can be exchanged.

Legend: T tokens (batch * seq), H hidden size, F hidden size of an expert, E experts, K experts per token.
"""

from __future__ import annotations

import functools
from typing import Callable

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ['DroplessExperts', 'ExpertGLU', 'ExpertMLP', 'LearnedRouter', 'MLP_TYPES', 'dMoE']

ActFn = Callable[[torch.Tensor], torch.Tensor]


class LearnedRouter(nn.Module):
    """Chooses and weighs the experts of each token: softmax over all experts, then the top k (https://arxiv.org/abs/1701.06538, without its noise).

    Args:
        hidden_size: width H of the tokens.
        moe_num_experts: E.
        moe_top_k: K.
        moe_jitter_eps: in training the router's input is multiplied by noise in [1 - eps, 1 + eps] (https://arxiv.org/abs/2101.03961); None or 0 is off.
        moe_normalize_expert_weights: p of the norm that divides the K weights of a token; None leaves them.
        uniform_expert_assignment: assigns experts in turn and ignores the router's choice, to measure balanced speed.
        device: where the weights live.
    """

    def __init__(
        self,
        hidden_size: int,
        moe_num_experts: int,
        moe_top_k: int,
        moe_jitter_eps: float | None,
        moe_normalize_expert_weights: float | None,
        uniform_expert_assignment: bool,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= moe_top_k <= moe_num_experts:
            raise ValueError(f'ffn_config.moe_top_k must lie in 1..moe_num_experts={moe_num_experts}, got {moe_top_k}')
        self.moe_num_experts = moe_num_experts
        self.moe_top_k = moe_top_k
        self.moe_jitter_eps = moe_jitter_eps
        self.moe_normalize_expert_weights = moe_normalize_expert_weights
        self.uniform_expert_assignment = uniform_expert_assignment
        self.layer = nn.Linear(hidden_size, moe_num_experts, bias=False, device=device)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Routes (..., H).

        Returns:
            The probabilities of all experts (T, E), the weights of the chosen ones (T, K) and their indices (T, K), int64.
        """
        if self.training and self.moe_jitter_eps:
            x = x * torch.empty_like(x).uniform_(1.0 - self.moe_jitter_eps, 1.0 + self.moe_jitter_eps)
        logits = self.layer(x.reshape(-1, x.shape[-1]))
        scores = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))  # (T, E)
        weights, experts = scores.topk(self.moe_top_k, dim=-1)  # (T, K)
        if self.moe_normalize_expert_weights:
            weights = weights / weights.norm(p=float(self.moe_normalize_expert_weights), dim=-1, keepdim=True)
        if self.uniform_expert_assignment:
            experts = torch.arange(experts.numel(), device=experts.device).remainder(self.moe_num_experts).view_as(experts)
        return scores.to(x.dtype), weights.to(x.dtype), experts


class ExpertMLP(nn.Module):
    """Stacked weights of E two-layer MLPs: expert e maps x to ``act_fn(x w1_e^T) w2_e``, with w1 and w2 of shape (E * F, H)."""

    weight_names = ('w1', 'w2')

    def __init__(self, hidden_size: int, ffn_hidden_size: int, moe_num_experts: int, activation_fn: ActFn, device: str | torch.device | None = None) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.ffn_hidden_size = ffn_hidden_size
        self.moe_num_experts = moe_num_experts
        self.activation_fn = activation_fn
        for name in self.weight_names:
            setattr(self, name, nn.Parameter(torch.empty(moe_num_experts * ffn_hidden_size, hidden_size, device=device)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises every expert's slice as ``torch.nn.Linear`` does: uniform within 1 / sqrt(fan_in)."""
        for name in self.weight_names:
            bound = (self.ffn_hidden_size if name == 'w2' else self.hidden_size) ** -0.5
            nn.init.uniform_(getattr(self, name), -bound, bound)

    def expert_weights(self) -> list[tuple[torch.Tensor, ...]]:
        """Each expert's own weights, all (F, H): views, split once for all experts so that the backward pass concatenates once."""
        return list(zip(*(getattr(self, name).split(self.ffn_hidden_size) for name in self.weight_names), strict=True))

    def apply_expert(self, x: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """One expert on its tokens, (n, H) -> (n, H)."""
        w1, w2 = weights
        return F.linear(self.activation_fn(F.linear(x, w1)), w2.t())


class ExpertGLU(ExpertMLP):
    """Stacked weights of E gated linear units: expert e maps x to ``(act_fn(x w1_e^T) * x v1_e^T) w2_e``."""

    weight_names = ('w1', 'v1', 'w2')

    def apply_expert(self, x: torch.Tensor, weights: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """One expert on its tokens, (n, H) -> (n, H)."""
        w1, v1, w2 = weights
        return F.linear(self.activation_fn(F.linear(x, w1)) * F.linear(x, v1), w2.t())


MLP_TYPES: dict[str, type[ExpertMLP]] = {'mlp': ExpertMLP, 'glu': ExpertGLU}


class DroplessExperts(nn.Module):
    """Sends tokens to their experts and adds up what comes back.

    Args:
        mlp: stacked weights of the experts.
        bias: whether one bias (H) is added to the sum.
        device: where the bias lives.
    """

    def __init__(self, mlp: ExpertMLP, bias: bool, device: str | torch.device | None = None) -> None:
        super().__init__()
        self.mlp = mlp
        if bias:
            self.bias = nn.Parameter(torch.zeros(mlp.hidden_size, device=device))
        else:
            self.register_parameter('bias', None)

    def reset_parameters(self) -> None:
        """Sets the bias to zero."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Computes ``sum_k weights[t, k] * expert[experts[t, k]](x[t])``.

        Args:
            x: tokens (..., H).
            weights: (T, K).
            experts: (T, K), int64.
        """
        shape, top_k = x.shape, experts.shape[-1]
        x = x.reshape(-1, shape[-1])  # (T, H)
        by_expert = experts.flatten().argsort(stable=True)  # (T * K), positions in (T, K) grouped by expert
        counts = experts.flatten().bincount(minlength=self.mlp.moe_num_experts).tolist()
        token_of = by_expert.div(top_k, rounding_mode='floor')
        runs = x[token_of].split(counts)
        parts = [self.mlp.apply_expert(run, w) for run, w in zip(runs, self.mlp.expert_weights(), strict=True)]
        outputs = torch.cat(parts)  # (T * K, H)
        outputs = outputs * weights.flatten()[by_expert].unsqueeze(-1).to(outputs.dtype)
        summed = torch.zeros_like(x, dtype=outputs.dtype).index_add(0, token_of, outputs).view(shape)
        return summed if self.bias is None else summed + self.bias.to(summed.dtype)


class dMoE(nn.Module):  # noqa: N801
    """Dropless mixture of experts, (..., H) -> (..., H).

    Args:
        hidden_size: H.
        ffn_hidden_size: F.
        moe_num_experts: E.
        moe_top_k: K.
        mlp_type: ``mlp`` or ``glu``.
        activation_fn: activation of the experts; exact GELU if None.
        moe_jitter_eps: see ``LearnedRouter``.
        moe_normalize_expert_weights: see ``LearnedRouter``.
        uniform_expert_assignment: see ``LearnedRouter``.
        bias: whether a bias (H) is added to the output.
        device: where the weights live.

    Raises:
        ValueError: an unknown ``mlp_type``, or ``moe_top_k`` outside 1..E.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        ffn_hidden_size: int = 4096,
        moe_num_experts: int = 1,
        moe_top_k: int = 1,
        mlp_type: str = 'mlp',
        activation_fn: ActFn | None = None,
        moe_jitter_eps: float | None = None,
        moe_normalize_expert_weights: float | None = None,
        uniform_expert_assignment: bool = False,
        bias: bool = True,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        if mlp_type not in MLP_TYPES:
            raise ValueError(f"ffn_config.mlp_type must be one of {', '.join(MLP_TYPES)}, got {mlp_type!r}")
        act_fn = activation_fn or functools.partial(F.gelu, approximate='none')
        self.router = LearnedRouter(hidden_size, moe_num_experts, moe_top_k, moe_jitter_eps, moe_normalize_expert_weights, uniform_expert_assignment, device)
        mlp = MLP_TYPES[mlp_type](hidden_size, ffn_hidden_size, moe_num_experts, act_fn, device)
        self.experts = DroplessExperts(mlp, bias, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., H)."""
        _, weights, experts = self.router(x)
        return self.experts(x, weights, experts)
