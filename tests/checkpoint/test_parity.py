"""The gate finds drift of every kind, and nothing that drifted stays behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmfoundry.checkpoint.composer_to_hf as composer_to_hf
from llmfoundry.checkpoint.parity import probe_batch
from llmfoundry.errors import ParityError
from tests.helpers.composer_checkpoints import TrainedRun


def _json_edit(name: str, **values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content.update(values)
        (folder / name).write_text(json.dumps(content))

    return edit


def _swap_heads(folder: Path) -> None:
    weights = load_file(folder / 'model.safetensors')
    name = 'transformer.blocks.1.attn.out_proj.weight'
    weights[name] = weights[name].roll(4, dims=1).contiguous()
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})


def _drop_weight(folder: Path) -> None:
    weights = load_file(folder / 'model.safetensors')
    del weights['transformer.norm_f.weight']
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})


def _break_code(folder: Path) -> None:
    (folder / 'norm.py').write_text('import llmfoundry\n')


DRIFT = {
    'one tensor': (_swap_heads, r'logits differ by up to'),
    'a lost weight': (_drop_weight, r'missing_keys: transformer\.norm_f\.weight'),
    'a changed setting': (_json_edit('config.json', logit_scale=2.0), r'logits differ by up to'),
    'code that needs llmfoundry': (_break_code, r'does not load or run in a process without llmfoundry'),
    'another eos': (_json_edit('generation_config.json', eos_token_id=7), r'generation_config\.eos_token_id is 7, the tokenizer has 50256'),
    'a chat template': (_json_edit('tokenizer_config.json', chat_template='{{ 1 }}'), r'tokenizer chat_template'),
}


@pytest.mark.parametrize('kind', list(DRIFT))
def test_drift_fails_the_gate_and_leaves_no_folder(kind: str, alibi_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tamper, text = DRIFT[kind]
    write_model_card = composer_to_hf.write_model_card

    def write_and_tamper(folder: Path, *args: Any, **kwargs: Any) -> None:
        write_model_card(folder, *args, **kwargs)
        tamper(folder)

    monkeypatch.setattr(composer_to_hf, 'write_model_card', write_and_tamper)
    with pytest.raises(ParityError, match=text):
        composer_to_hf.convert_checkpoint(str(alibi_run.path), tmp_path / 'hf')
    assert list(tmp_path.iterdir()) == []


def test_probe_is_fixed_covers_the_vocabulary_and_pads_on_the_left() -> None:
    one, two = probe_batch(1000), probe_batch(1000)
    assert torch.equal(one['input_ids'], two['input_ids'])
    assert int(one['input_ids'].max()) > 900 and int(one['input_ids'].min()) < 100
    assert one['attention_mask'][1, 0] == 0 and one['attention_mask'][:, -1].all()
    assert probe_batch(10, 4)['input_ids'].shape == (2, 2)
