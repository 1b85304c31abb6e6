"""Activation checkpointing without sharding: the same training, the same names in checkpoints and exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from tests.helpers.train_runs import make_data, run_config, tiny_config, train_losses


def _config(folder: Path, name: str, recompute: bool, **changes: Any) -> dict[str, Any]:
    config = tiny_config(folder / 'data', save_folder=str(folder / name), save_interval='3ba', fsdp_config={'activation_checkpointing': recompute}, **changes)
    config['model'] |= {'n_layers': 2, 'activation_checkpointing_target': {'ffn': 'last-1'}}
    return config


def test_one_process_recomputes_what_the_target_names(tmp_path: Path) -> None:
    """With dropout, whose draws the second forward pass has to repeat."""
    make_data(tmp_path / 'data')
    callbacks = {'hf_checkpointer': {'save_folder': str(tmp_path / 'hf'), 'save_interval': '6ba'}}
    kept = run_config(_config(tmp_path, 'kept', False))
    recomputed = run_config(_config(tmp_path, 'recomputed', True, callbacks=callbacks))
    assert not any(isinstance(m, CheckpointWrapper) for m in kept.state.model.modules())
    assert [n for n, m in recomputed.state.model.named_modules() if isinstance(m, CheckpointWrapper)] == ['model.transformer.blocks.1.ffn']
    assert train_losses(recomputed) == train_losses(kept)

    saved, reference = (torch.load(tmp_path / name / 'ep0-ba6-rank0.pt', weights_only=False)['state'] for name in ('recomputed', 'kept'))
    assert saved['model'].keys() == reference['model'].keys()
    assert all(torch.equal(saved['model'][name], reference['model'][name]) for name in reference['model'])
    assert saved['optimizers']['DecoupledAdamW']['state'].keys() == reference['optimizers']['DecoupledAdamW']['state'].keys()
    exported = next((tmp_path / 'hf').rglob('*.safetensors'))
    assert 'wrapped' not in exported.read_bytes()[:20000].decode('latin-1')

    # Either kind of run continues the other's checkpoint.
    for name, recompute in (('recomputed', False), ('kept', True)):
        continued = run_config({**_config(tmp_path, f'from {name}', recompute), 'load_path': str(tmp_path / name / 'ep0-ba3-rank0.pt')})
        assert train_losses(continued) == train_losses(kept)[3:]
