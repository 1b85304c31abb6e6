"""The worker process: reads blocks of input from stdin, answers with token ids on stdout, both pickled.

A plain child with pipes, not ``multiprocessing``: nothing of the parent is imported again (no torch, no guard around the user's script), nothing
is shared, and when the parent dies its end of the pipe closes and the worker leaves. Loads ``tokenizers``, tiktoken and numpy only: about 100 MB.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, Sequence

import numpy as np

from llmfoundry.command_utils.data_prep.rows import BadRow, Document, Segment, documents_of
from llmfoundry.command_utils.data_prep.token_engines import BackendEngine, Engine, build_engine, difference, sample_slices
from llmfoundry.command_utils.data_prep.tokenizer_spec import TokenizerSpec
from llmfoundry.data.token_concat import TOKEN_DTYPE
from llmfoundry.typed_registry import resolve_target

__all__ = ['Encoded', 'Encoder', 'EncoderFacts', 'EncoderSpec', 'main']


@dataclass(frozen=True)
class EncoderSpec:
    """What the workers are to do. Without a tokenizer, texts are passed through as UTF-8."""

    tokenizer: TokenizerSpec | None
    bos_text: str = ''
    eos_text: str = ''
    use_tiktoken: bool = True


class EncoderFacts(NamedTuple):
    """What the worker found out when it built the engine; the same in every worker."""

    engine: str
    reason: str
    bos_tokens: list[int]
    eos_tokens: list[int]
    adds_bos: bool
    adds_eos: bool


class Encoded(NamedTuple):
    """The answer to a block: values laid end to end (int32 ids, or UTF-8), their lengths (ids, or bytes), the unusable rows, and a text
    whose ids differed."""

    data: bytes
    lengths: np.ndarray
    bad: list[BadRow]
    differs: str | None = None


class Encoder:
    """Turns blocks (lists of segments) into ``Encoded``."""

    def __init__(self, spec: EncoderSpec) -> None:
        self._engine: Engine | None = None
        self._reference: BackendEngine | None = None
        self._bos = self._eos = np.zeros(0, dtype=TOKEN_DTYPE)
        self._own_specials = (0, 0)
        self.facts = EncoderFacts('none', '', [], [], False, False)
        if spec.tokenizer is not None:
            self._build(spec, spec.tokenizer)

    def _build(self, spec: EncoderSpec, tokenizer: TokenizerSpec) -> None:
        self._engine, self._reference, reason = build_engine(tokenizer, spec.use_tiktoken)
        self._bos, self._eos = (self._engine.encode([text], add_special_tokens=False)[0] for text in (spec.bos_text, spec.eos_text))
        self._own_specials = _own_specials(self._engine)
        probe = self._engine.encode(['test'])[0].tolist()
        self.facts = EncoderFacts(
            self._engine.name,
            reason,
            self._bos.tolist(),
            self._eos.tolist(),
            adds_bos=bool(probe) and probe[0] == tokenizer.bos_id,
            adds_eos=bool(probe) and probe[-1] == tokenizer.eos_id,
        )

    def encode(self, number: int, segments: Sequence[Segment]) -> Encoded:
        """Encodes block ``number``."""
        documents: list[Document] = []
        bad: list[BadRow] = []
        for segment in segments:
            found, unusable = documents_of(segment)
            documents += found
            bad += unusable
        if self._engine is None:
            texts = [d.text.encode('utf-8') for d in documents]
            return Encoded(b''.join(texts), np.array([len(t) for t in texts], dtype=np.int64), bad)
        ids = self._engine.encode([d.text for d in documents])
        parts: list[np.ndarray] = []
        lengths = np.zeros(len(documents), dtype=np.int64)
        for i, (document, tokens) in enumerate(zip(documents, ids, strict=True)):
            before, after = self._own_specials
            # A tokenizer that adds special tokens by itself adds them to every piece of a long text; only its first and last piece keep them.
            tokens = tokens[0 if document.bos else before : len(tokens) - (0 if document.eos else after)]
            around = (self._bos if document.bos else self._bos[:0], tokens, self._eos if document.eos else self._eos[:0])
            parts += around
            lengths[i] = sum(map(len, around))
        data = np.concatenate(parts).tobytes() if parts else b''
        return Encoded(data, lengths, bad, self._check(number, [d.text for d in documents]))

    def _check(self, number: int, texts: list[str]) -> str | None:
        if self._reference is None or self._engine is None:
            return None
        slices = sample_slices(texts, seed=number)
        if number == 0:
            slices += [text[:2048] for text in texts[:32]]
        return difference(self._engine, self._reference, slices)


def _own_specials(engine: Engine) -> tuple[int, int]:
    """How many tokens the tokenizer itself puts before and after a text."""
    bare, full = (engine.encode(['test'], add_special_tokens=special)[0].tolist() for special in (False, True))
    starts = range(len(full) - len(bare) + 1)
    before = next((start for start in starts if full[start : start + len(bare)] == bare), None)
    return (0, 0) if before is None else (before, len(full) - len(bare) - before)


def _send(stream: BinaryIO, message: Any) -> None:
    pickle.dump(message, stream, protocol=pickle.HIGHEST_PROTOCOL)
    stream.flush()


def main(target: str) -> None:
    """Serves until stdin closes. ``target`` is ``module:class`` of the encoder: built from the first message, its ``facts`` are the first answer, then
    ``encode(number, block)`` answers each further message."""
    # Ctrl-C reaches the whole process group; the parent alone decides what happens.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), 'wb')
    # Whatever a library prints goes to stderr, not into the answers.
    os.dup2(2, 1)
    try:
        encoder = resolve_target(target)(pickle.load(source))
    except Exception as e:
        _send(sink, e if _survives_pickling(e) else RuntimeError(f'{type(e).__name__}: {e}'))
        return
    _send(sink, encoder.facts)
    while True:
        try:
            number, block = pickle.load(source)
        except EOFError:
            return
        try:
            _send(sink, encoder.encode(number, block))
        except BrokenPipeError:
            return
        except Exception as e:
            _send(sink, e if _survives_pickling(e) else RuntimeError(f'{type(e).__name__}: {e}'))


def _survives_pickling(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001
        return False
    return True
