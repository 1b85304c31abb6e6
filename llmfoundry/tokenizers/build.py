"""Builds the tokenizer that a `tokenizer` block names, and checks that it fits the model.

A name is looked up in this order: ``llmfoundry://NAME`` (shipped inside the package), the ``tokenizers`` registry, then Hugging Face's AutoTokenizer
(a local folder or a Hub name). Processes of one node take turns under a file lock on the cache folder: the first one downloads, the others find the files. The alternative, a signal file
written by local rank 0, stays behind when a run is killed and hangs the others when rank 0 fails; the kernel drops a lock by itself.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Mapping

from llmfoundry import dist
from llmfoundry.errors import ConfigError, ConfigProblem
from llmfoundry.registry import construct_from_registry, tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ['SHIPPED_SCHEME', 'build_tokenizer', 'check_vocab', 'num_token_ids', 'shipped_tokenizers']

SHIPPED_SCHEME = 'llmfoundry://'
_ASSETS = Path(__file__).resolve().parent.parent / 'assets'
# Hugging Face's own value for "no limit": without it, a tokenizer's published limit would silently cap sequences.
_NO_LENGTH_LIMIT = int(1e30)
# Digits, case, punctuation, accents and runs of spaces are what pre-tokenizers differ in. It starts with a space, so that add_prefix_space, which users set, makes no difference.
_PROBE = " In 1984, it's 12345.67 (naïve)   Été!  2\n\n  def f(x): return x_1"


def shipped_tokenizers() -> list[str]:
    """Names that ``llmfoundry://`` knows, sorted."""
    return sorted(p.parent.name for p in _ASSETS.glob('*/tokenizer.json'))


def build_tokenizer(tokenizer_name: str, tokenizer_kwargs: Mapping[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """Builds the tokenizer called ``tokenizer_name``.

    Args:
        tokenizer_name: ``llmfoundry://gpt2``, a name of the ``tokenizers`` registry, a local folder, or a name on the Hugging Face Hub.
        tokenizer_kwargs: passed to the tokenizer. Code from the Hub runs only if they hold ``trust_remote_code: true``. ``model_max_length`` (tokens) is
            kept; without it there is no limit.

    Raises:
        ConfigError: (a ValueError) the tokenizer cannot be found or loaded, or has no eos token.
    """
    os.environ['TRANSFORMERS_NO_ADVISORY_WARNINGS'] = '1'
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    kwargs = dict(tokenizer_kwargs or {})
    if not isinstance(tokenizer_name, str) or not tokenizer_name:
        raise _problem('tokenizer.name', f'{tokenizer_name!r} is not a tokenizer name: give a local folder, a Hugging Face name, or {SHIPPED_SCHEME}gpt2')

    with _one_local_process_at_a_time():
        if tokenizer_name.startswith(SHIPPED_SCHEME):
            tokenizer = _load_pretrained(tokenizer_name, _shipped_folder(tokenizer_name), kwargs)
        elif tokenizer_name in tokenizers:
            tokenizer = _construct_registered(tokenizer_name, kwargs)
        else:
            tokenizer = _load_pretrained(tokenizer_name, tokenizer_name, kwargs)

    tokenizer.model_max_length = int(kwargs.get('model_max_length') or _NO_LENGTH_LIMIT)
    if getattr(tokenizer, 'eos_token', None) is None:
        raise _problem(
            'tokenizer',
            f'{tokenizer_name!r} has no eos_token, so the model could never learn where a text ends. Name one: '
            "tokenizer.kwargs.eos_token: '<|endoftext|>' (a token of its vocabulary)",
        )
    return tokenizer


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Highest token id + 1, which is more than ``len(tokenizer)`` where the ids have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values(), default=-1) + 1)


