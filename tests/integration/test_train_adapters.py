"""Adapter runs through the training command: saved in PEFT's format, loaded by PEFT alone, resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tiny_hf import save_model
from tests.helpers.train_runs import losses_in, make_data, run_config, start_training, tiny_config, train_losses

LORA = {'peft_type': 'LORA', 'task_type': 'CAUSAL_LM', 'r': 2, 'lora_alpha': 8, 'target_modules': ['q_proj', 'v_proj']}
SIZES = {'vocab_size': 50304, 'max_position_embeddings': 64}
PROBE = torch.tensor([[3, 5, 7, 11, 13]])


@pytest.fixture(scope='module')
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A base model and data."""
    folder = tmp_path_factory.mktemp('lora')
    return save_model(folder / 'base', 'llama', **SIZES), make_data(folder / 'data')


def lora_config(folders: tuple[str, Path], save_folder: Path | None, **model: Any) -> dict[str, Any]:
    base, data = folders
    saving = {} if save_folder is None else {'save_folder': str(save_folder), 'save_interval': '3ba', 'run_name': 'lora'}
    block = {'name': 'hf_causal_lm', 'pretrained_model_name_or_path': base, 'pretrained': True, 'peft_config': LORA, **model}
    return {**tiny_config(data), 'model': block, **saving}


def logits_from_adapter(base: str, adapter: Path) -> torch.Tensor:
    """What PEFT and transformers alone compute."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    with torch.no_grad():
        return model(PROBE).logits


def logits_of(trainer: Any) -> torch.Tensor:
    with torch.no_grad():
        return trainer.state.model.model.eval()(input_ids=PROBE).logits


def test_adapters_are_saved_with_every_checkpoint_and_load_without_extraction(folders: tuple[str, Path], tmp_path: Path) -> None:
    trainer = run_config(lora_config(folders, tmp_path))
    assert sorted(p.name for p in (tmp_path / 'adapter').iterdir()) == ['ba3', 'ba6']
    last = tmp_path / 'adapter' / 'ba6'
    assert {'adapter_config.json', 'adapter_model.safetensors', 'tokenizer.json', 'generation_config.json'} <= {p.name for p in last.iterdir()}
    want = logits_of(trainer)
    torch.testing.assert_close(logits_from_adapter(folders[0], last), want, rtol=0, atol=1e-6)
    assert not torch.allclose(logits_from_adapter(folders[0], tmp_path / 'adapter' / 'ba3'), want, atol=1e-4)


@pytest.mark.parametrize('only_adapter', [True, False])
def test_resumed_runs_repeat_the_losses(only_adapter: bool, folders: tuple[str, Path], tmp_path: Path) -> None:
    config = lora_config(folders, tmp_path / 'whole', should_save_peft_only=only_adapter)
    whole = run_config(config)
    saved = torch.load(tmp_path / 'whole' / 'ep0-ba3-rank0.pt', weights_only=False)['state']['model']
    assert any('embed_tokens' in name for name in saved) is not only_adapter and any('lora_B' in name for name in saved)
    resumed = run_config({**config, 'save_folder': str(tmp_path / 'resumed'), 'load_path': str(tmp_path / 'whole' / 'ep0-ba3-rank0.pt'), 'autoresume': False})
    assert train_losses(resumed) == train_losses(whole)[3:]
    assert torch.equal(logits_of(resumed), logits_of(whole))


def test_only_the_newest_adapters_are_kept(folders: tuple[str, Path], tmp_path: Path) -> None:
    run_config({**lora_config(folders, tmp_path), 'save_interval': '1ba', 'save_num_checkpoints_to_keep': 2})
    assert sorted(p.name for p in (tmp_path / 'adapter').iterdir()) == ['ba5', 'ba6']


@pytest.mark.parametrize('kind', ['full', 'sharded'])
def test_two_ranks_with_fsdp2(kind: str, folders: tuple[str, Path], tmp_path: Path) -> None:
    config = lora_config(folders, tmp_path / 'run' / 'save', init_device='mixed')
    config['fsdp_config'] = {'sharding_strategy': 'FULL_SHARD', 'state_dict_type': kind}
    assert start_training(config, tmp_path / 'run', ranks=2).wait(300) == 0, (tmp_path / 'run' / 'out.txt').read_text()[-3000:]
    alone = run_config(lora_config(folders, None))
    whole = losses_in(tmp_path / 'run')
    assert [whole[step] for step in range(6)] == pytest.approx(train_losses(alone), rel=1e-5)
    adapter = tmp_path / 'run' / 'save' / 'adapter'
    torch.testing.assert_close(logits_from_adapter(folders[0], adapter / 'ba6'), logits_of(alone), rtol=0, atol=1e-4)

    # Without the last checkpoint the run goes on from the one before.
    shutil.rmtree(adapter / 'ba6')
    for path in (tmp_path / 'run' / 'save').glob('*'):
        if 'ba6' in path.name or 'latest' in path.name:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (tmp_path / 'run' / 'metrics.jsonl').unlink()
    assert start_training(config, tmp_path / 'run', ranks=2).wait(300) == 0, (tmp_path / 'run' / 'out.txt').read_text()[-3000:]
    resumed = losses_in(tmp_path / 'run')
    assert sorted(resumed) == [3, 4, 5]
    assert [resumed[step] for step in (3, 4, 5)] == pytest.approx([whole[step] for step in (3, 4, 5)], rel=1e-6)
    assert (adapter / 'ba6' / 'adapter_model.safetensors').exists()
