"""Exported models compute what the trained ones compute, or there is no folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from llmfoundry.checkpoint.composer_to_hf import ExportOptions, convert_checkpoint
from llmfoundry.checkpoint.parity import compute_logits, probe_batch
from llmfoundry.errors import CheckpointError
from llmfoundry.models.mpt.modeling_mpt import MPTForCausalLM
from tests.helpers.composer_checkpoints import MPT_VARIANTS, VOCAB_SIZE, TrainedRun, build_mpt, gpt2_tokenizer, tiny_hf_gpt2, train

# A process of somebody else: no llmfoundry, another working directory.
FOREIGN = """
import sys, json, torch
sys.modules['llmfoundry'] = None
import transformers
folder = sys.argv[1]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
batch = tokenizer('It is a truth universally acknowledged', return_tensors='pt')
texts = [model.generate(**batch, max_new_tokens=6, do_sample=False, use_cache=c, pad_token_id=0)[0].tolist() for c in (True, False)]
model.save_pretrained(sys.argv[2]); tokenizer.save_pretrained(sys.argv[2])
again = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
same = torch.equal(again(**batch).logits, model(**batch).logits)
print(json.dumps({'texts': texts, 'class': type(model).__module__, 'same': same, 'llmfoundry': [m for m in sys.modules if m.startswith('llmfoundry.')]}))
"""


def assert_same_logits(folder: Path, run: TrainedRun, tolerance: float = 1e-5) -> None:
    """Compares with the logits of the model object that was trained, in this process, with the class of this package."""
    probe = probe_batch(VOCAB_SIZE, 40)
    cls = MPTForCausalLM if run.config['model_type'] == 'mpt' else transformers.AutoModelForCausalLM
    found = compute_logits(cls.from_pretrained(folder).float().eval(), probe)
    kept = probe['attention_mask'].bool()
    difference = (found - run.logits)[kept].abs().max().item()
    assert difference <= tolerance * max(1.0, run.logits[kept].abs().max().item())


@pytest.mark.parametrize('variant', list(MPT_VARIANTS))
def test_every_variant_of_mpt_survives_the_export(variant: str, tmp_path: Path) -> None:
    run = train(build_mpt(gpt2_tokenizer(), **MPT_VARIANTS[variant]), tmp_path / 'run')
    report = convert_checkpoint(str(run.path), tmp_path / 'hf')
    assert report is not None and report.max_logit_difference <= 1e-5 * max(1.0, report.largest_logit)
    assert report.largest_logit > 0.01
    assert report.facts['class'] == 'MPTForCausalLM'
    assert_same_logits(tmp_path / 'hf', run)
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    assert config['attn_config']['attn_impl'] == 'torch' and config['init_device'] == 'cpu'
    assert config['eos_token_id'] == 50256 and config['architectures'] == ['MPTForCausalLM']
    assert config['auto_map']['AutoModelForCausalLM'] == 'modeling_mpt.MPTForCausalLM'
    assert config.get('tie_word_embeddings', True) == run.config['tie_word_embeddings']
    names = set(load_file(tmp_path / 'hf' / 'model.safetensors'))
    assert ('lm_head.weight' in names) is not run.config['tie_word_embeddings']


def test_a_transformers_model_survives_the_export(tmp_path: Path) -> None:
    run = train(tiny_hf_gpt2(gpt2_tokenizer()), tmp_path / 'run')
    convert_checkpoint(str(run.path), tmp_path / 'hf')
    assert_same_logits(tmp_path / 'hf', run)
    assert not list((tmp_path / 'hf').glob('*.py'))
    assert 'lm_head.weight' not in load_file(tmp_path / 'hf' / 'model.safetensors'), 'a tied weight is stored once'
    assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['architectures'] == ['GPT2LMHeadModel']


def test_the_folder_works_without_llmfoundry(alibi_folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, 'HF_MODULES_CACHE': str(tmp_path / 'modules')}
    done = subprocess.run(
        [sys.executable, '-c', FOREIGN, str(alibi_folder), str(tmp_path / 'saved-again')], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result['texts'][0] == result['texts'][1], 'the cache changes the text'
    assert result['class'].startswith('transformers_modules.')
    assert result['llmfoundry'] == []
    assert result['same'], 'a model saved again by transformers is another model'


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_half_precisions_are_the_rounded_weights(precision: str, alibi_run: TrainedRun, tmp_path: Path) -> None:
    report = convert_checkpoint(str(alibi_run.path), tmp_path / 'hf', ExportOptions(precision=precision))
    assert report is not None and 1e-5 < report.rounding_rms < 0.05
    weights = load_file(tmp_path / 'hf' / 'model.safetensors')
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}[precision]
    assert {w.dtype for w in weights.values()} == {dtype}
    state = torch.load(alibi_run.path, weights_only=False)['state']['model']
    assert torch.equal(weights['transformer.wte.weight'], state['model.transformer.wte.weight'].to(dtype))
    assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['torch_dtype'] == str(dtype).removeprefix('torch.')


def test_weights_are_split_into_shards_that_load(alibi_run: TrainedRun, tmp_path: Path) -> None:
    convert_checkpoint(str(alibi_run.path), tmp_path / 'hf', ExportOptions(max_shard_size='20KB', check_parity=False))
    index = json.loads((tmp_path / 'hf' / 'model.safetensors.index.json').read_text())
    assert len(set(index['weight_map'].values())) > 1
    assert_same_logits(tmp_path / 'hf', alibi_run)


def test_the_tokenizer_comes_back_as_it_was(alibi_folder: Path) -> None:
    ours, theirs = gpt2_tokenizer(), transformers.AutoTokenizer.from_pretrained(alibi_folder)
    text = ' It is a truth\n\nuniversally  acknowledged <|endoftext|> Caf\u00e9 \U0001f642'
    assert theirs(text)['input_ids'] == ours(text)['input_ids']
    assert theirs.get_vocab() == ours.get_vocab()
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.chat_template) == (ours.eos_token_id, ours.pad_token_id, ours.chat_template)
    generation = json.loads((alibi_folder / 'generation_config.json').read_text())
    assert generation['eos_token_id'] == ours.eos_token_id


def test_an_existing_output_is_left_alone(alibi_run: TrainedRun, tmp_path: Path) -> None:
    (tmp_path / 'hf').mkdir()
    (tmp_path / 'hf' / 'precious.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='exists already'):
        convert_checkpoint(str(alibi_run.path), tmp_path / 'hf')
    assert [p.name for p in (tmp_path / 'hf').iterdir()] == ['precious.txt']


def test_a_killed_export_leaves_nothing_that_looks_whole(alibi_run: TrainedRun, tmp_path: Path) -> None:
    code = (
        'import sys, time\nfrom pathlib import Path\nimport llmfoundry.checkpoint.composer_to_hf as c\n'
        'def hang(*a, **k):\n    print("writing", flush=True)\n    time.sleep(600)\n'
        'c.write_model_code = hang\nc.convert_checkpoint(sys.argv[1], sys.argv[2])\n'
    )
    output = tmp_path / 'hf'
    process = subprocess.Popen([sys.executable, '-c', code, str(alibi_run.path), str(output)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None and 'writing' in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    leftovers = [p.name for p in tmp_path.iterdir()]
    assert leftovers and all(name.startswith('.hf.incomplete-') for name in leftovers)
    time.sleep(0.1)
    convert_checkpoint(str(alibi_run.path), output, ExportOptions(check_parity=False))
    assert [p.name for p in tmp_path.iterdir()] == ['hf'], 'the next export clears up'


def _edited(run: TrainedRun, folder: Path, edit) -> str:
    """A copy of the checkpoint after ``edit(loaded)``."""
    loaded = torch.load(run.path, weights_only=False)
    edit(loaded)
    torch.save(loaded, folder / 'edited.pt')
    return str(folder / 'edited.pt')


def test_a_missing_weight_is_named_instead_of_filled_in(alibi_run: TrainedRun, tmp_path: Path) -> None:
    path = _edited(alibi_run, tmp_path, lambda c: c['state']['model'].pop('model.transformer.blocks.1.ffn.up_proj.weight'))
    with pytest.raises(CheckpointError, match=r'missing: transformer\.blocks\.1\.ffn\.up_proj\.weight'):
        convert_checkpoint(path, tmp_path / 'hf')
    assert not (tmp_path / 'hf').exists()


def test_wrong_shapes_and_surplus_weights_are_named(alibi_run: TrainedRun, tmp_path: Path) -> None:
    def edit(checkpoint: dict) -> None:
        checkpoint['state']['model']['model.transformer.norm_f.weight'] = torch.ones(3)
        checkpoint['state']['model']['model.surplus'] = torch.ones(1)

    with pytest.raises(CheckpointError, match=r'left over: surplus; of the wrong shape: transformer\.norm_f\.weight: \(3,\) instead of \(16,\)'):
        convert_checkpoint(_edited(alibi_run, tmp_path, edit), tmp_path / 'hf')


def test_values_beyond_fp16_are_refused(alibi_run: TrainedRun, tmp_path: Path) -> None:
    path = _edited(alibi_run, tmp_path, lambda c: c['state']['model']['model.transformer.norm_f.weight'].fill_(1e6))
    with pytest.raises(CheckpointError, match=r"norm_f.weight' holds 1e\+06, beyond the largest fp16 number"):
        convert_checkpoint(path, tmp_path / 'hf', ExportOptions(precision='fp16'))
    assert not (tmp_path / 'hf').exists()


@pytest.mark.parametrize(
    ('edit', 'text'),
    [
        (lambda c: c.pop('state'), '"state" is not an available key'),
        (lambda c: c['state'].pop('integrations'), '"integrations.huggingface" is not an available key'),
        (lambda c: c['state']['integrations'].pop('huggingface'), '"integrations.huggingface" is not an available key'),
    ],
)
def test_checkpoints_that_lack_what_an_export_needs(edit, text: str, alibi_run: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=text):
        convert_checkpoint(_edited(alibi_run, tmp_path, edit), tmp_path / 'hf')


def test_tokenizer_file_names_cannot_leave_the_folder(alibi_run: TrainedRun, tmp_path: Path) -> None:
    def edit(checkpoint: dict) -> None:
        checkpoint['state']['integrations']['huggingface']['tokenizer']['../evil.json'] = {'file_extension': '.json', 'content': {}}

    with pytest.raises(CheckpointError, match=r"'\.\./evil\.json'"):
        convert_checkpoint(_edited(alibi_run, tmp_path, edit), tmp_path / 'hf')
    assert not (tmp_path / 'evil.json').exists()


def test_unknown_precision_and_size() -> None:
    with pytest.raises(ValueError, match="'int8' is unknown"):
        ExportOptions(precision='int8')
    with pytest.raises(ValueError, match="'many' is not a size"):
        ExportOptions(max_shard_size='many')
