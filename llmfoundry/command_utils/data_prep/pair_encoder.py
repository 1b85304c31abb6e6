"""What the workers of ``tokenize_data`` do: prompt/generation rows -> token ids and labels, over-long rows left out and counted.

The ids are those of the finetuning loader for the same row (prompt and response): each side as the tokenizer encodes it, a second BOS removed, one EOS
at the end. That tiktoken may stand in for the tokenizer is what makes this fast; a sample of the text is compared in each block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator, NamedTuple, Sequence

import numpy as np

from llmfoundry.command_utils.data_prep.rows import BadRow, Segment, pair_of_row, values_of_lines
from llmfoundry.command_utils.data_prep.token_engines import build_engine, difference, sample_slices
from llmfoundry.command_utils.data_prep.tokenizer_spec import TokenizerSpec
from llmfoundry.data.finetuning.targets import ends_with_eos
from llmfoundry.data.token_concat import TOKEN_DTYPE

__all__ = ['ENCODER', 'IGNORE_INDEX', 'EncodedPairs', 'PairEncoder', 'PairFacts', 'PairSpec']

ENCODER = 'llmfoundry.command_utils.data_prep.pair_encoder:PairEncoder'
IGNORE_INDEX = -100


@dataclass(frozen=True)
class PairSpec:
    """The tokenizer, and the most tokens that a row may have, EOS included."""

    tokenizer: TokenizerSpec
    max_length: int
    use_tiktoken: bool = True


class PairFacts(NamedTuple):
    """Which engine encodes, and why it is not tiktoken ('' if it is)."""

    engine: str
    reason: str


class EncodedPairs(NamedTuple):
    """The answer to a block: ids and labels (int32) of the kept rows laid end to end, the rows' lengths, how many rows there were and were left out,
    the first unusable row, and a text whose ids differed between the engines."""

    ids: bytes
    labels: bytes
    lengths: np.ndarray
    rows: int
    too_long: int
    empty: int
    bad: BadRow | None
    differs: str | None


class PairEncoder:
    """Turns blocks (lists of segments) into ``EncodedPairs``."""

    def __init__(self, spec: PairSpec) -> None:
        self._engine, self._reference, reason = build_engine(spec.tokenizer, spec.use_tiktoken)
        self._bos, self._eos, self._max_length = spec.tokenizer.bos_id, spec.tokenizer.eos_id, spec.max_length
        self._line_breaks = {int(i) for ids in self._engine.encode(['\n', '\n\n', ' '], add_special_tokens=False) for i in ids} - {self._bos, self._eos}
        self.facts = PairFacts(self._engine.name, reason)

    def encode(self, number: int, segments: Sequence[Segment]) -> EncodedPairs:
        """Encodes block ``number``."""
        pairs: list[tuple[str, str]] = []
        for row in _pairs_of(segments):
            if isinstance(row, BadRow):
                return EncodedPairs(b'', b'', np.zeros(0, dtype=np.int64), 0, 0, 0, row, None)
            pairs.append(row)
        texts = [text for pair in pairs for text in pair]
        ids = self._engine.encode(texts)
        parts: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        too_long = empty = 0
        for (_, generation), prompt_ids, generation_ids in zip(pairs, ids[::2], ids[1::2], strict=True):
            target = self._target(prompt_ids, generation_ids)
            if not generation or len(prompt_ids) + len(target) < 2:
                empty += 1
            elif len(prompt_ids) + len(target) > self._max_length:
                too_long += 1
            else:
                parts += (prompt_ids, target)
                labels += (np.full_like(prompt_ids, IGNORE_INDEX), target if len(prompt_ids) else _without_first(target))
        lengths = np.array([len(a) + len(b) for a, b in zip(parts[::2], parts[1::2], strict=True)], dtype=np.int64)
        return EncodedPairs(_joined(parts), _joined(labels), lengths, len(pairs), too_long, empty, None, self._check(number, texts))

    def _target(self, prompt: np.ndarray, generation: np.ndarray) -> np.ndarray:
        """The trained ids: one BOS per row (the prompt's), one EOS at the end."""
        if self._bos is not None and len(prompt) and len(generation) and prompt[0] == generation[0] == self._bos:
            generation = generation[1:]
        return generation if ends_with_eos(generation, self._eos, self._line_breaks) else np.append(generation, TOKEN_DTYPE.type(self._eos))

    def _check(self, number: int, texts: list[str]) -> str | None:
        if self._reference is None:
            return None
        slices = sample_slices(texts, seed=number)
        if number == 0:
            slices += [text[:2048] for text in texts[:64]]
        return difference(self._engine, self._reference, slices)


def _without_first(target: np.ndarray) -> np.ndarray:
    """The labels of a row without prompt. Nothing predicts its first token, so this changes no loss; but a reader must be able to tell labels from the
    ids of a response that repeats its prompt."""
    labels = target.copy()
    labels[0] = IGNORE_INDEX
    return labels


def _pairs_of(segments: Sequence[Segment]) -> Iterator[Any]:
    for segment in segments:
        yield from values_of_lines(segment, pair_of_row) if segment.kind == 'jsonl' else segment.data


def _joined(parts: list[np.ndarray]) -> bytes:
    return np.concatenate(parts).astype(TOKEN_DTYPE, copy=False).tobytes() if parts else b''
