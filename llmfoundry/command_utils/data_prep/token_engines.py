"""Text to token ids, three ways with the same answer: ``tokenizers``, tiktoken where the tokenizer is byte-level BPE (5 times faster), or any
Python tokenizer.

tiktoken merges by rank of the merged token, ``tokenizers`` by its list of pairs. For vocabularies made by BPE training both agree, but nothing in
the file proves it, so ids of both are compared on awkward strings at the start and on a sample of the text throughout; on any difference the run
begins anew with ``tokenizers``.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, Callable, Protocol, Sequence

import numpy as np

from llmfoundry.command_utils.data_prep.tokenizer_spec import TokenizerSpec
from llmfoundry.data.token_concat import TOKEN_DTYPE
from llmfoundry.typed_registry import resolve_target

__all__ = [
    'AWKWARD_STRINGS',
    'BackendEngine',
    'Engine',
    'NotByteLevelBPE',
    'PythonEngine',
    'TiktokenEngine',
    'build_engine',
    'difference',
    'plan_tiktoken',
]

_GPT2_HF = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The same language with possessive quantifiers, which spare the regex engine its backtracking (tiktoken_ext/openai_public.py).
_GPT2_FAST = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_LLAMA3 = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
_QWEN2 = _LLAMA3.replace(r'\p{N}{1,3}', r'\p{N}')
_O200K = '|'.join(
    (
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
        r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    )
)
_PATTERNS = {_GPT2_HF: _GPT2_FAST, _LLAMA3: _LLAMA3, _QWEN2: _QWEN2, _O200K: _O200K}

AWKWARD_STRINGS = (
    "Hello world! It's 2024, they'll say; we'VE 12345 things.",
    '  leading',
    'trailing   ',
    '\n\n\tdef f(x):\r\n        return x\n',
    '   \n  \n',
    ' ',
    '\u00a0\u2003x',
    'naïve café, œuvre',
    'Straße İstanbul ſ',
    '日本語のテキスト。中文',
    'العربية עברית हिन्दी ไทย',
    '😀👩‍👩‍👧‍👦🏳️‍🌈',
    'e\u0301 \u200d \ufeff',
    '½ ² Ⅷ ٣ 一二三',
    '\x00\x1c\x85',
    '"quotes"--dash…',
    'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa',
    '----------------',
    'https://example.org/a?b=c&d=%20',
    'ALLCAPS MixedCase snake_case',
    '\U0010ffff\ue000',
)


class NotByteLevelBPE(ValueError):
    """The tokenizer is of a kind that tiktoken cannot reproduce; the message says why."""


class Engine(Protocol):
    """Encodes texts. ``name`` tells users which engine works."""

    name: str

    def encode(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[np.ndarray]:
        """Token ids (int32) of each text."""


class BackendEngine:
    """The ``tokenizers`` library, one thread: the reference for the ids."""

    name = 'tokenizers'

    def __init__(self, backend: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(backend)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # encode_batch_fast leaves out the character offsets, which nobody reads here.
        self._encode_batch = getattr(self._tokenizer, 'encode_batch_fast', self._tokenizer.encode_batch)

    def encode(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[np.ndarray]:
        """See ``Engine``."""
        return [np.array(e.ids, dtype=TOKEN_DTYPE) for e in self._encode_batch(list(texts), add_special_tokens=add_special_tokens)]


class PythonEngine:
    """A tokenizer written in Python."""

    name = 'python'

    def __init__(self, name: str, kwargs: dict[str, Any]) -> None:
        # Named, not imported: transformers is loaded only where such a tokenizer is used.
        self._tokenizer = resolve_target('llmfoundry.tokenizers.build:build_tokenizer')(name, kwargs)

    def encode(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[np.ndarray]:
        """See ``Engine``."""
        kwargs = {'truncation': False, 'padding': False, 'add_special_tokens': add_special_tokens}
        return [np.array(self._tokenizer(text, **kwargs)['input_ids'], dtype=TOKEN_DTYPE) for text in texts]


@dataclass(frozen=True)
class TiktokenPlan:
    """How to rebuild a byte-level BPE in tiktoken.

    ``ranks`` maps token bytes to merge order, ``ids`` (one per rank) leads from there to the tokenizer's ids. ``added`` are the literal tokens, in
    the two passes in which ``tokenizers`` looks for them: on the raw text and on the normalised one.
    """

    pattern: str
    ranks: dict[bytes, int]
    ids: np.ndarray
    added: tuple[dict[str, int], dict[str, int]]
    normalize: Callable[[str], str] | None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (``bytes_to_unicode`` in openai/gpt-2, encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(c): b for c, b in [*((b, b) for b in printable), *((256 + n, b) for n, b in enumerate(others))]}


def plan_tiktoken(config: dict[str, Any]) -> TiktokenPlan:
    """Reads a tokenizer.json.

    Raises:
        NotByteLevelBPE: with the reason.
    """
    model = config['model']
    if model.get('type') != 'BPE':
        raise NotByteLevelBPE(f'its model is {model.get("type")}, not BPE')
    for key in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix', 'fuse_unk', 'byte_fallback'):
        if model.get(key):
            raise NotByteLevelBPE(f'its BPE uses {key}')
    normalizer = config.get('normalizer')
    if normalizer is not None and normalizer.get('type') != 'NFC':
        raise NotByteLevelBPE(f'it normalises text by {normalizer.get("type")}')
    ranks, ids = _ranks(model)
    plain: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for token in config.get('added_tokens', []):
        if token['lstrip'] or token['rstrip'] or token['single_word']:
            raise NotByteLevelBPE(f'its added token {token["content"]!r} strips or needs word boundaries')
        plain[bool(token['normalized'])][token['content']] = token['id']
    return TiktokenPlan(_pattern(config.get('pre_tokenizer')), ranks, ids, plain, None if normalizer is None else _nfc)


def _nfc(text: str) -> str:
    return text if text.isascii() else unicodedata.normalize('NFC', text)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    parts = (pre_tokenizer or {}).get('pretokenizers', [pre_tokenizer])
    *splits, last = [p or {} for p in parts]
    if last.get('type') != 'ByteLevel' or last.get('add_prefix_space'):
        raise NotByteLevelBPE('its pre-tokenizer is not byte-level, or adds a space')
    if not splits and last.get('use_regex', True):
        return _GPT2_FAST
    if len(splits) == 1 and splits[0].get('type') == 'Split' and not last.get('use_regex', True):
        split, regex = splits[0], splits[0].get('pattern', {}).get('Regex')
        if regex in _PATTERNS and not split.get('invert') and split.get('behavior') in ('Isolated', 'Removed'):
            return _PATTERNS[regex]
    raise NotByteLevelBPE('it splits words by a pattern that is not one of the known ones')


def _ranks(model: dict[str, Any]) -> tuple[dict[bytes, int], np.ndarray]:
    alphabet, vocab = _byte_alphabet(), model['vocab']
    missing = [c for c in alphabet if c not in vocab]
    if missing:
        raise NotByteLevelBPE(f'its vocabulary lacks {len(missing)} of the 256 bytes')
    ranks: dict[bytes, int] = {}
    ids: list[int] = []

    def add(token: str) -> None:
        as_bytes = bytes(map(alphabet.__getitem__, token))
        if as_bytes not in ranks:
            ranks[as_bytes] = len(ids)
            ids.append(vocab[token])

    for char in alphabet:
        add(char)
    try:
        for merge in model['merges']:
            left, right = merge.split(' ') if isinstance(merge, str) else merge
            add(left + right)
    except (KeyError, ValueError) as e:
        raise NotByteLevelBPE(f'its merges do not fit its vocabulary: {e!r}') from e
    return ranks, np.array(ids, dtype=TOKEN_DTYPE)


class TiktokenEngine:
    """tiktoken built from the same vocabulary and merges.

    Args:
        backend: text of tokenizer.json.
        reference: the engine for what is not worth reproducing: the special tokens that the post-processor adds, and texts on which the regex
            engine gives up.

    Raises:
        NotByteLevelBPE: with the reason, before or after the comparison on ``AWKWARD_STRINGS``.
    """

    name = 'tiktoken'

    def __init__(self, backend: str, reference: BackendEngine) -> None:
        try:
            import tiktoken
        except ImportError as e:
            raise NotByteLevelBPE(f'tiktoken is not installed ({e})') from e
        plan = plan_tiktoken(json.loads(backend))
        self._reference = reference
        self._encoding = tiktoken.Encoding('converter', pat_str=plan.pattern, mergeable_ranks=plan.ranks, special_tokens={})
        self._ids = plan.ids
        self._normalize = plan.normalize
        self._passes = [(_finder(tokens), _hints(tokens), tokens) for tokens in plan.added]
        self._prefix, self._suffix = self._template()
        strings = [*AWKWARD_STRINGS, *(f'a {token}b' for token in [*plan.added[0], *plan.added[1]][:64])]
        found = difference(self, reference, strings)
        if found is not None:
            raise NotByteLevelBPE(f'tiktoken and tokenizers differ on {found!r}')

    def _template(self) -> tuple[np.ndarray, np.ndarray]:
        bare, full = (self._reference.encode(['x'], add_special_tokens=special)[0].tolist() for special in (False, True))
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return np.array(full[:start], dtype=TOKEN_DTYPE), np.array(full[start + len(bare) :], dtype=TOKEN_DTYPE)
        raise NotByteLevelBPE('its post-processor does more than add tokens before and after')

    def encode(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[np.ndarray]:
        """See ``Engine``."""
        return [self._encode(text, add_special_tokens) for text in texts]

    def _encode(self, text: str, add_special_tokens: bool) -> np.ndarray:
        parts: list[np.ndarray] = []
        try:
            self._append(text, 0, parts)
        except BaseException as e:
            # The regex engine gives up on megabytes without a break: a ValueError, or a Rust panic (which is no Exception) in older releases.
            if not isinstance(e, ValueError) and type(e).__name__ != 'PanicException':
                raise
            return self._reference.encode([text], add_special_tokens)[0]
        if add_special_tokens and (len(self._prefix) or len(self._suffix)):
            parts = [self._prefix, *parts, self._suffix]
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, dtype=TOKEN_DTYPE)

    def _append(self, text: str, number: int, parts: list[np.ndarray]) -> None:
        """Encodes ``text`` from pass ``number`` on: literal tokens of that pass first, what lies between them by the passes after it."""
        if number == len(self._passes):
            if text:
                parts.append(self._ids[self._encoding.encode_to_numpy(text, disallowed_special=())])
            return
        if number == 1 and self._normalize is not None:
            text = self._normalize(text)
        finder, hints, tokens = self._passes[number]
        if finder is None or not any(hint in text for hint in hints):
            self._append(text, number + 1, parts)
            return
        start = 0
        for match in finder.finditer(text):
            self._append(text[start : match.start()], number + 1, parts)
            parts.append(np.array([tokens[match.group()]], dtype=TOKEN_DTYPE))
            start = match.end()
        self._append(text[start:], number + 1, parts)


def _finder(tokens: dict[str, int]) -> re.Pattern[str] | None:
    """Finds literal tokens, the longest where several begin at one place, as the Aho-Corasick search of ``tokenizers`` does."""
    return re.compile('|'.join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


def _hints(tokens: dict[str, int]) -> list[str]:
    """Short strings of which one is in any text that holds a token: a plain search for them is far cheaper than the regex."""
    whole = sorted(tokens)
    return whole if len(whole) <= 2 else sorted({token[:2] for token in whole})


def difference(engine: Engine, reference: Engine, texts: Sequence[str]) -> str | None:
    """The first text (at most 80 characters of it) on which two engines give different ids, or None."""
    for text, ours, theirs in zip(texts, engine.encode(texts), reference.encode(texts), strict=True):
        if not np.array_equal(ours, theirs):
            return text[:80]
    return None


def sample_slices(texts: Sequence[str], seed: int, chars: int = 2048) -> list[str]:
    """Slices to compare: one at random, and one around the first character beyond ASCII, where engines would part first."""
    if not texts:
        return []
    rng = random.Random(seed)
    text = texts[rng.randrange(len(texts))]
    start = rng.randrange(max(len(text) - chars, 0) + 1)
    slices = [text[start : start + chars]]
    for text in texts:
        if not text.isascii():
            at = next(i for i, c in enumerate(text) if not c.isascii())
            slices.append(text[max(at - chars // 4, 0) : at + chars // 2])
            break
    return slices


def build_engine(spec: TokenizerSpec, use_tiktoken: bool) -> tuple[Engine, BackendEngine | None, str]:
    """The fastest engine for the tokenizer.

    Returns:
        The engine, the reference to compare it with (None if it is its own reference), and why it is not tiktoken ('' if it is).
    """
    if spec.backend is None:
        return PythonEngine(spec.name, spec.kwargs), None, 'the tokenizer is written in Python'
    reference = BackendEngine(spec.backend)
    if not use_tiktoken:
        return reference, None, 'tokenizers was asked for'
    try:
        return TiktokenEngine(spec.backend, reference), reference, ''
    except NotByteLevelBPE as e:
        return reference, None, str(e)
