"""The non-weight files of an exported folder, and the rule that a folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Mapping, Sequence

import transformers
from transformers.dynamic_module_utils import custom_object_save

from llmfoundry.checkpoint.flatten_imports import edit_files_for_hf_compatibility
from llmfoundry.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmfoundry.checkpoint.reader import Checkpoint

__all__ = ['appears_whole', 'load_tokenizer', 'merge_generation_config', 'save_class_code', 'tokenizer_for', 'write_config', 'write_generation_config', 'write_model_card', 'write_tokenizer_files']

log = logging.getLogger(__name__)

_TOKENIZER_SUFFIXES = {'.json', '.txt', '.py', '.model', '.jinja', '.tiktoken'}
_RESERVED = {'config.json', 'generation_config.json', 'model.safetensors.index.json'}


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove_leftovers(output: Path) -> None:
    """Deletes unfinished folders of the same output whose process is gone, such as a killed export leaves."""
    for folder in output.parent.glob(f'.{output.name}.incomplete-*'):
        pid = folder.name.rpartition('-')[2]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def appears_whole(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary folder beside ``output``, which takes its name when the block ends without error and disappears otherwise.

    Raises:
        FileExistsError: ``output`` exists and ``overwrite`` is off.
    """
    if output.exists() and not overwrite:
        raise FileExistsError(f'The output folder {str(output)!r} exists already. Choose another name or remove it first.')
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(output)
    temporary = output.parent / f'.{output.name}.incomplete-{os.getpid()}'
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if output.exists():
            shutil.rmtree(output)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_config(folder: Path, config: Mapping[str, Any], dtype_name: str) -> None:
    """Writes config.json. ``torch_dtype`` is the name that transformers 4 and 5 both read."""
    content = {k: v for k, v in config.items() if k not in {'_name_or_path', 'dtype'}}
    content['torch_dtype'] = dtype_name
    (folder / 'config.json').write_text(json.dumps(content, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def write_generation_config(folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Writes generation_config.json: special tokens of the tokenizer, with the config's own as a fallback, and the cache on."""
    ids = {}
    for key in ('eos_token_id', 'bos_token_id', 'pad_token_id'):
        value = None if tokenizer is None else getattr(tokenizer, key)
        configured = config.get(key)
        # A model may stop at several tokens; the tokenizer knows one of them.
        keep_list = isinstance(configured, list) and value in configured
        ids[key] = configured if value is None or keep_list else value
    transformers.GenerationConfig(use_cache=True, **{k: v for k, v in ids.items() if v is not None}).save_pretrained(folder)


def merge_generation_config(folder: Path, given: Mapping[str, Any] | None, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Writes generation_config.json from the one that the model came with: every setting stays, and generation stops at the tokenizer's end of text too.

    Args:
        given: contents of that file; None writes special tokens alone, see ``write_generation_config``.
        config: contents of config.json.
        tokenizer: the tokenizer in the folder.
    """
    if not given:
        write_generation_config(folder, config, tokenizer)
        return
    content = {key: value for key, value in given.items() if key not in {'transformers_version', '_from_model_config'}}
    content['use_cache'] = True  # training switches it off
    eos = None if tokenizer is None else tokenizer.eos_token_id
    stops = content.get('eos_token_id')
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    if eos is not None and eos not in stops:
        # A tokenizer that ends turns with a token of its own was finetuned to do so; the base model's stops stay.
        content['eos_token_id'] = [eos, *stops] if stops else eos
    for key in ('bos_token_id', 'pad_token_id'):
        if tokenizer is not None and getattr(tokenizer, key) is not None:
            content[key] = getattr(tokenizer, key)
    (folder / 'generation_config.json').write_text(json.dumps(content, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def write_tokenizer_files(folder: Path, files: Mapping[str, Any]) -> list[str]:
    """Writes the tokenizer files that a Composer checkpoint carries; returns their names.

    Raises:
        CheckpointError: a name that is a path, or that would replace a file of the model.
    """
    for name, entry in files.items():
        suffix = Path(name).suffix
        if os.path.basename(name) != name or name in _RESERVED or suffix not in _TOKENIZER_SUFFIXES:
            raise CheckpointError(f'the checkpoint carries a tokenizer file called {name!r}, which is not a name that a tokenizer writes')
        content = entry['content']
        if suffix == '.json':
            text = json.dumps(_restore_empty(content), ensure_ascii=False, indent=2)
        elif isinstance(content, bytes):
            (folder / name).write_bytes(content)
            continue
        else:
            text = content if isinstance(content, str) else '\n'.join(content)
        (folder / name).write_text(text, encoding='utf-8')
    if any(name.endswith('.py') for name in files):
        edit_files_for_hf_compatibility(folder)
    return sorted(files)


def _restore_empty(value: Any) -> Any:
    """Puts back the one empty dictionary that tokenizers require and sharded checkpoints lose."""
    if isinstance(value, list):
        return [_restore_empty(v) for v in value]
    if not isinstance(value, dict):
        return value
    restored = {k: _restore_empty(v) for k, v in value.items()}
    if restored.get('type') == 'TemplateProcessing':
        restored.setdefault('special_tokens', {})
    return restored


def load_tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``.

    Raises:
        CheckpointError: it cannot be loaded, with the cause.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, ImportError, KeyError, TypeError) as e:
        raise CheckpointError(f'the tokenizer files of the checkpoint cannot be loaded: {e}. If the tokenizer is code of yours, pass --trust_remote_code.') from e


def tokenizer_for(folder: Path, checkpoint: Checkpoint, trust_remote_code: bool, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase | None:
    """Writes a tokenizer into ``folder``: the given one, else the one in the checkpoint; returns it."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return tokenizer
    files = checkpoint.huggingface.get('tokenizer') or {}
    if not files:
        log.warning(f'{checkpoint.source!r} carries no tokenizer, so the folder has none')
        return None
    write_tokenizer_files(folder, files)
    return load_tokenizer(folder, trust_remote_code)


def save_class_code(model: PreTrainedModel, folder: Path, flatten_imports: Sequence[str] = ('llmfoundry',)) -> None:
    """Copies the code of a plug-in's model class that called ``register_for_auto_class``, names it in config.json, and flattens its imports."""
    if getattr(model, '_auto_class', None) is None:
        return
    config_path = folder / 'config.json'
    content = json.loads(config_path.read_text(encoding='utf-8'))
    custom_object_save(model, folder, content)
    if getattr(model.config, '_auto_class', None) is not None:
        custom_object_save(model.config, folder, content)
    config_path.write_text(json.dumps(content, indent=2, sort_keys=True) + '\n', encoding='utf-8')
    edit_files_for_hf_compatibility(folder, flatten_imports)


def write_model_card(folder: Path, name: str, has_code: bool) -> None:
    """Writes README.md: how to load the folder, and why it asks for ``trust_remote_code``."""
    argument = ', trust_remote_code=True' if has_code else ''
    reason = (
        '\n`trust_remote_code=True` is needed because the code of the model lies in this folder (`modeling_mpt.py` and the files beside it). Without it, transformers '
        'takes its own `MptForCausalLM`, which knows alibi models without bias only and ignores every other setting of the config.\n'
        if has_code else ''
    )
    text = (
        f'# {name}\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n'
        f"tokenizer = AutoTokenizer.from_pretrained('{name}'{argument})\nmodel = AutoModelForCausalLM.from_pretrained('{name}'{argument})\n```\n{reason}"
    )
    (folder / 'README.md').write_text(text, encoding='utf-8')
