"""The YAML of dataprep: read, checked in full, every problem reported at once.

Each ``*_config`` block names a method and its arguments (``{method: NAME, kwargs: {...}}``); a name with ``::`` is imported
(``package.module::attribute``), also from the folder in which the command runs. Names and arguments are checked before a row is read.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Mapping

from llmfoundry.command_utils.data_prep.dataprep.sources import SOURCES
from llmfoundry.command_utils.data_prep.dataprep.writers import TARGET_KEYS, WRITERS
from llmfoundry.config.base import Block
from llmfoundry.config.blocks import check_block, check_kwargs, expect_mapping
from llmfoundry.config.load import load_dict
from llmfoundry.config.report import KeyPath, Report
from llmfoundry.config.signatures import read_signature, signature_of_object
from llmfoundry.data.prompts import FORMATS, PROMPTS, Prompt, PromptFormat, default_format

__all__ = ['DataprepConfig', 'MethodBlock', 'Plan', 'base_of', 'load_dataprep_config', 'make_plan']


class MethodBlock(Block):
    """A function or class, and its arguments."""

    method: str
    """A name of its kind, or ``package.module::attribute``."""
    kwargs: dict = {}
    """Arguments by name."""


class SourceBlock(MethodBlock):
    """Where rows come from."""

    method: str = 'load_dataset'
    """``load_dataset`` or ``load_from_disk`` of Hugging Face datasets; the first because most data sets have a name."""


class DataprepConfig(Block):
    """The keys of a dataprep YAML."""

    source_config: SourceBlock
    """Where rows come from: ``load_dataset`` or ``load_from_disk`` with their arguments."""
    dataset_writer_config: MethodBlock
    """Where packed rows go: ``save_to_disk``, ``to_json``, ``to_parquet`` or ``to_csv`` with their arguments."""
    base_model: str
    """Name or folder of the model that will be fine-tuned: its tokenizer is used, and the prompt format of its family."""
    prompt_config: MethodBlock = MethodBlock(method='DefaultPrompt')
    """The wording around each row."""
    prompt_format_config: MethodBlock | None = None
    """The markers around each part; by default those of the model's family."""
    chunksize: int = 2048
    """Tokens in a packed row; 2048 is what the first Llama models read at once."""
    ignore_index: int = -100
    """Label of tokens that are not trained; -100 is what losses of torch ignore."""
    num_proc: int = 1
    """Processes that render and tokenise; packing is always one, so the result does not depend on it."""


@dataclass(frozen=True)
class Plan:
    """A config with its names resolved."""

    config: DataprepConfig
    source: Callable[..., Any]
    writer: Callable[..., Any]
    prompt: Prompt


def base_of(base_model: str) -> str:
    """The model whose tokenizer to load: a copy below LOCAL_MODELS_DIR if there is one, and for a PEFT adapter the model below it."""
    local = os.path.join(os.environ.get('LOCAL_MODELS_DIR', 'models'), base_model)
    folder = base_model if os.path.isdir(base_model) else local if os.path.isdir(local) else None
    if folder is None:
        return base_model
    adapter = Path(folder) / 'adapter_config.json'
    if adapter.exists() and not (Path(folder) / 'tokenizer_config.json').exists():
        return json.loads(adapter.read_text(encoding='utf-8')).get('base_model_name_or_path') or folder
    return folder


def load_dataprep_config(path: str | os.PathLike | Mapping[str, Any]) -> DataprepConfig:
    """Reads and checks a dataprep YAML.

    Args:
        path: the YAML, or its content as a mapping.

    Raises:
        ConfigError: every problem, with key, line, value and remedy.
    """
    return make_plan(path).config


def make_plan(path: str | os.PathLike | Mapping[str, Any]) -> Plan:
    """Reads and checks a dataprep YAML and imports what it names.

    Raises:
        ConfigError: every problem, with key, line, value and remedy.
    """
    config, report, _ = load_dict(path)
    nested = {'source_config': SourceBlock, 'dataset_writer_config': MethodBlock, 'prompt_config': MethodBlock, 'prompt_format_config': MethodBlock}
    check_block(report, (), config, DataprepConfig, nested=nested)
    _check_numbers(config, report)
    source = _resolve(config, report, 'source_config', SOURCES, 'load_dataset')
    writer = _resolve(config, report, 'dataset_writer_config', WRITERS, None)
    style = _build_format(config, report)
    prompt = _build_prompt(config, report, style)
    _check_source(config, report, source)
    _check_writer(config, report, writer)
    report.raise_if_any()
    return Plan(DataprepConfig(**{key: value for key, value in config.items() if value is not None}), source, writer, prompt)