def check_vocab(tokenizer: PreTrainedTokenizerBase, vocab_size: int, name: str | None = None) -> None:
    """Checks that every token id has a row in the model's embedding.

    Args:
        tokenizer: the tokenizer.
        vocab_size: rows of the embedding, ``model.vocab_size`` in the YAML.
        name: how to call the tokenizer in the error; its ``name_or_path`` by default.

    Raises:
        ConfigError: (a ValueError) the vocabulary is smaller than the tokenizer.
    """
    num_tokens = num_token_ids(tokenizer)
    if vocab_size < num_tokens:
        name = name or _display_name(tokenizer)
        # Matrix products are fastest when the dimension is a multiple of 128.
        suggested = -(-num_tokens // 128) * 128
        raise _problem(
            'model.vocab_size',
            f'{vocab_size} is smaller than the {num_tokens} tokens of the tokenizer {name!r}: ids from {vocab_size} on would have no embedding. '
            f'Set it to at least {num_tokens} ({suggested} is the next multiple of 128)',
        )


def _display_name(tokenizer: PreTrainedTokenizerBase) -> str:
    name = getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__
    return SHIPPED_SCHEME + os.path.basename(name) if os.path.dirname(name) == str(_ASSETS) else name


def _problem(path: str, message: str) -> ConfigError:
    return ConfigError([ConfigProblem(path, message)])


def _shipped_folder(tokenizer_name: str) -> str:
    short, known = tokenizer_name[len(SHIPPED_SCHEME) :], shipped_tokenizers()
    if short not in known:
        near = difflib.get_close_matches(short, known, 1)
        hint = f' (did you mean {SHIPPED_SCHEME}{near[0]}?)' if near else ''
        raise _problem('tokenizer.name', f'{tokenizer_name!r} is not shipped with this package{hint}; shipped: {", ".join(SHIPPED_SCHEME + k for k in known)}')
    return str(_ASSETS / short)


def _construct_registered(name: str, kwargs: dict[str, Any]) -> Any:
    try:
        return construct_from_registry(name, tokenizers, partial_function=False, kwargs=kwargs)
    except (OSError, ValueError) as e:
        raise _problem('tokenizer', f'{name!r} could not be built: {e}') from e


def _load_pretrained(name: str, folder_or_hub_name: str, kwargs: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    # Left out, transformers would ask on the terminal, and a cluster job would wait for an answer.
    kwargs.setdefault('trust_remote_code', False)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder_or_hub_name, **kwargs)
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise _problem('tokenizer.name', _why_not_loaded(name, folder_or_hub_name, e)) from e
    _warn_if_not_as_its_file(name, tokenizer, folder_or_hub_name, kwargs)
    return tokenizer


def _warn_if_not_as_its_file(name: str, tokenizer: PreTrainedTokenizerBase, folder_or_hub_name: str, kwargs: Mapping[str, Any]) -> None:
    """Warns where the loaded tokenizer splits text otherwise than its ``tokenizer.json``.

    transformers 5 replaces the pre-tokenizer of some files by the one of the class that their config names, without a message; the model would be trained on tokens that it has never seen.
    """
    import tokenizers as tokenizers_library
    from transformers.utils import cached_file

    options = {key: kwargs[key] for key in ('token', 'revision', 'cache_dir', 'subfolder') if key in kwargs}
    with contextlib.suppress(OSError, ValueError):
        path = cached_file(folder_or_hub_name, 'tokenizer.json', _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False, **options)
        if path is None or not tokenizer.is_fast:
            return
        of_file = tokenizers_library.Tokenizer.from_file(path).encode(_PROBE, add_special_tokens=False).ids
        loaded = tokenizer.backend_tokenizer.encode(_PROBE, add_special_tokens=False).ids
        if of_file != loaded:
            warnings.warn(
                f'tokenizer {name!r}: as transformers {version("transformers")} loaded it ({type(tokenizer).__name__}), it splits text otherwise than its tokenizer.json: {_PROBE!r} becomes {len(loaded)} tokens '
                f'instead of {len(of_file)}. A model that was trained with the file would meet tokens it does not know. Set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json, '
                'or use the transformers version that the model was published with.',
            )


def _why_not_loaded(name: str, folder_or_hub_name: str, error: Exception) -> str:
    cause = ' '.join(str(error).split())
    cause = cause if len(cause) <= 300 else f'{cause[:300]}...'
    if 'trust_remote_code' in str(error):
        return f'{name!r} needs Python code from its repository. If you trust that code, set tokenizer.kwargs.trust_remote_code: true'
    if os.path.isdir(folder_or_hub_name):
        files = ', '.join(sorted(os.listdir(folder_or_hub_name))[:10]) or 'nothing'
        return f'{name!r} is a folder, but no tokenizer could be loaded from it (it holds {files}). Cause: {type(error).__name__}: {cause}'
    if name.startswith(('/', './', '../', '~')):
        return f'{name!r} looks like a path, but there is no such folder. Give a folder that holds tokenizer.json, or {SHIPPED_SCHEME}gpt2'
    if not isinstance(error, OSError):
        return f'{name!r} could not be loaded. Cause: {type(error).__name__}: {cause}'
    offline = 'HF_HUB_OFFLINE is set, so only the local cache was searched' if _is_offline() else 'the Hugging Face Hub has no such name or cannot be reached'
    return (
        f'{name!r} is not a local folder, not in the tokenizers registry, and could not be loaded from the Hugging Face Hub: {offline}. '
        f'Give a local folder that holds tokenizer.json, use {SHIPPED_SCHEME}gpt2 (shipped), or download it once where the Hub can be reached '
        f'(`hf download {name}`) and set HF_HUB_OFFLINE=1 here. Cause: {type(error).__name__}: {cause}'
    )


def _is_offline() -> bool:
    return os.environ.get('HF_HUB_OFFLINE', '').upper() in {'1', 'ON', 'YES', 'TRUE'}


@contextlib.contextmanager
def _one_local_process_at_a_time() -> Iterator[None]:
    """Serialises the processes of a node by a lock on the cache folder itself, so that nothing is left behind, not even a lock file."""
    if dist.get_local_world_size() == 1:
        yield
        return
    import fcntl

    from huggingface_hub.constants import HF_HUB_CACHE

    fd = None
    try:
        os.makedirs(HF_HUB_CACHE, exist_ok=True)
        fd = os.open(HF_HUB_CACHE, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError:
        # Some network file systems refuse locks on folders; the Hub client has per-file locks of its own, so this only costs repeated requests.
        pass
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)
