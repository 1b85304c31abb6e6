"""Measures the finetuning loader on real text: the time to its first packed batch, cold and cached, the rate of batches and how full they are.

Every figure comes from a fresh process that builds the loader through its public API and reads one epoch, so another release of ``llmfoundry``
can be measured the same way. Imports are not timed; everything from the loader's call on is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator, Sequence

from llmfoundry.command_utils.data_prep.austen import austen_documents
from llmfoundry.command_utils.data_prep.benchmark import run_code

__all__ = ['main', 'prompt_response_rows']

_GPT2 = Path(__file__).resolve().parents[1] / 'assets' / 'gpt2'

_MEASURE = """
import json, os, sys, time
options = json.loads(sys.argv[1])
from transformers import AutoTokenizer
from llmfoundry.data.finetuning import build_finetuning_dataloader
tokenizer = AutoTokenizer.from_pretrained(options['tokenizer'])
tokenizer.pad_token = tokenizer.eos_token
start = time.perf_counter()
spec = build_finetuning_dataloader(
    tokenizer=tokenizer, device_batch_size=options['batch_size'], dataset=options['dataset'], num_workers=options['num_workers'],
    drop_last=False, pin_memory=False, prefetch_factor=2 if options['num_workers'] else None, persistent_workers=False,
)
batches = iter(spec.dataloader)
real = places = documents = 0

def count(batch):
    global real, places, documents
    mask = batch['attention_mask'].bool()
    real += int(mask.sum())
    places += mask.numel()
    documents += int((batch['sequence_id'].max(dim=1).values + 1).sum())

count(next(batches))
first = time.perf_counter() - start
before, counting, start = real, 0.0, time.perf_counter()
for batch in batches:
    pause = time.perf_counter()
    count(batch)
    counting += time.perf_counter() - pause
seconds = time.perf_counter() - start - counting
rate = (real - before) / seconds if real > before else 0.0
print('RESULT', json.dumps({'first_batch_s': first, 'tokens_per_s': rate, 'tokens': real, 'fill': real / places, 'examples': documents}))
"""


def prompt_response_rows(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Prompt and response rows of consecutive words of Jane Austen's novels: prompts of 8 to 120 words, responses of 4 to 60.

    About 90 tokens of GPT-2 per row, as in HellaSwag. When the novels are used up they begin again, cut at other words.
    """
    rng = random.Random(seed)
    words = [word for split in austen_documents().values() for row in split for word in row['text'].split()]
    position = 0
    for _ in range(count):
        prompt, response = (min(longest, max(shortest, int(rng.lognormvariate(mean, 0.6)))) for shortest, longest, mean in ((8, 120, 3.5), (4, 60, 2.9)))
        if position + prompt + response > len(words):
            position = rng.randrange(100)
        middle = position + prompt
        yield {'prompt': ' '.join(words[position:middle]), 'response': ' ' + ' '.join(words[middle : middle + response])}
        position = middle + response


def _measure(python: str, arguments: argparse.Namespace, rows: str, caches: str) -> dict[str, Any]:
    dataset = {
        'hf_name': 'json', 'hf_kwargs': {'data_files': {'train': rows}}, 'split': 'train', 'shuffle': True,
        'max_seq_len': arguments.max_seq_len, 'decoder_only_format': True, 'packing_ratio': 'auto',
    }
    options = {'tokenizer': str(_GPT2), 'batch_size': arguments.batch_size, 'num_workers': arguments.num_workers, 'dataset': dataset}
    environment = {'LLMFOUNDRY_CACHE': os.path.join(caches, 'llmfoundry'), 'HF_DATASETS_CACHE': os.path.join(caches, 'datasets'), 'HF_HUB_OFFLINE': '1'}
    return run_code(python, _MEASURE, [json.dumps(options)], environment)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the figures as a table and as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rows', type=int, default=20_000, help='number of prompt/response rows (default: %(default)s)')
    parser.add_argument('--data', default=None, help='a .jsonl file of prompt/response rows to use instead of the shipped novels')
    parser.add_argument('--max_seq_len', type=int, default=2048)
    parser.add_argument('--batch_size', type=int, default=8, help='rows of a batch')
    parser.add_argument('--num_workers', type=int, default=0, help='loading processes')
    parser.add_argument('--peer', default=None, help='a Python interpreter with another release of llmfoundry, which is measured in turn with ours')
    parser.add_argument('--folder', default=None, help='where to put rows and caches for the time of the measurement')
    arguments = parser.parse_args(argv)
    sides = {'ours': sys.executable, **({'peer': arguments.peer} if arguments.peer else {})}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix='bench-', dir=arguments.folder and os.path.abspath(arguments.folder)) as folder:
        # Apart from the caches, since a folder of rows is what loaders read.
        rows = Path(folder, 'rows', 'train.jsonl')
        rows.parent.mkdir()
        with open(rows, 'w', encoding='utf-8') as f:
            source = open(arguments.data, encoding='utf-8') if arguments.data else (json.dumps(row) + '\n' for row in prompt_response_rows(arguments.rows))
            number = sum(1 for line in itertools.islice(source, arguments.rows) if f.write(line))
        print(f'{number:,} rows, {rows.stat().st_size / 1e6:.1f} MB, rows of {arguments.max_seq_len} tokens, {arguments.num_workers} workers', flush=True)
        print(f'{"":<12} {"first batch":>12} {"real tokens/s":>14} {"fill":>7} {"examples":>9} {"peak memory":>12}')
        for state in ('cold', 'cached'):
            for side, python in sides.items():
                run = found[f'{side}/{state}'] = _measure(python, arguments, str(rows), os.path.join(folder, side))
                print(
                    f'{side + " " + state:<12} {run["first_batch_s"]:>10.2f} s {run["tokens_per_s"]:>14,.0f} {run["fill"]:>7.4f} {run["examples"]:>9,} {run["peak_bytes"] / 1e6:>9,.0f} MB',
                    flush=True,
                )
    print(json.dumps({key: {k: round(v, 4) for k, v in run.items()} for key, run in found.items()} | {'rows': number}))
