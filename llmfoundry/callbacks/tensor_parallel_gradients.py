"""The gradients of layers that are not split, averaged over the ranks of a tensor-parallel group too."""

from __future__ import annotations

from typing import Any

import torch
from composer import Callback, State
from composer.loggers import Logger
from composer.utils.misc import ParallelismType
from torch import distributed

__all__ = ['TensorParallelGradients']

TENSOR_PARALLEL = ParallelismType.TENSOR_PARALLEL.value


class TensorParallelGradients(Callback):
    """Averages over the group as gradients arrive, before anything (clipping, logging, the optimizer) sees them.

    Ranks of a group see different samples and hold the same copy of what is not split. FSDP2 averages over the other dimension of the mesh only, so without this the copies would drift apart.
    """

    def fit_start(self, state: State, logger: Logger) -> None:
        del logger
        group = state.device_mesh[TENSOR_PARALLEL].get_group()

        def average(parameter: Any) -> None:
            # Whatever earlier microbatches left there is equal on all ranks of the group, so that averaging it again changes nothing.
            local = parameter.grad.to_local() if hasattr(parameter.grad, 'to_local') else parameter.grad
            distributed.all_reduce(local, op=distributed.ReduceOp.SUM, group=group)
            local.div_(group.size())

        for parameter in state.model.parameters():
            if parameter.requires_grad and not _is_split(parameter):
                parameter.register_post_accumulate_grad_hook(average)


def _is_split(parameter: torch.Tensor) -> bool:
    mesh = getattr(parameter, 'device_mesh', None)
    return mesh is not None and TENSOR_PARALLEL in (mesh.mesh_dim_names or ())
