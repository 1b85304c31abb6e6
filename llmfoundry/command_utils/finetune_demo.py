"""``make finetune-demo``: a real chat model, LoRA-finetuned on real chats on this machine, merged, and asked one question.

``make finetune-quickstart`` is the second path: every weight of the model that ``make quickstart`` left is trained, on prompts and responses made from held-in chapters.
Both run the commands that a reader would type. Held-out loss is printed before and after, from rows that are never trained on.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, Sequence

from llmfoundry.command_utils.data_prep.austen import austen_documents
from llmfoundry.command_utils.demo_assets import chat_rows, smollm2_folder
from llmfoundry.command_utils.error_report import run_or_exit
from llmfoundry.command_utils.plot import EVAL_KEY, plot_loss
from llmfoundry.command_utils.steps import Step, run_steps
from llmfoundry.loggers.metrics_file import read_metrics

__all__ = ['austen_pairs', 'prepare_austen_pairs', 'prepare_chats', 'quickstart_steps', 'smollm2_steps']

SMOLLM2_YAML = 'yamls/finetune/smollm2-135m-lora.yaml'
QUICKSTART_YAML = 'yamls/finetune/quickstart-full.yaml'
LORA_STEPS = 40  # as the YAML says
HELD_OUT_EVERY = 10  # each tenth row is held out: 50 of the 500 chats
MAX_PAIRS = 2000
THIS = 'llmfoundry.command_utils.finetune_demo'


def smollm2_steps(folder: Path) -> list[Step]:
    """The commands of the LoRA demo, with all results below ``folder``."""
    python, base, adapter, merged = sys.executable, folder / 'base', folder / 'checkpoints' / 'adapter' / f'ba{LORA_STEPS}', folder / 'merged'
    overrides = [f'variables.folder={folder}']
    return [
        Step('Fetch SmolLM2-135M-Instruct and 500 chats (100 MB, once; kept in the cache)', [python, '-m', THIS, 'chats', str(folder)], folder / 'data' / 'val.jsonl'),
        Step('Check what would be trained, token by token', ['llmfoundry', 'check', 'data', SMOLLM2_YAML, *overrides, '--html', str(folder / 'masks.html')], folder / 'masks.html'),
        Step('Finetune a LoRA adapter, evaluating on 50 held-out chats before and after', ['composer', 'scripts/train/train.py', SMOLLM2_YAML, *overrides], folder / 'trained'),
        Step('Merge the adapter into the model, in float32, since rounding to bfloat16 would hide a wrong merge', ['merge_adapter', str(base), str(adapter), str(merged), '--tokenizer', str(base), '--precision', 'fp32'], merged / 'config.json'),
        Step('Compare the merged model with model plus adapter, and chat once, with plain transformers', [python, '-c', CHAT, str(base), str(adapter), str(merged), str(folder / 'chat.txt')], folder / 'chat.txt'),
    ]


def quickstart_steps(folder: Path, quickstart: Path) -> list[Step]:
    """The commands of full finetuning: the quickstart's checkpoint goes on with prompts and responses."""
    overrides = [f'variables.folder={folder}', f'variables.quickstart={quickstart}']
    exported = folder / 'hf'
    return [
        Step('Make prompts and responses: a passage, and how it goes on', [sys.executable, '-m', THIS, 'austen', str(folder)], folder / 'data' / 'val.jsonl'),
        Step('Check what would be trained', ['llmfoundry', 'check', 'data', QUICKSTART_YAML, *overrides, '--html', str(folder / 'masks.html')], folder / 'masks.html'),
        Step('Finetune all weights', ['composer', 'scripts/train/train.py', QUICKSTART_YAML, *overrides], folder / 'trained'),
        Step(
            'Convert the checkpoint to a Hugging Face folder',
            [sys.executable, 'scripts/inference/convert_composer_to_hf.py', '--composer_path', str(folder / 'checkpoints' / 'latest-rank0.pt'), '--hf_output_path', str(exported)],
            exported / 'config.json',
        ),
    ]


# Runs without this package on purpose: what comes out is an ordinary model.
CHAT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, merged, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(merged)
model = AutoModelForCausalLM.from_pretrained(merged).float().eval()
question = [{'role': 'user', 'content': 'What is the capital of France? Answer in one sentence.'}]
text = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
inputs = tokenizer(text, return_tensors='pt', add_special_tokens=False)
ids = inputs.input_ids
with torch.no_grad():
    with_adapter = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base).float(), adapter).eval()
    difference = (with_adapter(ids).logits - model(ids).logits).abs().max().item()
    answer = model.generate(**inputs, max_new_tokens=80, do_sample=False, pad_token_id=tokenizer.pad_token_id)[0, ids.shape[1]:]