def _check_numbers(config: Mapping[str, Any], report: Report) -> None:
    for key, rule, fits in (
        ('chunksize', 'must be at least 2 tokens', lambda v: v >= 2),
        ('num_proc', 'must be at least 1 process', lambda v: v >= 1),
        ('ignore_index', 'must be negative, since ids from 0 on are tokens; leave it out for -100', lambda v: v < 0),
    ):
        value = config.get(key)
        if isinstance(value, int) and not report.has(key) and not fits(value):
            report.add(key, f'{value}: {rule}')


def _block(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _kwargs(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = _block(config, key).get('kwargs')
    return dict(value) if isinstance(value, Mapping) else {}


def _resolve(config: Mapping[str, Any], report: Report, key: str, table: Mapping[str, Any], default: str | None) -> Any:
    """What ``key.method`` names; None after a problem was noted."""
    name = _block(config, key).get('method', default)
    if not isinstance(name, str):
        return None
    if '::' in name:
        return _import(name, report, (key, 'method'))
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, 1)
    hint = f'did you mean {near[0]!r}?' if near else f'one of {", ".join(table)}'
    report.add((key, 'method'), f'{name!r} is not known ({hint}); your own code is named package.module::attribute')
    return None


def _import(name: str, report: Report, path: KeyPath) -> Any:
    module_name, _, attribute = name.partition('::')
    if os.getcwd() not in sys.path:
        # A script started by its path has its own folder there, not the user's.
        sys.path.append(os.getcwd())
    try:
        value: Any = importlib.import_module(module_name)
        for part in attribute.split('.'):
            value = getattr(value, part)
    except Exception as e:  # noqa: BLE001 - a user's module may raise anything while it is imported; the report has to name it
        report.add(path, f'{name!r} cannot be imported: {type(e).__name__}: {e}')
        return None
    if not callable(value):
        report.add(path, f'{name!r} is a {type(value).__name__}; a function or class is needed')
        return None
    return value


def _build_format(config: Mapping[str, Any], report: Report) -> PromptFormat | None:
    """The format that the config names, or that of the model's family."""
    if config.get('prompt_format_config') is None:
        base = config.get('base_model')
        return default_format(base_of(base)) if isinstance(base, str) else None
    # Each name is valid with and without the word Format.
    table = {**FORMATS, **{name.removesuffix('Format'): cls for name, cls in FORMATS.items() if name != 'PromptFormat'}}
    return _construct(config, report, 'prompt_format_config', table, None, {})


def _build_prompt(config: Mapping[str, Any], report: Report, style: PromptFormat | None) -> Any:
    return _construct(config, report, 'prompt_config', PROMPTS, 'DefaultPrompt', {'format': style or PromptFormat()})


def _construct(config: Mapping[str, Any], report: Report, key: str, table: Mapping[str, Any], default: str | None, provided: dict[str, Any]) -> Any:
    """An object of the class that ``key.method`` names, built from ``key.kwargs``; None after a problem was noted."""
    cls = _resolve(config, report, key, table, default)
    if cls is None:
        return None
    kwargs = _kwargs(config, key)
    before = len(report.problems)
    check_kwargs(report, (key, 'kwargs'), kwargs, signature_of_object(cls), tuple(provided))
    if 'format' in kwargs:
        report.add((key, 'kwargs', 'format'), 'belongs in the block prompt_format_config')
    if len(report.problems) > before:
        return None
    try:
        return cls(**kwargs, **provided)
    except (TypeError, ValueError) as e:
        report.add((key, 'kwargs'), str(e))
        return None


def _check_source(config: Mapping[str, Any], report: Report, source: Any) -> None:
    name = _block(config, 'source_config').get('method', 'load_dataset')
    if name in SOURCES and expect_mapping(report, ('source_config', 'kwargs'), _block(config, 'source_config').get('kwargs', {})):
        check_kwargs(report, ('source_config', 'kwargs'), _kwargs(config, 'source_config'), read_signature(f'datasets:{name}'))


def _check_writer(config: Mapping[str, Any], report: Report, writer: Any) -> None:
    """The path is mandatory, and writing must not hit what is read."""
    name = _block(config, 'dataset_writer_config').get('method')
    if name not in WRITERS:
        return
    kwargs, key = _kwargs(config, 'dataset_writer_config'), TARGET_KEYS[name]
    path = ('dataset_writer_config', 'kwargs', key)
    target = kwargs.get(key)
    if target is not None and target == _kwargs(config, 'source_config').get('dataset_path'):
        report.add(path, f'{target!r} is also the source; name another folder')
    check_kwargs(report, path[:2], kwargs, signature_of_object(writer), ('dataset',))
