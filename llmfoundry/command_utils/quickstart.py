"""``make quickstart``: the documented commands one after another, from text to generated sentences."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from llmfoundry.command_utils.plot import plot_loss
from llmfoundry.command_utils.steps import Step, run_steps

YAML = 'yamls/smoke/quickstart.yaml'
PROMPTS = ('It is a truth universally acknowledged', 'She was not', '"My dear Mr. Bennet," said')


def steps(folder: Path) -> list[Step]:
    """The commands of the quickstart, in order, with all results below ``folder``."""
    data, checkpoints, exported = folder / 'data', folder / 'checkpoints', folder / 'hf'
    python = sys.executable
    return [
        Step(
            'Prepare the corpus: six novels of Jane Austen -> GPT-2 tokens -> MDS shards',
            ['llmfoundry', 'data_prep', 'austen', '--out_root', str(data), '--concat_tokens', '128'],
            data / 'val' / 'index.json',
        ),
        Step(
            'Pretrain a small MPT with Composer, evaluating on held-out chapters',
            ['composer', 'scripts/train/train.py', YAML, f'variables.folder={folder}'],
            checkpoints / 'done',
        ),
        Step(
            'Convert the checkpoint to a Hugging Face folder (and compare its logits with the trained model)',
            [python, 'scripts/inference/convert_composer_to_hf.py', '--composer_path', str(checkpoints / 'latest-rank0.pt'), '--hf_output_path', str(exported)],
            exported / 'config.json',
        ),
        Step('Generate with plain transformers', [python, '-c', GENERATE, str(exported), str(folder / 'sample.txt'), *PROMPTS], folder / 'sample.txt'),
    ]


# Runs without this package on purpose: the exported folder carries its own code.
GENERATE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out, *prompts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
torch.manual_seed(17)
texts = []
for prompt in prompts:
    ids = tokenizer(prompt, return_tensors='pt')
    new = model.generate(**ids, max_new_tokens=40, do_sample=True, temperature=0.8, top_k=40, pad_token_id=tokenizer.eos_token_id)
    texts.append(tokenizer.decode(new[0], skip_special_tokens=True))
print('\\n\\n'.join(texts))
open(out, 'w').write('\\n\\n'.join(texts) + '\\n')
"""


def run(folder: Path) -> None:
    """Runs the steps that are not done yet, then draws the loss curve."""
    start = time.monotonic()
    run_steps(steps(folder), folder)
    plot = folder / 'loss.png'
    losses = plot_loss(folder / 'metrics.jsonl', plot)
    print(f'\nvalidation loss: {losses[0]:.3f} before training, {losses[-1]:.3f} after')
    print(f'loss curve:      {plot}')
    print(f'model:           {folder / "hf"} (a Hugging Face folder)')
    print(f'took {time.monotonic() - start:.0f} s', flush=True)


if __name__ == '__main__':
    run(Path(os.environ.get('QUICKSTART_FOLDER', 'quickstart')).resolve())
