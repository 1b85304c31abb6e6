"""Text for the converters, and what they wrote, read back without them."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any, Iterable

import numpy as np

GPT2 = 'llmfoundry://gpt2'
EOS = '<|endoftext|>'
WORDS = 'the of and Emma naïve café 日本語 😀 don\'t 2024 12345 \n\n  \tif x == 1: <|endoftext|> Straße — "quoted" they\'ve ALLCAPS'.split(' ')


def random_texts(count: int, seed: int = 0, words: int = 120) -> list[str]:
    """Texts with everything that tokenizers treat specially; some are empty."""
    rng = random.Random(seed)
    return [' '.join(rng.choice(WORDS) for _ in range(rng.randrange(words))) for _ in range(count)]


def write_jsonl(path: Path, texts: Iterable[str]) -> Path:
    """One row per text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts), encoding='utf-8')
    return path


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, hidden ones too."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


def read_tokens(folder: Path) -> np.ndarray:
    """(samples, length) int32 of uncompressed shards, by the format's description alone."""
    index = json.loads((folder / 'index.json').read_text())
    samples = []
    for shard in index['shards']:
        data = (folder / shard['raw_data']['basename']).read_bytes()
        assert len(data) == shard['raw_data']['bytes']
        count = int(np.frombuffer(data, '<u4', 1)[0])
        offsets = np.frombuffer(data, '<u4', count + 1, 4)
        assert count == shard['samples']
        samples += [np.frombuffer(data[a:b], '<i4') for a, b in zip(offsets, offsets[1:], strict=False)]
    return np.stack(samples)


def gpt2_tokenizer() -> Any:
    """The ``tokenizers`` library's own object."""
    from tokenizers import Tokenizer

    import llmfoundry

    return Tokenizer.from_file(str(Path(llmfoundry.__file__).parent / 'assets' / 'gpt2' / 'tokenizer.json'))


def expected_tokens(texts: Iterable[str], length: int, bos: tuple[int, ...] = (), eos: tuple[int, ...] = (50256,)) -> np.ndarray:
    """What concatenation must give, the slow and obvious way."""
    tokenizer, stream = gpt2_tokenizer(), []
    for text in texts:
        stream += [*bos, *tokenizer.encode(text).ids, *eos]
    full = len(stream) // length * length
    return np.array(stream[:full], dtype=np.int32).reshape(-1, length)
