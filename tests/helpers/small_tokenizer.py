"""Files of a tokenizer with few entries, in the form that Composer puts into checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ['small_tokenizer_files', 'write_small_tokenizer']


def small_tokenizer_files(vocab_limit: int) -> dict[str, Any]:
    """A word-level tokenizer of 40 words whose eos has the last id below ``vocab_limit``."""
    eos = vocab_limit - 1
    special = {'id': eos, 'content': '<|endoftext|>', 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False, 'special': True}
    tokenizer = {
        'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [special], 'normalizer': None,
        'pre_tokenizer': {'type': 'Whitespace'}, 'post_processor': None, 'decoder': None,
        'model': {'type': 'WordLevel', 'vocab': {**{f'w{i}': i for i in range(40)}, '<|endoftext|>': eos}, 'unk_token': '<|endoftext|>'},
    }
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '<|endoftext|>', 'bos_token': '<|endoftext|>', 'unk_token': '<|endoftext|>', 'model_max_length': 1000}
    return {
        'tokenizer.json': {'file_extension': '.json', 'content': tokenizer},
        'tokenizer_config.json': {'file_extension': '.json', 'content': config},
    }


def write_small_tokenizer(folder: Path, vocab_limit: int = 41) -> str:
    """Makes ``folder`` with the files of that tokenizer, and returns its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, entry in small_tokenizer_files(vocab_limit).items():
        (folder / name).write_text(json.dumps(entry['content']))
    return str(folder)
