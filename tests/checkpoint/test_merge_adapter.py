"""merge_adapter: the merged model computes what base and adapter compute, and what does not belong together is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmfoundry.checkpoint import base_model
from llmfoundry.checkpoint import merge_adapter as merging
from llmfoundry.checkpoint.merge_adapter import MergeOptions, merge_adapter, parse_device_map
from llmfoundry.command_utils.merge_adapter import main
from llmfoundry.errors import AdapterMismatchError, CheckpointError, ParityError
from tests.helpers.composer_checkpoints import gpt2_tokenizer
from tests.helpers.tiny_hf import save_model

PROBE = torch.tensor([[3, 5, 7, 11, 13, 2]])
QV = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 8, 'target_modules': ['q_proj', 'v_proj']}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    'lora': ('llama', {}, QV),
    'lora_tied': ('llama', {'tie_word_embeddings': True}, QV),
    'dora': ('llama', {}, {**QV, 'use_dora': True}),
    'rslora_biases': ('phi', {}, {**QV, 'use_rslora': True, 'bias': 'all'}),
    'lora_conv1d': ('gpt2', {}, {'peft_type': 'LORA', 'r': 2, 'target_modules': ['c_attn', 'c_proj'], 'fan_in_fan_out': True}),
    'lora_all_linear': ('gpt_neox', {}, {'peft_type': 'LORA', 'r': 2, 'target_modules': 'all-linear'}),
    'lora_on_tied_head': ('llama', {'tie_word_embeddings': True}, {**QV, 'target_modules': ['q_proj', 'lm_head']}),
    'lora_on_embedding': ('llama', {'tie_word_embeddings': True}, {**QV, 'target_modules': ['embed_tokens']}),
    'saved_head_of_tied': ('llama', {'tie_word_embeddings': True}, {**QV, 'modules_to_save': ['lm_head']}),
    'saved_both': ('llama', {}, {**QV, 'modules_to_save': ['lm_head', 'embed_tokens']}),
    'ia3': ('llama', {}, {'peft_type': 'IA3', 'target_modules': ['k_proj', 'down_proj'], 'feedforward_modules': ['down_proj']}),
    'loha': ('llama', {}, {'peft_type': 'LOHA', 'r': 2, 'target_modules': ['q_proj', 'v_proj']}),
    'lokr': ('llama', {}, {'peft_type': 'LOKR', 'r': 2, 'target_modules': ['q_proj', 'v_proj']}),
    'oft': ('llama', {}, {'peft_type': 'OFT', 'r': 0, 'oft_block_size': 4, 'target_modules': ['q_proj']}),
    'vera': ('llama', {}, {'peft_type': 'VERA', 'r': 2, 'target_modules': ['q_proj', 'v_proj']}),
    'pissa': ('llama', {}, {**QV, 'init_lora_weights': 'pissa'}),
    'ln_tuning': ('llama', {}, {'peft_type': 'LN_TUNING'}),
}
# The last one because version 5 of transformers stores GPT-NeoX under other names than the model's.
WHOLE = {'oft', 'vera', 'pissa', 'ln_tuning', 'lora_all_linear'}


def make_adapter(base: str, folder: Path, config: dict[str, Any], std: float = 0.2) -> torch.Tensor:
    """Saves an adapter with random weights; returns the logits of base and adapter by PEFT alone."""
    import peft

    options = dict(config)
    kind = options.pop('peft_type', 'LORA')
    torch.manual_seed(1)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32),
        peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[getattr(peft.PeftType, kind)](task_type='CAUSAL_LM', **options),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)
    model.save_pretrained(folder, save_embedding_layers=False)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32), str(folder)).eval()
    with torch.no_grad():
        return loaded(PROBE).logits


def logits_of(folder: Path | str) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, torch_dtype=torch.float32)
    assert not (info['missing_keys'] or info['unexpected_keys'] or info['mismatched_keys'])
    with torch.no_grad():
        return model.eval()(PROBE).logits


@pytest.mark.parametrize('case', sorted(CASES))
def test_merged_model_equals_base_and_adapter(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture, changes, config = CASES[case]
    base = save_model(tmp_path / 'base', architecture, **changes)
    want = make_adapter(base, tmp_path / 'adapter', config, std=1.0 if case in ('ia3', 'oft') else 0.2)
    if case not in WHOLE:
        monkeypatch.setattr(base_model.BaseModel, 'load', lambda self: pytest.fail('the whole model was loaded'))
    merge_adapter(base, str(tmp_path / 'adapter'), tmp_path / 'merged')
    found = logits_of(tmp_path / 'merged')
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, logits_of(base), rtol=0, atol=1e-3), 'the adapter must do something for this to mean anything'
    assert [p.name for p in (tmp_path / 'merged').glob('*.safetensors')] == ['model.safetensors'] and not list((tmp_path / 'merged').glob('*.bin'))


def test_precision_shards_and_config_follow_the_base(tmp_path: Path) -> None:
    base = save_model(tmp_path / 'fp32', 'llama')
    AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.bfloat16).save_pretrained(tmp_path / 'base', max_shard_size='3KB')
    assert len(list((tmp_path / 'base').glob('model-*.safetensors'))) > 1
    want = make_adapter(str(tmp_path / 'base'), tmp_path / 'adapter', QV)
    merge_adapter(str(tmp_path / 'base'), str(tmp_path / 'adapter'), tmp_path / 'merged', MergeOptions(max_shard_size='3KB'))
    assert len(list((tmp_path / 'merged').glob('model-*.safetensors'))) > 1
    with safe_open(next((tmp_path / 'merged').glob('*.safetensors')), 'pt') as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {'BF16'}
    assert AutoConfig.from_pretrained(tmp_path / 'merged').torch_dtype == torch.bfloat16
    assert (logits_of(tmp_path / 'merged') - want).norm() < 2e-2 * want.norm()
    merge_adapter(str(tmp_path / 'base'), str(tmp_path / 'adapter'), tmp_path / 'exact', MergeOptions(precision='fp32'))
    torch.testing.assert_close(logits_of(tmp_path / 'exact'), want, rtol=1e-5, atol=1e-5)


def test_tokenizer_generation_settings_and_licence_come_along(tmp_path: Path) -> None:
    base = Path(save_model(tmp_path / 'base', 'llama', vocab_size=50304))
    make_adapter(str(base), tmp_path / 'adapter', QV)
    tokenizer = gpt2_tokenizer()
    tokenizer.save_pretrained(base)
    (base / 'generation_config.json').write_text(json.dumps({'temperature': 0.6, 'top_p': 0.9, 'do_sample': True, 'eos_token_id': [1, 2], 'use_cache': False}))
    (base / 'LICENSE.txt').write_text('terms')
    (base / 'config.json').write_text(json.dumps({**json.loads((base / 'config.json').read_text()), 'note': 'kept'}))
    merge_adapter(str(base), str(tmp_path / 'adapter'), tmp_path / 'from_base')
    generation = json.loads((tmp_path / 'from_base' / 'generation_config.json').read_text())
    assert generation['temperature'] == 0.6 and generation['top_p'] == 0.9 and generation['use_cache'] is True
    assert generation['eos_token_id'] == [50256, 1, 2], "the tokenizer's end of text ends generation too, and the others still do"
    assert (tmp_path / 'from_base' / 'LICENSE.txt').read_text() == 'terms'
    assert json.loads((tmp_path / 'from_base' / 'config.json').read_text())['note'] == 'kept'
    assert AutoTokenizer.from_pretrained(tmp_path / 'from_base').get_vocab() == tokenizer.get_vocab()

    tokenizer.chat_template = '{{ messages }}'
    tokenizer.save_pretrained(tmp_path / 'adapter')
    merge_adapter(str(base), str(tmp_path / 'adapter'), tmp_path / 'from_adapter')
    assert AutoTokenizer.from_pretrained(tmp_path / 'from_adapter').chat_template == '{{ messages }}'
    merge_adapter(str(base), str(tmp_path / 'adapter'), tmp_path / 'asked_for', MergeOptions(tokenizer=str(base)))
    assert AutoTokenizer.from_pretrained(tmp_path / 'asked_for').chat_template is None


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    base = save_model(tmp_path / 'base', 'llama')
    make_adapter(base, tmp_path / 'adapter', QV)
    return base, str(tmp_path / 'adapter')


@pytest.mark.parametrize(('architecture', 'changes', 'found'), [
    ('llama', {'hidden_size': 32}, r'sizes differ: base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight \[2, 16\] instead of \[2, 32\]'),
    ('llama', {'num_hidden_layers': 1}, r'layers that this base does not have: base_model\.model\.model\.layers\.1'),
    ('llama', {'num_hidden_layers': 3}, r'layers without weights: base_model\.model\.model\.layers\.2'),
    ('gpt2', {}, r'Target modules .* not found.*Its linear layers are called c_attn, c_fc, c_proj, lm_head'),
])
def test_an_adapter_of_another_base_model_is_refused(architecture: str, changes: dict[str, Any], found: str, pair: tuple[str, str], tmp_path: Path) -> None:
    other = save_model(tmp_path / 'other' / 'base', architecture, **changes)
    with pytest.raises(AdapterMismatchError, match=rf"was made for another base model \(it names '{pair[0]}'\) than '{other}': .*{found}"):
        merge_adapter(other, pair[1], tmp_path / 'merged')
    assert not (tmp_path / 'merged').exists()


def test_a_base_of_another_name_needs_a_word(pair: tuple[str, str], tmp_path: Path) -> None:
    renamed = shutil.copytree(pair[0], tmp_path / 'renamed')
    with pytest.raises(AdapterMismatchError, match=r"it names '.*/base', and would be merged into '.*/renamed'.*--any_base"):
        merge_adapter(str(renamed), pair[1], tmp_path / 'merged')
    merge_adapter(str(renamed), pair[1], tmp_path / 'merged', MergeOptions(any_base=True))
    cached = shutil.copytree(pair[0], tmp_path / 'models--org--base' / 'snapshots' / 'abc')
    merge_adapter(str(cached), pair[1], tmp_path / 'merged2')


def test_nothing_is_left_of_a_merge_that_fails(pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError('no space left on device')

    monkeypatch.setattr(merging, 'write_model_card', fail)
    with pytest.raises(OSError, match='no space left'):
        merge_adapter(*pair, tmp_path / 'merged')
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    monkeypatch.undo()
    merge_adapter(*pair, tmp_path / 'merged')
    with pytest.raises(FileExistsError, match='exists already'):
        merge_adapter(*pair, tmp_path / 'merged')


def test_a_layer_that_merges_wrongly_is_caught(pair: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft

    right = peft.tuners.lora.layer.Linear.get_delta_weight
    monkeypatch.setattr(peft.tuners.lora.layer.Linear, 'get_delta_weight', lambda self, adapter: 1.1 * right(self, adapter))
    with pytest.raises(ParityError, match=r'layers\.0\.self_attn\.q_proj: after merging the output of the layer differs'):
        merge_adapter(*pair, tmp_path / 'merged')
    assert not (tmp_path / 'merged').exists()


def test_what_is_no_adapter_or_no_model(pair: tuple[str, str], tmp_path: Path) -> None:
    import peft

    with pytest.raises(ValueError, match='holds no PEFT adapter: a folder with adapter_config.json'):
        merge_adapter(pair[0], pair[0], tmp_path / 'merged')
    with pytest.raises(CheckpointError, match='has no config.json, so it is no model folder'):
        merge_adapter(pair[1], pair[1], tmp_path / 'merged')
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(pair[0]), peft.PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=2)).save_pretrained(tmp_path / 'prompt')
    with pytest.raises(ValueError, match='is a PROMPT_TUNING adapter: it learns a prompt, not weights, so it cannot be merged'):
        merge_adapter(pair[0], str(tmp_path / 'prompt'), tmp_path / 'merged')


def test_device_maps() -> None:
    assert str(parse_device_map('cpu')('model.layers.0')) == 'cpu'
    places = parse_device_map('{"": "cpu", "model.layers.1": 0}')
    assert [str(places(name)) for name in ('model.layers.0.q', 'model.layers.1.q', 'model.layers.10.q')] == ['cpu', 'cuda:0', 'cpu']
    for wrong in ('gpu', '{"": ', '[1]', '{"": "gpu"}'):
        with pytest.raises(ValueError, match='device_map: .* is not auto, cpu, cuda, or JSON'):
            parse_device_map(wrong)


def test_the_command(pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Document 003: ``merge_adapter basemodel peftmodel outpath [--tokenizer TOKENIZER] [--device_map DEVICE_MAP]``."""
    gpt2_tokenizer().save_pretrained(tmp_path / 'tokenizer')
    assert main([*pair, str(tmp_path / 'merged'), '--tokenizer', str(tmp_path / 'tokenizer'), '--device_map', '{"": "cpu"}']) == 0
    assert (tmp_path / 'merged' / 'tokenizer.json').exists() and f'Wrote {tmp_path / "merged"}' in capsys.readouterr().out
    assert main([*pair, str(tmp_path / 'merged')]) == 1
    assert capsys.readouterr().err.startswith('FileExistsError: The output folder')
