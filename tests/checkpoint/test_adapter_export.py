"""Checkpoints of adapter runs become PEFT folders or merged models, by the converter and by the callback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmfoundry.callbacks import HuggingFaceCheckpointer
from llmfoundry.checkpoint.composer_to_hf import ExportOptions, convert_checkpoint
from llmfoundry.command_utils.inference.convert_composer_to_hf import main
from llmfoundry.errors import CheckpointError
from llmfoundry.models.hf.causal_lm import ComposerHFCausalLM
from tests.helpers.composer_checkpoints import gpt2_tokenizer, train
from tests.helpers.tiny_hf import save_model

PROBE = torch.tensor([[3, 5, 7, 11, 13]])
LORA = {'r': 2, 'lora_alpha': 8, 'target_modules': ['q_proj', 'v_proj'], 'init_lora_weights': False}


def run(tmp_path: Path, peft_config: dict[str, Any], vocab_size: int = 50304, callbacks: Any = (), **kwargs: Any) -> tuple[str, Path, torch.Tensor, Any]:
    """Base folder, checkpoint, logits of the trained model, and the model."""
    base = save_model(tmp_path / 'base', 'llama', vocab_size=vocab_size, max_position_embeddings=64)
    (tmp_path / 'base' / 'generation_config.json').write_text(json.dumps({'temperature': 0.6, 'top_k': 7, 'do_sample': True, 'eos_token_id': [1, 2]}))
    torch.manual_seed(0)
    model = ComposerHFCausalLM(gpt2_tokenizer(), base, peft_config=peft_config, use_train_metrics=False, **kwargs)
    done = train(model, tmp_path / 'run', callbacks=list(callbacks))
    with torch.no_grad():
        return base, done.path, model.model.eval()(input_ids=PROBE).logits, model


def adapter_logits(base: str, folder: Path, rows: int | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(folder)).eval()(PROBE).logits


def merged_logits(folder: Path) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not (info['missing_keys'] or info['unexpected_keys'] or info['mismatched_keys'])
    with torch.no_grad():
        return model.eval()(PROBE).logits


@pytest.mark.parametrize('only_adapter', [True, False])
def test_converter_writes_the_adapter_or_the_merged_model(only_adapter: bool, tmp_path: Path) -> None:
    base, checkpoint, want, _ = run(tmp_path, LORA, should_save_peft_only=only_adapter)
    convert_checkpoint(str(checkpoint), tmp_path / 'adapter')
    assert {'adapter_config.json', 'adapter_model.safetensors', 'tokenizer.json', 'generation_config.json'} <= {p.name for p in (tmp_path / 'adapter').iterdir()}
    assert not list((tmp_path / 'adapter').glob('model*.safetensors'))
    torch.testing.assert_close(adapter_logits(base, tmp_path / 'adapter'), want, rtol=0, atol=1e-6)

    if not only_adapter:  # then the checkpoint has all it takes
        (tmp_path / 'base' / 'model.safetensors').unlink()
    convert_checkpoint(str(checkpoint), tmp_path / 'merged', ExportOptions(merge_adapter=True))
    torch.testing.assert_close(merged_logits(tmp_path / 'merged'), want, rtol=1e-5, atol=1e-5)
    generation = json.loads((tmp_path / 'merged' / 'generation_config.json').read_text())
    assert (generation['temperature'], generation['top_k'], generation['eos_token_id']) == (0.6, 7, [50256, 1, 2])
    assert len(AutoTokenizer.from_pretrained(tmp_path / 'merged')) == 50257


def test_modules_to_save_are_in_checkpoints_and_exports(tmp_path: Path) -> None:
    """Composer's own filter keeps names with ``lora_`` alone, and loses the trained head."""
    base, checkpoint, want, model = run(tmp_path, {**LORA, 'modules_to_save': ['lm_head']})
    saved = torch.load(checkpoint, weights_only=False)['state']['model']
    assert [name for name in saved if 'modules_to_save' in name] == ['model.base_model.model.lm_head.modules_to_save.default.weight']
    assert len(saved) == 2 * 2 * 2 + 1
    convert_checkpoint(str(checkpoint), tmp_path / 'adapter')
    torch.testing.assert_close(adapter_logits(base, tmp_path / 'adapter'), want, rtol=0, atol=1e-6)
    convert_checkpoint(str(checkpoint), tmp_path / 'merged', ExportOptions(merge_adapter=True))
    torch.testing.assert_close(merged_logits(tmp_path / 'merged'), want, rtol=1e-5, atol=1e-5)