ended = answer[-1].item() == tokenizer.eos_token_id
lines = [f'largest difference between the logits of merged model and model plus adapter: {difference:.2g}', f'question: {question[0]["content"]}',
         f'answer:   {tokenizer.decode(answer, skip_special_tokens=True)}', f'ended by itself after {len(answer)} tokens' if ended else 'did NOT end by itself within 80 tokens']
print('\\n'.join(lines))
open(out + '.tmp', 'w').write('\\n'.join(lines) + '\\n')
if difference > 1e-3 or not ended:
    sys.exit('the merged model is not what it should be')
import os
os.rename(out + '.tmp', out)
"""


def prepare_chats(folder: Path) -> None:
    """Writes ``folder/data/{train,val}.jsonl`` and links ``folder/base`` to the model's folder."""
    model, rows = smollm2_folder(), chat_rows()
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / 'base'
    if link.is_symlink():
        link.unlink()
    link.symlink_to(model, target_is_directory=True)
    _write_splits(folder, rows)


def austen_pairs() -> list[dict[str, Any]]:
    """``{'prompt', 'response'}``: a sentence of a novel and the one that follows; of each chapter's training part only."""
    pairs = []
    for row in austen_documents()['train']:
        sentences = [' '.join(s.split()) for s in re.split(r'(?<=[.!?])\s+(?=[A-Z"])', row['text'])]
        pairs += [{'prompt': f'{a}\n', 'response': b} for a, b in zip(sentences[::2], sentences[1::2], strict=False) if 40 < len(a) < 220 and 40 < len(b) < 220]
    step = max(len(pairs) // MAX_PAIRS, 1)
    return pairs[::step][:MAX_PAIRS]


def prepare_austen_pairs(folder: Path) -> None:
    """Writes ``folder/data/{train,val}.jsonl``."""
    _write_splits(folder, austen_pairs())


def _write_splits(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    data = folder / 'data'
    data.mkdir(parents=True, exist_ok=True)
    splits = {'train': [row for i, row in enumerate(rows) if i % HELD_OUT_EVERY], 'val': rows[::HELD_OUT_EVERY]}
    for split, part in splits.items():
        new = data / f'{split}.jsonl.tmp'
        new.write_text(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in part), encoding='utf-8')
        new.rename(data / f'{split}.jsonl')
        print(f'{data / split}.jsonl: {len(part)} rows')


def _report(folder: Path, started: float) -> None:
    plot_loss(folder / 'metrics.jsonl', folder / 'loss.png')
    losses = [value for _, value in read_metrics(folder / 'metrics.jsonl', EVAL_KEY)]
    print(f'\nheld-out loss: {losses[0]:.3f} before finetuning, {losses[-1]:.3f} after')
    print(f'loss curve:    {folder / "loss.png"}')
    print(f'masks:         {folder / "masks.html"} (which tokens were trained)')
    print(f'took {time.monotonic() - started:.0f} s', flush=True)
    if losses[-1] >= losses[0]:
        sys.exit('the held-out loss did not fall')


def main(argv: Sequence[str]) -> None:
    """``chats FOLDER`` and ``austen FOLDER`` write data; ``lora`` and ``full`` run a whole demo in the folder that the environment names."""
    started, action = time.monotonic(), argv[0]
    if action == 'chats':
        prepare_chats(Path(argv[1]))
    elif action == 'austen':
        prepare_austen_pairs(Path(argv[1]))
    elif action == 'lora':
        folder = Path(os.environ.get('FINETUNE_DEMO_FOLDER', 'finetune-demo')).resolve()
        run_steps(smollm2_steps(folder), folder)
        print(f'\n{(folder / "chat.txt").read_text().strip()}')
        _report(folder, started)
    elif action == 'full':
        folder = Path(os.environ.get('FINETUNE_QUICKSTART_FOLDER', 'finetune-quickstart')).resolve()
        run_steps(quickstart_steps(folder, Path(os.environ.get('QUICKSTART_FOLDER', 'quickstart')).resolve()), folder)
        _report(folder, started)
    else:
        raise ValueError(f'{action!r} is not one of chats, austen, lora, full')


if __name__ == '__main__':
    run_or_exit(lambda: main(sys.argv[1:]))
