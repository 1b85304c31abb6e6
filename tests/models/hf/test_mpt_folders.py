"""Folders in the form of the released ``mosaicml/mpt-*`` models train as ``hf_causal_lm``: our classes, no remote code, the weights' own logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmfoundry.checkpoint.composer_to_hf import ExportOptions, convert_checkpoint
from llmfoundry.checkpoint.merge_adapter import merge_adapter
from llmfoundry.models.hf.causal_lm import ComposerHFCausalLM
from llmfoundry.models.mpt.modeling_mpt import MPTForCausalLM
from tests.helpers.composer_checkpoints import MPT_VARIANTS, VOCAB_SIZE, build_mpt, gpt2_tokenizer, train

PROBE = torch.tensor([[3, 5, 7, 11, 13, 2]])


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of ours, with the keys that released configs have besides."""
    base = tmp_path_factory.mktemp('mpt')
    run = train(build_mpt(gpt2_tokenizer(), **MPT_VARIANTS['alibi']), base / 'run')
    convert_checkpoint(str(run.path), base / 'mpt-7b', ExportOptions(check_parity=False))
    config = json.loads((base / 'mpt-7b' / 'config.json').read_text())
    assert config['model_type'] == 'mpt' and config['auto_map']['AutoModelForCausalLM'] == 'modeling_mpt.MPTForCausalLM'
    config['attn_config'].update(prefix_lm=False, attn_uses_sequence_id=False)
    (base / 'mpt-7b' / 'config.json').write_text(json.dumps({**config, 'tokenizer_name': 'EleutherAI/gpt-neox-20b', 'verbose': 0, 'torch_dtype': 'bfloat16'}))
    for path in (base / 'mpt-7b').glob('*.py'):  # whoever ran this code would notice
        path.write_text("raise RuntimeError('remote code was run')\n")
    return base / 'mpt-7b'


def stored_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return MPTForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()(PROBE).logits


def batch_of(**more: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 50257, (2, 12), generator=torch.Generator().manual_seed(0))
    return {'input_ids': ids, 'labels': ids.clone(), 'attention_mask': torch.ones_like(ids), **more}


def test_loads_through_our_classes(folder: Path) -> None:
    model = ComposerHFCausalLM(gpt2_tokenizer(), str(folder))
    assert type(model.model) is MPTForCausalLM and all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model.model.eval()(PROBE).logits, stored_logits(folder), rtol=0, atol=1e-6)
    batch = batch_of()
    logits = model.model(batch['input_ids'], attention_mask=batch['attention_mask']).logits
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch['labels'][:, 1:].flatten())
    model.train()
    assert model.loss(model(batch), batch).item() == pytest.approx(want.item(), rel=1e-5)
    assert model.flops_per_batch(batch) > 0


def test_packed_documents_do_not_see_each_other(folder: Path) -> None:
    model, batch = ComposerHFCausalLM(None, str(folder)).train(), batch_of()
    sequence_id = (torch.arange(12) >= 5).long().expand(2, -1)
    apart = [{key: value[:, part] for key, value in batch.items()} for part in (slice(0, 5), slice(5, 12))]
    outputs = [model(part)['loss'] for part in apart]
    labels = batch['labels'].clone()
    labels[:, 5] = -100
    packed = model({**batch, 'labels': labels, 'sequence_id': sequence_id})['loss']
    assert packed.num_targets == sum(output.num_targets for output in outputs)
    assert packed.loss_sum.item() == pytest.approx(sum(output.loss_sum.item() for output in outputs), rel=1e-5)


def test_overrides_reach_the_model_and_its_rules(folder: Path) -> None:
    model = ComposerHFCausalLM(None, str(folder), config_overrides={'max_seq_len': 20, 'attn_config': {'clip_qkv': 3}})
    assert model.config.max_seq_len == 20 and model.config.attn_config['clip_qkv'] == 3 and model.config.attn_config['alibi'] is True
    with pytest.raises(ValueError, match=r'config_overrides.attn_config: unknown keys \[.clip.\]'):
        ComposerHFCausalLM(None, str(folder), config_overrides={'attn_config': {'clip': 3}})
    with pytest.raises(ValueError, match=r'attn_config.attn_pdrop is a probability'):
        ComposerHFCausalLM(None, str(folder), config_overrides={'attn_config': {'attn_pdrop': 2}})


def test_an_adapter_trains_saves_merges(folder: Path, tmp_path: Path) -> None:
    lora = {'r': 2, 'target_modules': ['Wqkv', 'out_proj'], 'init_lora_weights': False}
    model = ComposerHFCausalLM(gpt2_tokenizer(), str(folder), peft_config=lora, use_train_metrics=False)
    run = train(model, tmp_path / 'run')
    convert_checkpoint(str(run.path), tmp_path / 'adapter')
    merge_adapter(str(folder), str(tmp_path / 'adapter'), tmp_path / 'merged')
    with torch.no_grad():
        want = model.model.eval()(input_ids=PROBE).logits
    assert (want - stored_logits(folder)).norm() > 1e-2 * want.norm()
    torch.testing.assert_close(stored_logits(tmp_path / 'merged'), want, rtol=1e-5, atol=1e-5)
    assert want.shape[-1] == VOCAB_SIZE
    with pytest.raises(ValueError, match='an adapter on the head or the embedding of an MPT would be passed over by its loss'):
        ComposerHFCausalLM(None, str(folder), config_overrides={'tie_word_embeddings': False}, pretrained=False, peft_config={'r': 2, 'target_modules': ['lm_head']})


def test_other_remote_code_needs_permission(tmp_path: Path) -> None:
    (tmp_path / 'config.json').write_text(json.dumps({
        'model_type': 'somebodys', 'auto_map': {'AutoConfig': 'theirs.Config', 'AutoModelForCausalLM': 'theirs.Model'}, 'architectures': ['Model'],
    }))
    (tmp_path / 'theirs.py').write_text("raise RuntimeError('remote code was run')\n")
    with pytest.raises(ValueError, match=r"brings its own Python code, which is not run unless you allow it. If you trust that code, set model.trust_remote_code: true"):
        ComposerHFCausalLM(None, str(tmp_path))
    with pytest.raises(RuntimeError, match='remote code was run'):
        ComposerHFCausalLM(None, str(tmp_path), trust_remote_code=True)
