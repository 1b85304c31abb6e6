"""What the ids of a token store depend on, as hashes: tokenizer, preprocessing function and our own code.

A wrong hit would train on ids of something else, without any sign; a wrong miss costs one tokenisation. So everything that cannot be hashed misses.
Left out on purpose is the date that chat templates may print: a run that goes on tomorrow must see the rows of today.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import sysconfig
import tempfile
import uuid
from pathlib import Path
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, Callable, Iterator

from datasets.fingerprint import Hasher

import llmfoundry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ['code_fingerprint', 'function_fingerprint', 'tokenizer_fingerprint']

# Modules beside this one that come after the ids, or before the rows. A new module counts until it is named here.
_WITHOUT_EFFECT = {
    '__init__', 'cache_folder', 'collator', 'dataloader', 'dataset_block', 'downloads', 'file_faults', 'packed_dataset', 'safe_load', 'store_builder',
    'streaming_dataset', 'tasks',
}
_TOKENIZER_SETTINGS = ('add_bos_token', 'add_eos_token', 'add_prefix_space', 'legacy', 'split_special_tokens', 'clean_up_tokenization_spaces')


def _digest(*parts: Any) -> str:
    return hashlib.sha256('\0'.join(map(str, parts)).encode('utf-8', 'surrogatepass')).hexdigest()[:32]


@functools.cache
def code_fingerprint() -> str:
    """Changes with the version and with the code between a row and its ids."""
    files = sorted(p for p in Path(__file__).parent.glob('*.py') if p.stem not in _WITHOUT_EFFECT)
    return _digest(llmfoundry.__version__, *(p.read_text(encoding='utf-8') for p in files))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Changes with the vocabulary, the rules, the special tokens and the chat template; not with padding and truncation."""
    settings = {name: getattr(tokenizer, name, None) for name in _TOKENIZER_SETTINGS}
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(map(str, tokenizer.added_tokens_decoder.items()))]
    return _digest(type(tokenizer).__qualname__, _rules(tokenizer), settings, special, getattr(tokenizer, 'chat_template', None))


def _rules(tokenizer: PreTrainedTokenizerBase) -> str:
    if getattr(tokenizer, 'is_fast', False):
        backend = tokenizer.backend_tokenizer.to_str()
        # Before the added tokens stand truncation and padding, which are leftovers of earlier calls.
        return _digest(backend[max(0, backend.find('"added_tokens"')) :])
    with tempfile.TemporaryDirectory(prefix='llmfoundry-') as folder:
        try:
            tokenizer.save_vocabulary(folder)
            files = sorted(p for p in Path(folder).rglob('*') if p.is_file())
            if files:
                return _digest(*(hashlib.sha256(p.read_bytes()).hexdigest() for p in files))
        except (NotImplementedError, OSError, ValueError):
            pass
    return _value(tokenizer)


def function_fingerprint(fn: Callable[..., Any] | None) -> str:
    """Changes with the function's name, code, closure and defaults, and with the source of its module and of the user's modules that this one uses."""
    return 'none' if fn is None else _digest(*_parts(fn, set()))


def _parts(fn: Any, seen: set[int]) -> Iterator[str]:
    if id(fn) in seen:
        return
    seen.add(id(fn))
    if isinstance(fn, functools.partial):
        yield from _parts(fn.func, seen)
        yield _value([fn.args, sorted(fn.keywords.items())])
        return
    if inspect.ismethod(fn):
        yield _value(fn.__self__)
        fn = fn.__func__
    if not inspect.isfunction(fn):
        yield _value(fn)
        yield from _sources(getattr(type(fn), '__module__', ''))
        return
    yield f'{fn.__module__}:{fn.__qualname__}'
    yield _code(fn.__code__)
    yield _value([fn.__defaults__, fn.__kwdefaults__])
    yield from _sources(fn.__module__)
    for cell in fn.__closure__ or ():
        try:
            content = cell.cell_contents
        except ValueError:  # not filled yet
            continue
        if inspect.isfunction(content):
            yield from _parts(content, seen)
        else:
            yield _value(content)


def _code(code: CodeType) -> str:
    """Bytecode with names and constants; without file names and line numbers."""
    constants = [_code(c) if isinstance(c, CodeType) else repr(sorted(c, key=repr) if isinstance(c, frozenset) else c) for c in code.co_consts]
    return _digest(code.co_code.hex(), code.co_names, code.co_varnames, constants)


def _value(value: Any) -> str:
    try:
        return str(Hasher.hash(value))
    except Exception:  # whatever a user's object raises when it is serialised
        return uuid.uuid4().hex


def _sources(module_name: str) -> Iterator[str]:
    """Source texts of a module and of the modules it uses, as far as they are neither installed nor ours."""
    done: set[str] = set()
    waiting = [module_name]
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        file = getattr(module, '__file__', None)
        if name in done or file is None or not _is_users(name, file):
            continue
        done.add(name)
        yield f'{name}={_digest(Path(file).read_text(encoding="utf-8", errors="replace"))}'
        for value in sorted(vars(module).items(), key=lambda item: item[0]):
            used = value[1].__name__ if isinstance(value[1], ModuleType) else getattr(value[1], '__module__', None)
            if isinstance(used, str):
                waiting.append(used)


def _is_users(name: str, file: str) -> bool:
    installed = {sysconfig.get_paths()[key] for key in ('stdlib', 'platstdlib', 'purelib', 'platlib')}
    return file.endswith('.py') and name.partition('.')[0] != 'llmfoundry' and not any(Path(root) in Path(file).parents for root in installed)
