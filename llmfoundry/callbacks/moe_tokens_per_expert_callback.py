"""``mbmoe_tok_per_expert``: how evenly routers spread tokens over experts, for ours (``torch_dmoe``) and for megablocks' layers alike.

Both route in a module called LearnedRouter that returns the chosen experts, so the counts come from a forward hook there and megablocks need not be installed.
"""

from __future__ import annotations

from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import nn

__all__ = ['MoETokensPerExpert', 'spread']

ROUTER_CLASS = 'LearnedRouter'
# What the router returns: probabilities, weights, indices of the chosen experts (and logits, in later megablocks).
_INDICES = 2


class MoETokensPerExpert(Callback):
    """Logs mean, standard deviation, smallest and largest number of tokens per expert, and that of each expert.

    Keys: ``mb_moe/all_layers/{mean,std,min,max}_tokens_per_expert``; with ``log_every_layer`` also ``mb_moe/layer{n}/...`` and ``mb_moe/layer{n}/expert{e}_tokens``.

    Args:
        log_interval: batches between reports, each of the batch just trained.
        log_every_layer: report every layer too.
        all_reduce_stats: add the tokens of all ranks up; otherwise rank 0 reports its own.
        normalize: report shares of a layer's tokens, 1 / experts being even, instead of numbers.

    Raises:
        ValueError: an interval below 1; when training starts, a model without routers.
    """

    def __init__(self, log_interval: int = 10, log_every_layer: bool = False, all_reduce_stats: bool = False, normalize: bool = True) -> None:
        if log_interval < 1:
            raise ValueError(f'mbmoe_tok_per_expert.log_interval must be at least 1 batch, got {log_interval}')
        self.log_interval = log_interval
        self.log_every_layer = log_every_layer
        self.all_reduce_stats = all_reduce_stats
        self.normalize = normalize
        self._counts: list[torch.Tensor] = []  # one (experts,) for each layer
        self._is_counting = False

    def fit_start(self, state: State, logger: Logger) -> None:
        del logger
        routers = [module for module in state.model.modules() if type(module).__name__.endswith(ROUTER_CLASS)]  # FSDP2 prefixes the name
        if not routers:
            raise ValueError('callbacks.mbmoe_tok_per_expert: the model has no mixture of experts (model.ffn_config.ffn_type torch_dmoe, mb_moe or mb_dmoe). Remove the block.')
        self._counts = [torch.zeros(_num_experts(router), dtype=torch.int64) for router in routers]
        for layer, router in enumerate(routers):
            router.register_forward_hook(lambda _module, _inputs, outputs, layer=layer: self._count(layer, outputs[_INDICES]))

    def _count(self, layer: int, experts: torch.Tensor) -> None:
        # Activation checkpointing runs the forward pass again in the backward pass, which must not count twice.
        if self._is_counting and torch._C._current_graph_task_id() == -1:
            counts = self._counts[layer].to(experts.device)
            self._counts[layer] = counts + experts.detach().flatten().to(torch.int64).bincount(minlength=len(counts))

    def batch_start(self, state: State, logger: Logger) -> None:
        del logger
        self._is_counting = (int(state.timestamp.batch) + 1) % self.log_interval == 0
        if self._is_counting:
            self._counts = [torch.zeros_like(counts) for counts in self._counts]

    def after_train_batch(self, state: State, logger: Logger) -> None:
        if not self._is_counting:
            return
        self._is_counting = False
        counts = [c.to(state.device._device) for c in self._counts]
        if self.all_reduce_stats:
            for c in counts:
                dist.all_reduce(c, 'SUM')
        layers = [self._scaled(c) for c in counts]
        report = spread(torch.cat(layers), 'mb_moe/all_layers')
        if self.log_every_layer:
            for number, layer in enumerate(layers):
                report |= spread(layer, f'mb_moe/layer{number}')
                report |= {f'mb_moe/layer{number}/expert{expert}_tokens': value for expert, value in enumerate(layer.tolist())}
        logger.log_metrics(report)

    def _scaled(self, counts: torch.Tensor) -> torch.Tensor:
        return counts.double() / counts.sum().clamp(min=1) if self.normalize else counts.double()


def spread(counts: torch.Tensor, prefix: str) -> dict[str, float]:
    """Mean, standard deviation (of the population), smallest and largest value."""
    values = {'mean': counts.mean(), 'std': counts.std(correction=0), 'min': counts.min(), 'max': counts.max()}
    return {f'{prefix}/{name}_tokens_per_expert': float(value) for name, value in values.items()}


def _num_experts(router: nn.Module) -> int:
    layer: Any = router.layer
    return int(layer.out_features)
