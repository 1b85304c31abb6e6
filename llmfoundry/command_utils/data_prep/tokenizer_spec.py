"""What a converter needs to know of a tokenizer, found out without loading torch.

Hugging Face classes may change what ``tokenizer.json`` says (add a BOS, a prefix space), so the state that counts is the one after
``from_pretrained``. A short-lived process with torch switched off loads the tokenizer that way and reports its final state; workers then need the
``tokenizers`` library alone (40 MB instead of 500). Classes that are known to take the file as it is skip that process.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmfoundry.typed_registry import resolve_target

__all__ = ['TokenizerSpec', 'child_environment', 'describe_tokenizer']

_PACKAGE = Path(__file__).resolve().parents[2]
_SHIPPED = 'llmfoundry://'
_PLAIN_CLASSES = {'GPT2Tokenizer', 'GPT2TokenizerFast', 'GPTNeoXTokenizerFast', 'PreTrainedTokenizerFast', 'Qwen2Tokenizer', 'Qwen2TokenizerFast'}
"""Classes whose ``from_pretrained`` leaves tokenizer.json as it is, unless the config asks for one of ``_CHANGING_KEYS``."""
_CHANGING_KEYS = ('add_bos_token', 'add_eos_token', 'add_prefix_space')


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer as worker processes rebuild it.

    ``backend`` is the text of its tokenizer.json, None for a tokenizer written in Python (then workers build it from ``name`` and ``kwargs``).
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    backend: str | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    eos_token: str | None = None


def child_environment() -> dict[str, str]:
    """The environment of helper processes: this package importable, no torch behind transformers, one thread each."""
    environment = {**os.environ, 'USE_TORCH': '0', 'USE_TF': '0', 'USE_FLAX': '0', 'TOKENIZERS_PARALLELISM': 'false', 'RAYON_NUM_THREADS': '1'}
    environment.update(TRANSFORMERS_NO_ADVISORY_WARNINGS='1', TRANSFORMERS_VERBOSITY='error', OMP_NUM_THREADS='1', OPENBLAS_NUM_THREADS='1')
    environment['PYTHONPATH'] = os.pathsep.join(filter(None, [str(_PACKAGE.parent), os.environ.get('PYTHONPATH', '')]))
    return environment


def describe_tokenizer(name: str, kwargs: dict[str, Any] | None = None) -> TokenizerSpec:
    """Finds out how the tokenizer called ``name`` encodes.

    Args:
        name: ``llmfoundry://gpt2``, a local folder, a name of the ``tokenizers`` registry, or a name on the Hugging Face Hub.
        kwargs: passed to its ``from_pretrained``.

    Raises:
        ValueError: it cannot be loaded; the message carries the cause.
    """
    kwargs = dict(kwargs or {})
    plain = None if kwargs else _plain_spec(name)
    if plain is not None:
        return plain
    command = [sys.executable, '-c', 'from llmfoundry.command_utils.data_prep.tokenizer_spec import describe_main; describe_main()']
    request = pickle.dumps((name, kwargs))
    result = subprocess.run(command, input=request, capture_output=True, env=child_environment(), check=False)
    if result.returncode != 0:
        raise ValueError(f'the tokenizer {name!r} could not be loaded: {_last_line(result.stderr)}')
    ok, answer = pickle.loads(result.stdout)
    if not ok:
        raise ValueError(f'the tokenizer {name!r} could not be loaded: {answer}')
    return answer


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode('utf-8', 'replace').strip().splitlines()
    return lines[-1] if lines else 'its process died without a message'


def _plain_spec(name: str) -> TokenizerSpec | None:
    folder = _PACKAGE / 'assets' / name[len(_SHIPPED) :] if name.startswith(_SHIPPED) else Path(name)
    try:
        config = json.loads((folder / 'tokenizer_config.json').read_text(encoding='utf-8'))
        backend = (folder / 'tokenizer.json').read_text(encoding='utf-8')
    except (OSError, ValueError):
        return None
    if config.get('tokenizer_class') not in _PLAIN_CLASSES or any(config.get(key) for key in _CHANGING_KEYS) or 'auto_map' in config:
        return None
    if (folder / 'special_tokens_map.json').exists() or (folder / 'added_tokens.json').exists():
        # They may add tokens that tokenizer.json does not know.
        return None
    ids = {token['content']: token['id'] for token in json.loads(backend)['added_tokens']}
    declared = config.get('added_tokens_decoder', {})
    if any(ids.get(token.get('content')) != int(i) for i, token in declared.items()):
        return None
    names = {kind: _content(config.get(f'{kind}_token')) for kind in ('bos', 'eos', 'unk', 'pad')}
    if any(content is not None and content not in ids for content in names.values()):
        return None
    return TokenizerSpec(name, {}, backend, ids.get(names['bos']), ids.get(names['eos']), names['eos'])


def _content(token: Any) -> str | None:
    return token.get('content') if isinstance(token, dict) else token


def describe_main() -> None:
    """The helper process: reads (name, kwargs) from stdin, answers (True, TokenizerSpec) or (False, message) on stdout."""
    out = os.fdopen(os.dup(1), 'wb')
    # Libraries print to stdout now and then; the answer must stand alone there.
    os.dup2(2, 1)
    name, kwargs = pickle.loads(sys.stdin.buffer.read())
    try:
        tokenizer = resolve_target('llmfoundry.tokenizers.build:build_tokenizer')(name, kwargs)
    except (ValueError, OSError, ImportError, KeyError) as e:
        out.write(pickle.dumps((False, f'{e}')))
        out.close()
        return
    backend = tokenizer.backend_tokenizer.to_str() if getattr(tokenizer, 'is_fast', False) else None
    eos = tokenizer.eos_token
    spec = TokenizerSpec(name, kwargs, backend, tokenizer.bos_token_id, tokenizer.eos_token_id, None if eos is None else str(eos))
    out.write(pickle.dumps((True, spec)))
    out.close()
