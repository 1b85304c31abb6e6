"""``llmfoundry check data X.yaml``: builds the loaders of a training config as the run would, and shows their first rows with what is wrong with them.

No model is built and nothing is written but the HTML page, so that the check takes seconds and can be run on a laptop before a cluster is booked.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from itertools import islice
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

from llmfoundry import builders
from llmfoundry.command_utils.error_report import EXPLAINED_ERRORS
from llmfoundry.config.load import load_train_config
from llmfoundry.config.train import TrainConfig
from llmfoundry.data.checks.first_rows import DEFAULT_ROWS, LintedLoader, lint_batches, lint_failed_loader, lint_loader
from llmfoundry.data.checks.render_html import render_html
from llmfoundry.data.checks.render_terminal import render_report

__all__ = ['check_data', 'loader_blocks', 'model_vocab_size']

log = logging.getLogger(__name__)

_PLUG_IN_BATCHES = 4
# The check reads a few rows; workers would cost more than that.
_WITHOUT_WORKERS = {'num_workers': 0, 'pin_memory': False, 'persistent_workers': False, 'prefetch_factor': None, 'timeout': 0}


def check_data(
    yaml_path: str, overrides: Sequence[str] = (), rows: int = DEFAULT_ROWS, html: str | None = None, as_json: bool = False, color: bool | None = None, show: int = 3,
) -> int:
    """Checks the loaders of a config and prints what it finds.

    Args:
        yaml_path: a training config.
        overrides: ``key=value``.
        rows: examples to look at, per loader.
        html: file to write a page with all of them to.
        as_json: print JSON and nothing else.
        color: ANSI colours; by default if the output is a terminal and NO_COLOR is not set.
        show: rows to print, per loader.

    Returns:
        The exit code: 1 if there is a finding of severity error.

    Raises:
        ConfigError: every problem of the config.
    """
    cfg = load_train_config(yaml_path, list(overrides))
    tokenizer = builders.build_tokenizer(cfg.tokenizer['name'], cfg.tokenizer.get('kwargs'))
    vocab_size = model_vocab_size(cfg.model)
    linted = [_lint(name, block, batch_size, tokenizer, rows, vocab_size) for name, block, batch_size in loader_blocks(cfg)]
    if html is not None:
        page = Path(html)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(render_html([(item.report, item.rows, item.facts) for item in linted], f'{yaml_path}: first rows'), encoding='utf-8')
    errors = sum(len(item.report.errors) for item in linted)
    if as_json:
        print(json.dumps({'config': yaml_path, 'errors': errors, 'loaders': [item.report.to_json() for item in linted]}, indent=2))
    else:
        coloured = color if color is not None else sys.stdout.isatty() and not os.environ.get('NO_COLOR')
        for item in linted:
            print(render_report(item.report, item.rows, item.facts, coloured, show) + '\n')
        if html is not None:
            print(f'page with all rows: {html}')
    return 1 if errors else 0


def loader_blocks(cfg: TrainConfig) -> Iterator[tuple[str, Mapping[str, Any], int | float]]:
    """(name, block, rows per device) of ``train_loader`` and each evaluation loader."""
    yield 'train_loader', cfg.train_loader, cfg.device_train_batch_size
    if cfg.eval_loader is not None:
        yield 'eval_loader', cfg.eval_loader, cfg.device_eval_batch_size
    for block in cfg.eval_loaders or ():
        yield f'eval_loader {block.get("label")}', {k: v for k, v in block.items() if k != 'label'}, cfg.device_eval_batch_size


def _lint(name: str, block: Mapping[str, Any], batch_size: int | float, tokenizer: Any, rows: int, vocab_size: int | None) -> LintedLoader:
    dataset = block.get('dataset') or {}
    settings = {key: value for key, value in _WITHOUT_WORKERS.items() if key in block or key == 'num_workers'}
    try:
        with warnings.catch_warnings():
            # What was dropped is in the table of counts.
            warnings.filterwarnings('ignore', message='.*: dropped [0-9]+ of [0-9]+ examples')
            loader = builders.build_dataloader({**block, **settings}, tokenizer, batch_size)
        linted = lint_loader(loader, tokenizer, dataset, name, rows, vocab_size)
        if linted is not None:
            return linted
        log.info('%s: the loader %r is not of this package, so its batches are looked at, not its source', name, block.get('name'))
        return lint_batches(islice(getattr(loader, 'dataloader', loader), _PLUG_IN_BATCHES), tokenizer, name, vocab_size)
    except (*EXPLAINED_ERRORS, ValueError, NotImplementedError, OSError) as e:
        # One loader's failure must not hide what is wrong with the others.
        return lint_failed_loader(e, dataset, tokenizer, name, rows)


def model_vocab_size(model: Mapping[str, Any]) -> int | None:
    """Rows of the embedding that the ``model`` block asks for: ``vocab_size``, or that of the Hugging Face config; None if it is not known or will be resized."""
    if model.get('vocab_size') is not None:
        return int(model['vocab_size'])
    overridden = (model.get('config_overrides') or {}).get('vocab_size')
    if overridden is not None:
        return int(overridden)
    name = model.get('pretrained_model_name_or_path')
    if name is None or model.get('allow_embedding_resizing'):
        return None
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=bool(model.get('trust_remote_code', False)))
    except (OSError, ValueError, KeyError) as e:
        log.info('model %s: its vocabulary is not checked, since its config cannot be read: %s', name, e)
        return None
    config = getattr(config, 'text_config', None) or config
    return getattr(config, 'vocab_size', None)
