"""Packed documents in a model that two processes share (FSDP2): gradients of separate documents, and ranks whose rows are not packed do not wait for the others."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import run_in_processes

# Rank 1 has one document per row, so it takes the route of unpacked batches.
LAYOUTS = (((7, 5, 1, 3), (4, 9)), ((20,), (11,)))


def _step(architecture: str, checkpoint: bool) -> dict[str, Any]:
    import torch.distributed as dist
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
    from torch.distributed.fsdp import fully_shard

    from llmfoundry.data.checks.packing_self_test import packing_self_test
    from llmfoundry.dist import fix_gloo_average
    from llmfoundry.models.hf.fsdp import find_decoder_layers
    from tests.helpers.packed_documents import VOCAB, gradients, packed_batch, separate_sums, tiny_model, total_of

    fix_gloo_average()
    model = tiny_model(Path(tempfile.mkdtemp()), architecture)
    batches = [packed_batch(layout, seed) for seed, layout in enumerate(LAYOUTS)]
    alone = [sum(separate_sums(model, batch)) for batch in batches]
    want = gradients(model, sum(alone) / len(alone))
    layers = list(find_decoder_layers(model.model))
    if checkpoint:
        apply_activation_checkpointing(model.model, check_fn=lambda module: module in layers)
    for layer in find_decoder_layers(model.model):
        fully_shard(layer)
    fully_shard(model.model)
    report = packing_self_test(model, VOCAB, 64, 'cpu')
    packed = total_of(model, batches[dist.get_rank()])
    packed.backward()
    got = {name.replace('_checkpoint_wrapped_module.', ''): p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    # What the parent process loads must not need classes of ours.
    return {'got': got, 'want': want, 'loss': packed.item(), 'alone': alone[dist.get_rank()].item(), 'routes': {k: tuple(v) for k, v in model._packing_routes.items()}, 'leak': report.leak}


@pytest.mark.world_size(2)
@pytest.mark.parametrize(('architecture', 'checkpoint'), [('llama', True), ('opt', False)])
def test_sharded(architecture: str, checkpoint: bool) -> None:
    from tests.helpers.packed_documents import worst_gradient

    for found in run_in_processes(_step, 2, architecture, checkpoint):
        assert found['loss'] == pytest.approx(found['alone'], rel=1e-5)
        assert worst_gradient(found['got'], found['want']) < 1e-4
        assert found['routes']['cpu'][0] in ('documents', 'block_mask') and found['leak'] == 0