def test_embeddings_that_grew_for_the_tokenizer_come_along(tmp_path: Path) -> None:
    base, checkpoint, want, _ = run(tmp_path, LORA, vocab_size=50000, allow_embedding_resizing=True)
    assert want.shape[-1] == 50257
    saved = torch.load(checkpoint, weights_only=False)['state']['model']
    assert sum('embed_tokens' in name or 'lm_head' in name for name in saved) == 2
    convert_checkpoint(str(checkpoint), tmp_path / 'adapter')
    torch.testing.assert_close(adapter_logits(base, tmp_path / 'adapter', rows=50257), want, rtol=0, atol=1e-6)
    convert_checkpoint(str(checkpoint), tmp_path / 'merged', ExportOptions(merge_adapter=True))
    torch.testing.assert_close(merged_logits(tmp_path / 'merged'), want, rtol=1e-5, atol=1e-5)


def test_callback_writes_adapters_or_merged_models(tmp_path: Path) -> None:
    savers = [HuggingFaceCheckpointer(str(tmp_path / name), '2ba', precision=precision, merge_adapter=name == 'merged') for name, precision in (('adapter', 'bfloat16'), ('merged', 'float32'))]
    base, checkpoint, want, _ = run(tmp_path, LORA, callbacks=savers)
    adapter, merged = (tmp_path / name / 'huggingface' / 'ba2' for name in ('adapter', 'merged'))
    found = adapter_logits(base, adapter)
    assert 0 < (found - want).norm() < 2e-2 * want.norm(), 'rounded to bfloat16'
    torch.testing.assert_close(merged_logits(merged), want, rtol=1e-5, atol=1e-5)
    for folder in (adapter, merged):
        assert json.loads((folder / 'generation_config.json').read_text())['temperature'] == 0.6
        assert len(AutoTokenizer.from_pretrained(folder)) == 50257
    convert_checkpoint(str(checkpoint), tmp_path / 'converted', ExportOptions(precision='bf16'))
    assert (tmp_path / 'converted' / 'adapter_model.safetensors').read_bytes() == (adapter / 'adapter_model.safetensors').read_bytes()


def test_full_models_keep_their_generation_settings(tmp_path: Path) -> None:
    base = save_model(tmp_path / 'base', 'llama', vocab_size=50304, max_position_embeddings=64)
    (tmp_path / 'base' / 'generation_config.json').write_text(json.dumps({'temperature': 0.6, 'do_sample': True, 'repetition_penalty': 1.1, 'eos_token_id': [1, 2]}))
    model = ComposerHFCausalLM(gpt2_tokenizer(), base, use_train_metrics=False)
    done = train(model, tmp_path / 'run', callbacks=[HuggingFaceCheckpointer(str(tmp_path / 'hf'), '2ba')])
    convert_checkpoint(str(done.path), tmp_path / 'converted', ExportOptions(check_parity=False))
    for folder in (tmp_path / 'converted', tmp_path / 'hf' / 'huggingface' / 'ba2'):
        generation = json.loads((folder / 'generation_config.json').read_text())
        assert (generation['temperature'], generation['repetition_penalty'], generation['do_sample'], generation['use_cache']) == (0.6, 1.1, True, True)
        assert generation['eos_token_id'] == [50256, 1, 2]


def test_command_and_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, checkpoint, want, _ = run(tmp_path, LORA)
    (tmp_path / 'base').rename(tmp_path / 'moved')
    common = ['--composer_path', str(checkpoint), '--hf_output_path']
    assert main([*common, str(tmp_path / 'merged'), '--merge_adapter']) == 1
    assert f'The base model {base!r} is neither a local folder nor a repository' in capsys.readouterr().err
    assert main([*common, str(tmp_path / 'merged'), '--merge_adapter', '--base_model', str(tmp_path / 'moved')]) == 0
    torch.testing.assert_close(merged_logits(tmp_path / 'merged'), want, rtol=1e-5, atol=1e-5)
    assert main([*common, str(tmp_path / 'adapter')]) == 0
    assert 'adapter: load it with PeftModel.from_pretrained' in capsys.readouterr().out

    damaged = torch.load(checkpoint, weights_only=False)
    del damaged['state']['model']['model.base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight']
    torch.save(damaged, tmp_path / 'damaged.pt')
    with pytest.raises(CheckpointError, match=r'lacks weights of its adapter: base_model\.model\.model\.layers\.1\.self_attn\.q_proj\.lora_B\.default\.weight'):
        convert_checkpoint(str(tmp_path / 'damaged.pt'), tmp_path / 'out')
