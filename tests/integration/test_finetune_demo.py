"""The steps of ``make finetune-demo`` and ``make finetune-quickstart`` as real commands, on a tiny model in place of the fetched one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmfoundry.command_utils.finetune_demo import HELD_OUT_EVERY, LORA_STEPS, SMOLLM2_YAML, austen_pairs, prepare_austen_pairs, smollm2_steps
from llmfoundry.command_utils.plot import EVAL_KEY
from llmfoundry.config.load import load_train_config
from llmfoundry.loggers.metrics_file import read_metrics
from tests.helpers.tiny_hf import save_model
from tests.helpers.tokenizers import save_tokenizer, smollm2_tokenizer
from tests.helpers.workspace import ROOT, run_command


@pytest.mark.slow
def test_lora_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check, train, merge: the held-out loss falls, and the merged model is the model plus adapter."""
    monkeypatch.setenv('LLMFOUNDRY_CACHE', str(tmp_path / 'cache'))
    folder = tmp_path / 'demo'
    (folder / 'data').mkdir(parents=True)
    tokenizer = smollm2_tokenizer()
    save_model(folder / 'base', 'llama', vocab_size=len(tokenizer), tie_word_embeddings=True, initializer_range=0.3)
    save_tokenizer(tokenizer, folder / 'base')
    for split, rows in (('train', range(120)), ('val', range(120, 140))):
        chats = [{'messages': [{'role': 'user', 'content': f'Say {i}'}, {'role': 'assistant', 'content': f'I say {i % 7} as ever I did, and gladly. ' * 3}]} for i in rows]
        (folder / 'data' / f'{split}.jsonl').write_text(''.join(json.dumps(chat) + '\n' for chat in chats))
    check, train, merge = smollm2_steps(folder)[1:4]
    train.command.extend(['max_duration=6ba', 'eval_interval=3ba', 'save_interval=3ba', 'max_seq_len=128', 'variables.max_seq_len=128', 'optimizer.lr=2e-2'])
    merge.command[2] = str(folder / 'checkpoints' / 'adapter' / 'ba6')
    for step in (check, train, merge):
        result = run_command(step.command, ROOT)
        assert result.returncode == 0, f'{step.title}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}'
    losses = [value for _, value in read_metrics(folder / 'metrics.jsonl', EVAL_KEY)]
    assert losses[-1] < losses[0] and 'masks.html' in {p.name for p in folder.iterdir()}

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([tokenizer('Say something').input_ids])
    base, merged = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ('base', 'merged'))
    with torch.no_grad():
        before, after = base(ids).logits, merged(ids).logits
        with_adapter = PeftModel.from_pretrained(base, folder / 'checkpoints' / 'adapter' / 'ba6').eval()(ids).logits
    torch.testing.assert_close(after, with_adapter, rtol=1e-4, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


def test_the_yaml_trains_as_many_steps_as_the_demo_merges() -> None:
    assert load_train_config(ROOT / SMOLLM2_YAML).max_duration == f'{LORA_STEPS}ba'


def test_pairs_from_the_novels(tmp_path: Path) -> None:
    pairs = austen_pairs()
    assert len(pairs) > 1000 and all(pair['prompt'].strip() and pair['response'].strip() for pair in pairs)
    prepare_austen_pairs(tmp_path)
    train, val = ([json.loads(line) for line in (tmp_path / 'data' / f'{split}.jsonl').open()] for split in ('train', 'val'))
    assert val == pairs[::HELD_OUT_EVERY] and len(train) + len(val) == len(pairs) and not any(row in train for row in val)
