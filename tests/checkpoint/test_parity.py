"""The gate finds drift of every kind, and nothing that drifted stays behind."""

from __future__ import annotations

import copy
import json
import types
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from safetensors.torch import load_file, save_file

import llmfoundry.checkpoint.composer_to_hf as composer_to_hf
from llmfoundry.checkpoint import parity
from llmfoundry.checkpoint.parity import PROBE_TEXTS, Reference, probe_batch
from llmfoundry.checkpoint.parity_probe import tokenizer_facts
from llmfoundry.errors import ParityError
from tests.helpers.composer_checkpoints import TrainedRun, gpt2_tokenizer


def _swap_heads(folder: Path) -> None:
    weights = load_file(folder / 'model.safetensors')
    name = 'transformer.blocks.1.attn.out_proj.weight'
    weights[name] = weights[name].roll(4, dims=1).contiguous()
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})


def _drop_weight_and_template(folder: Path) -> None:
    weights = load_file(folder / 'model.safetensors')
    del weights['transformer.norm_f.weight']
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
    config = json.loads((folder / 'tokenizer_config.json').read_text())
    (folder / 'tokenizer_config.json').write_text(json.dumps({**config, 'chat_template': '{{ 1 }}'}))


def _break_code(folder: Path) -> None:
    (folder / 'norm.py').write_text('import llmfoundry\n')


DRIFT = {
    'one tensor': (_swap_heads, r'logits differ by up to'),
    'a lost weight and a new chat template': (_drop_weight_and_template, r'(?s)missing_keys: transformer\.norm_f\.weight.*tokenizer chat_template: .{10,}logits differ'),
    'code that needs llmfoundry': (_break_code, r'(?s)does not load or run in a process without llmfoundry.*norm'),
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


@pytest.fixture(scope='module')
def tokenizer() -> Any:
    return gpt2_tokenizer()


@pytest.fixture
def facts(tokenizer: Any) -> dict[str, Any]:
    """What a faithful export reports."""
    generation = {'eos_token_id': 50256, 'bos_token_id': tokenizer.bos_token_id, 'pad_token_id': None}
    return {
        'missing_keys': [], 'unexpected_keys': [], 'mismatched_keys': [], 'vocab_size': 50304, 'generation': generation,
        'tokenizer': json.loads(json.dumps(tokenizer_facts(tokenizer, PROBE_TEXTS))),
    }


def _reference(tokenizer: Any = None, vocab_size: int = 50304) -> Reference:
    return Reference(torch.zeros(2, 3, vocab_size), None, tokenizer)


def _changed(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda facts: facts.update(values)


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        (_changed(unexpected_keys=['a', 'b']), 'unexpected_keys: a, b'),
        (_changed(mismatched_keys=['c']), 'mismatched_keys: c'),
        (_changed(missing_keys=[f'k{i}' for i in range(10)]), 'missing_keys: k0, k1, k2, k3, k4, k5, k6, k7 and 2 more'),
        (_changed(vocab_size=50257), 'vocabulary: 50257 rows of embeddings, trained with 50304'),
        (lambda f: f['generation'].update(eos_token_id=7), 'generation_config.eos_token_id is 7, the tokenizer has 50256'),
        (lambda f: f['tokenizer'].update(pad_token_id=3), 'tokenizer pad_token_id: 3 instead of None'),
        (lambda f: f['tokenizer']['ids'][0].pop(), 'tokenizer ids: '),
        (lambda f: f['tokenizer'].update(length=60000), 'the tokenizer has 60000 tokens, the model only 50304'),
    ],
)
def test_facts_that_changed(change: Callable[[dict[str, Any]], None], text: str, facts: dict[str, Any], tokenizer: Any) -> None:
    reference = _reference(tokenizer)
    assert parity._key_problems(facts) + parity._token_problems(facts, reference) == []
    changed = copy.deepcopy(facts)
    change(changed)
    problems = parity._key_problems(changed) + parity._token_problems(changed, reference)
    assert any(p.startswith(text) or p == text for p in problems), problems


def test_a_list_of_stop_tokens_may_hold_the_tokenizers(facts: dict[str, Any], tokenizer: Any) -> None:
    facts['generation']['eos_token_id'] = [1, 50256]
    assert parity._token_problems(facts, _reference(tokenizer)) == []


def test_bounds_on_logits() -> None:
    kept = torch.ones(1, 2, dtype=torch.bool)
    wanted = torch.tensor([[[1.0, -50.0], [2.0, 3.0]]])

    def problems(found: torch.Tensor, unrounded: torch.Tensor | None = None, dtype: torch.dtype = torch.float32) -> str:
        return ' '.join(parity._compare_logits(found, Reference(wanted, unrounded, None), kept, dtype)[1])

    assert problems(wanted + 4e-4) == '', 'within 1e-5 of the largest logit'
    assert 'differ by up to 6.0' in problems(wanted + 6e-4)
    assert 'not finite' in problems(wanted * float('nan'))
    assert 'shape (1, 1, 2) instead of (1, 2, 2)' in problems(wanted[:, :1])
    assert problems(wanted, wanted * 1.02, torch.bfloat16) == ''
    assert 'rounding to torch.float16 changes the logits' in problems(wanted, wanted * 1.02, torch.float16)
    padded = torch.tensor([[False, True]])
    changed = wanted.clone()
    changed[0, 0] = 99
    assert parity._compare_logits(changed, Reference(wanted, None, None), padded, torch.float32)[1] == [], 'padding does not count'


def test_probe_is_fixed_covers_the_vocabulary_and_pads_on_the_left() -> None:
    one, two = probe_batch(1000), probe_batch(1000)
    assert torch.equal(one['input_ids'], two['input_ids'])
    assert int(one['input_ids'].max()) > 900 and int(one['input_ids'].min()) < 100
    assert one['attention_mask'][1, 0] == 0 and one['attention_mask'][:, -1].all()
    assert probe_batch(10, 4)['input_ids'].shape == (2, 2)


def test_the_launchers_variables_do_not_reach_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}

    def run(command: list[str], env: dict[str, str], **kwargs: Any) -> Any:
        seen.update(env)
        return types.SimpleNamespace(returncode=0, stderr='')

    monkeypatch.setattr(parity.subprocess, 'run', run)
    monkeypatch.setenv('WORLD_SIZE', '8')
    parity._run_probe(tmp_path, tmp_path, False)
    assert 'WORLD_SIZE' not in seen and seen['HF_MODULES_CACHE'] == str(tmp_path / 'modules')
