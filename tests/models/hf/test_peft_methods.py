"""Other PEFT methods than LoRA: trained by the Trainer, in checkpoints without the base model, resumed, exported, loaded by PEFT; and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llmfoundry.checkpoint.composer_to_hf import convert_checkpoint
from llmfoundry.errors import AdapterMismatchError, PackingNotSupportedError
from llmfoundry.models.hf.adapters import build_peft_config, is_same_base, supported_peft_types
from llmfoundry.models.hf.causal_lm import ComposerHFCausalLM
from tests.helpers.composer_checkpoints import train
from tests.helpers.tiny_hf import save_model

PROBE = torch.tensor([[3, 5, 7, 11, 13]])
QV = {'target_modules': ['q_proj', 'v_proj']}
METHODS: dict[str, dict[str, Any]] = {
    'IA3': {'target_modules': ['k_proj', 'down_proj'], 'feedforward_modules': ['down_proj']},
    'LOHA': {'r': 2, **QV}, 'LOKR': {'r': 2, **QV}, 'OFT': {'r': 0, 'oft_block_size': 4, **QV}, 'VERA': {'r': 2, **QV}, 'HRA': {'r': 2, **QV}, 'FOURIERFT': {'n_frequency': 8, **QV},
    'LN_TUNING': {}, 'TRAINABLE_TOKENS': {'token_indices': [3, 5]}, 'PROMPT_TUNING': {'num_virtual_tokens': 3}, 'P_TUNING': {'num_virtual_tokens': 3, 'encoder_hidden_size': 8},
    'PREFIX_TUNING': {'num_virtual_tokens': 3},
}


def build(base: str, method: str) -> ComposerHFCausalLM:
    torch.manual_seed(0)
    return ComposerHFCausalLM(None, base, peft_config={'peft_type': method.lower(), 'task_type': 'causal_lm', **METHODS[method]}, use_train_metrics=False)


@pytest.mark.parametrize('method', sorted(METHODS))
def test_trains_saves_resumes_and_exports(method: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / 'base', 'llama', vocab_size=50304, max_position_embeddings=64)
    model = build(base, method)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base_names = {name for name, _ in AutoModelForCausalLM.from_pretrained(base).named_parameters()}
    assert start and not any(name.replace('model.base_model.model.', '').replace('base_layer.', '') in base_names for name in start)
    whole = train(model, tmp_path / 'run', duration='4ba')
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])]
    assert moved, 'the step must change the adapter'
    with torch.no_grad():
        want = model.model.eval()(input_ids=PROBE).logits

    resumed = build(base, method)
    train(resumed, tmp_path / 'resumed', duration='4ba', load_path=str(tmp_path / 'run' / 'ep0-ba2-rank0.pt'))
    with torch.no_grad():
        torch.testing.assert_close(resumed.model.eval()(input_ids=PROBE).logits, want, rtol=0, atol=1e-6)

    convert_checkpoint(str(whole.path), tmp_path / 'adapter')
    assert json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())['base_model_name_or_path'] == base
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / 'adapter')).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=PROBE).logits, want, rtol=0, atol=1e-6)


def test_the_loss_of_virtual_tokens_is_that_of_peft(tmp_path: Path) -> None:
    model = build(save_model(tmp_path, 'llama'), 'PROMPT_TUNING')
    batch = {'input_ids': PROBE, 'labels': PROBE.clone(), 'attention_mask': torch.ones_like(PROBE)}
    assert model.loss(model(batch), batch).item() == pytest.approx(model.model(**batch).loss.item(), rel=1e-6)
    assert model._logits(batch).shape == (1, 5, 67), 'without those of the three virtual tokens'
    with pytest.raises(PackingNotSupportedError, match='the learned prompt stands before the first document of a row only'):
        model({**batch, 'sequence_id': torch.tensor([[0, 0, 1, 1, 1]])})


def test_training_goes_on_from_a_saved_adapter(tmp_path: Path) -> None:
    base = save_model(tmp_path / 'base', 'llama')
    first = ComposerHFCausalLM(None, base, peft_config={'r': 2, 'init_lora_weights': False, 'modules_to_save': ['lm_head'], **QV})
    first.model.save_pretrained(tmp_path / 'adapter')
    second = ComposerHFCausalLM(None, base, pretrained_lora_id_or_path=str(tmp_path / 'adapter'))
    assert second.state_dict().keys() == first.state_dict().keys()
    assert all(torch.equal(tensor, first.state_dict()[name]) for name, tensor in second.state_dict().items())
    assert {name for name, p in second.named_parameters() if p.requires_grad} == {name for name, p in first.named_parameters() if p.requires_grad}
    batch = {'input_ids': PROBE, 'labels': PROBE.clone()}
    assert second.loss(second(batch), batch).item() == pytest.approx(first.loss(first(batch), batch).item(), rel=1e-6)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base, wide, deep = (save_model(tmp_path / name, 'llama', **changes) for name, changes in (('base', {}), ('wide', {'hidden_size': 32}), ('deep', {'num_hidden_layers': 3})))
    ComposerHFCausalLM(None, base, peft_config={'r': 2, **QV}).model.save_pretrained(tmp_path / 'adapter')
    adapter = str(tmp_path / 'adapter')
    with pytest.raises(AdapterMismatchError, match=rf"The adapter '{adapter}' was made for another base model \(it names '{base}'\) than '{wide}': sizes differ: .*q_proj.lora_A.weight \[2, 16\] instead of \[2, 32\]"):
        ComposerHFCausalLM(None, wide, pretrained_lora_id_or_path=adapter)
    with pytest.raises(AdapterMismatchError, match=rf"than '{deep}': layers without weights: .*layers\.2"):
        ComposerHFCausalLM(None, deep, pretrained_lora_id_or_path=adapter)
    with pytest.raises(AdapterMismatchError, match='Target modules .* not found'):
        ComposerHFCausalLM(None, save_model(tmp_path / 'gpt2', 'gpt2'), pretrained_lora_id_or_path=adapter)
    with pytest.raises(ValueError, match=rf"'{base}' holds no PEFT adapter"):
        ComposerHFCausalLM(None, base, pretrained_lora_id_or_path=base)
    with pytest.raises(RuntimeError, match='does not hold the adapter of this model'):
        ComposerHFCausalLM(None, base, peft_config={'r': 2, 'target_modules': ['k_proj']}).load_state_dict(
            ComposerHFCausalLM(None, base, peft_config={'r': 2, **QV}).state_dict(),
        )


@pytest.mark.parametrize(('settings', 'message'), [
    ({'peft_config': {'r': 2}, 'pretrained_lora_id_or_path': 'x'}, 'set one of them'),
    ({'load_in_8bit': True}, 'load_in_8bit: true freezes the weights, so there is nothing to train'),
    ({'peft_config': {'r': 2, **QV}, 'init_device': 'meta', 'pretrained': False}, 'init_device: meta with an adapter'),
    ({'peft_config': {'r': 2, 'target_modules': ['query']}}, r"peft_config does not fit LlamaForCausalLM: Target modules .*query.* Its linear layers are called down_proj, .*q_proj"),
    ({'peft_config': {'r': 2, 'init_lora_weights': 'eva', **QV}}, 'init_lora_weights: eva needs a pass over the data'),
    ({'peft_config': {'peft_type': 'xlora'}}, 'XLORA cannot be trained here: it mixes adapters that are trained already. Supported: .*LORA'),
])
def test_settings_that_cannot_work(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ComposerHFCausalLM(None, save_model(tmp_path, 'llama'), **settings)


def test_random_base_models_are_saved_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ComposerHFCausalLM(None, save_model(tmp_path, 'llama'), pretrained=False, peft_config={'r': 2, **QV})
    assert any('embed_tokens' in name for name in model.state_dict())
    assert 'should_save_peft_only: true has no effect with pretrained: false' in caplog.text


def test_names() -> None:
    assert {'LORA', 'IA3', 'PREFIX_TUNING'} <= set(supported_peft_types()) and 'ADALORA' not in supported_peft_types()
    assert build_peft_config({'r': 2}).peft_type == 'LORA'
    assert is_same_base('org/Model', '/data/model/') and is_same_base('/cache/models--org--Model/snapshots/1a2b', 'org/Model') and is_same_base(None, 'x')
    assert not is_same_base('org/Model', 'org/Model-Instruct')
