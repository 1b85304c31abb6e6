"""Tiny finetuning data and configs."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

from tests.helpers.train_runs import tiny_config

__all__ = ['example', 'finetuning_config', 'write_example_mds', 'write_jsonl']

SEQ_LEN = 48
_WORDS = 'the of and to in is was he for it with as his on be at by had not are but from or have an they which one you were'.split()


def example(number: int) -> dict[str, str]:
    """Prompt and response number ``number``: of 5 to 45 tokens, and told apart by its first word."""
    rng = random.Random(number)
    words = [rng.choice(_WORDS) for _ in range(rng.randint(2, 40))]
    cut = rng.randint(1, len(words) - 1)
    return {'prompt': f'{number} {" ".join(words[:cut])}', 'response': f' {" ".join(words[cut:])}'}


def write_jsonl(path: Path, num_examples: int, first: int = 0) -> Path:
    """Writes examples ``first`` to ``first + num_examples - 1``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps(example(number)) + '\n' for number in range(first, first + num_examples)))
    return path


def write_example_mds(folder: Path, num_examples: int, samples_per_shard: int = 32) -> Path:
    """Writes the same examples as MDS shards of text."""
    from streaming import MDSWriter

    with MDSWriter(columns={'prompt': 'str', 'response': 'str'}, out=str(folder), size_limit=400 + 150 * samples_per_shard) as out:
        for number in range(num_examples):
            out.write(example(number))
    return folder


def finetuning_config(dataset: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run of a tiny MPT without dropout over a finetuning dataset. ``changes`` replaces top-level keys."""
    loader = {
        'name': 'finetuning', 'num_workers': 0, 'drop_last': False,
        'dataset': {'max_seq_len': SEQ_LEN, 'decoder_only_format': True, 'shuffle': True, **copy.deepcopy(dataset)},
    }
    config = tiny_config(Path('unused'), train_loader=loader, max_seq_len=SEQ_LEN)
    config['model'] |= {'max_seq_len': SEQ_LEN, 'resid_pdrop': 0.0}
    return {**config, **copy.deepcopy(changes)}
