"""The checks of a run before its first step: are the right tokens trained, and do packed documents keep to themselves.

They take seconds and stop the run with one error, because what they find makes no noise later: the loss falls either way.
"""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from composer import Trainer
from composer.core import Evaluator, get_precision_context

from llmfoundry import dist
from llmfoundry.command_utils.train_setup import say
from llmfoundry.config.report import lookup
from llmfoundry.config.rules import is_packed, iter_loaders
from llmfoundry.config.train import TrainConfig
from llmfoundry.data.checks.findings import LintReport
from llmfoundry.data.checks.first_rows import lint_first_rows
from llmfoundry.data.checks.packing_self_test import packing_self_test
from llmfoundry.models.composer_base import BaseHuggingFaceModel

__all__ = ['check_masks', 'check_packing', 'documents_share_rows']


def check_masks(cfg: TrainConfig, train_loader: Any, evaluators: Sequence[Evaluator], tokenizer: Any) -> None:
    """Runs the mask linter on the first rows of every loader; a line for each says what is trained.

    Raises:
        MaskLintError: (a UserError) rows that train what they should not, or not what they should.
    """
    by_label = {evaluator.label: evaluator.dataloader for evaluator in evaluators}
    vocab_size = cfg.model.get('vocab_size') if cfg.model.get('name') == 'mpt_causal_lm' else None
    for path, block in iter_loaders(cfg.to_dict()):
        loader = train_loader if path == ('train_loader',) else by_label.get(_label(block))
        if loader is None or not isinstance(block.get('dataset'), Mapping):
            continue
        report = lint_first_rows(loader, tokenizer, block['dataset'], name='.'.join(path), vocab_size=vocab_size)
        if report is not None:
            say([_headline(report)])


def _headline(report: LintReport) -> str:
    """What is trained, in one line."""
    counts = report.counts
    line = f'{report.name}: {counts.trained_share:.0%} of the tokens in the first {counts.rows} rows are trained'
    if counts.source_rows is not None:
        dropped = ', '.join(f'{number:,} {reason}' for reason, number in (counts.source_dropped or {}).items() if number) or 'none dropped'
        line += f'; {counts.source_rows:,} rows in all, {counts.source_truncated or 0:,} cut at max_seq_len, {dropped}'
    return line


def _label(block: Mapping[str, Any]) -> str:
    """As the builders name the evaluator of an evaluation loader."""
    return f'eval/{block["label"]}' if block.get('label') else 'eval'


def documents_share_rows(cfg: TrainConfig) -> bool:
    """Whether any loader makes rows of several documents that the model is to keep apart."""
    config = cfg.to_dict()
    is_mpt = cfg.model.get('name') == 'mpt_causal_lm'
    separates = not is_mpt or bool(lookup(config, 'model.attn_config.attn_uses_sequence_id'))
    for _, block in iter_loaders(config):
        dataset = block.get('dataset')
        cut = isinstance(dataset, Mapping) and any(dataset.get(key) is not None for key in ('eos_token_id', 'bos_token_id'))
        if is_packed(block) or (cut and separates):
            return True
    return False


def check_packing(cfg: TrainConfig, trainer: Trainer, tokenizer: Any) -> None:
    """Runs the packing self-test where documents share rows, on the model as it will train: its device, precision, sharding and attention.

    Raises:
        PackingSelfTestError: (a UserError) documents that share a row do not get what they get alone; names the attention backend.
    """
    model = trainer.state.model
    inner = getattr(model, 'module', model)
    if not documents_share_rows(cfg) or not isinstance(inner, BaseHuggingFaceModel):
        return
    with get_precision_context(trainer.state.precision, trainer.state.precision_config):
        report = packing_self_test(inner, vocab_size=len(tokenizer), max_seq_len=cfg.max_seq_len, device=trainer.state.device._device)
    if dist.get_global_rank() == 0:
        say([str(report)])
