"""The mask linter on a loader: for the command, which shows everything, and for the start of a run, which stops at errors.

At the start of a run the first 50 examples are looked at, which takes about a second: long enough to meet every form of row, short enough to be done always.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, Iterable, Mapping, Sequence

from llmfoundry import dist
from llmfoundry.data.checks.findings import ERROR, Finding, LintReport, format_findings
from llmfoundry.data.checks.loader_rows import LoaderSample, Messages, sample_loader, source_conversations
from llmfoundry.data.checks.mask_linter import lint
from llmfoundry.data.checks.mask_rules import MaskSettings
from llmfoundry.data.checks.rows import FINETUNING, TEXT, LintRow
from llmfoundry.data.checks.template_rules import check_conversation, check_template
from llmfoundry.data.checks.tokenizer_facts import Render, TokenizerFacts, render_chat, token_facts
from llmfoundry.data.finetuning.chat import CHATML_TEMPLATE
from llmfoundry.tokenizers.utils import get_date_string

__all__ = ['DEFAULT_ROWS', 'LintedLoader', 'lint_batches', 'lint_failed_loader', 'lint_first_rows', 'lint_loader']

log = logging.getLogger(__name__)

DEFAULT_ROWS = 50


@dataclass
class LintedLoader:
    """A report with what is needed to show its rows."""

    report: LintReport
    rows: Sequence[LintRow]
    facts: TokenizerFacts


def lint_first_rows(
    loader: Any, tokenizer: Any, dataset_block: Mapping[str, Any], name: str = 'train_loader', num_rows: int = DEFAULT_ROWS, vocab_size: int | None = None,
) -> LintReport | None:
    """Checks the first rows of a loader at the start of a run. To be called by every rank; rank 0 looks, all ranks raise what it finds.

    Args:
        loader: a DataSpec or DataLoader, which is not iterated.
        tokenizer: as the loader uses it.
        dataset_block: the loader's ``dataset`` block.
        name: of the loader, for messages.
        num_rows: examples to look at.
        vocab_size: rows of the model's embedding, None if unknown.

    Returns:
        The report on rank 0 and, for loaders of this package, on every other rank; None for loaders of plug-ins, whose rows are not known.

    Raises:
        MaskLintError: (a UserError) one error that lists every finding of severity error. Warnings are logged.
    """

    def look() -> LintReport | None:
        sample = sample_loader(loader, dataset_block, tokenizer, num_rows, vocab_size)
        if sample is None:
            return None
        report = _lint_sample(sample, tokenizer, name).report
        report.raise_if_errors()
        if report.warnings:
            log.warning('%s: %s', name, '\n'.join(format_findings(report.warnings)))
        return report

    return dist.on_rank_zero(look)


def lint_loader(loader: Any, tokenizer: Any, dataset_block: Mapping[str, Any], name: str, num_rows: int = DEFAULT_ROWS, vocab_size: int | None = None) -> LintedLoader | None:
    """As ``lint_first_rows``, but nothing is raised and the rows come with the report."""
    sample = sample_loader(loader, dataset_block, tokenizer, num_rows, vocab_size)
    return None if sample is None else _lint_sample(sample, tokenizer, name)


def _lint_sample(sample: LoaderSample, tokenizer: Any, name: str) -> LintedLoader:
    render = chat_render(tokenizer) if sample.conversations else None
    report = lint(
        sample.rows, tokenizer, sample.settings, name, render=render, conversations=sample.conversations, source=sample.source, separator_id=sample.separator_id,
        batch_rows=sample.batch_rows,
    )  # fmt: skip
    first = sample.conversations[0][1] if sample.conversations else ()
    return LintedLoader(report, [*sample.rows, *sample.batch_rows], token_facts(tokenizer, render, first))


def lint_batches(batches: Iterable[Mapping[str, Any]], tokenizer: Any, name: str, vocab_size: int | None = None) -> LintedLoader:
    """The rules on the batches of any loader: what they hold is all that is known of them. Batches without ``input_ids`` and ``labels`` are left out."""
    rows = []
    for number, batch in enumerate(batches):
        if isinstance(batch, Mapping) and {'input_ids', 'labels'} <= set(batch) and 'decoder_input_ids' not in batch:
            rows += [_row_of_unknown_kind(f'{index} of batch {number}', batch, index) for index in range(len(batch['input_ids']))]
    packed = any(row.sequence_id is not None and row.sequence_id.max(initial=0) > 0 for row in rows)
    report = lint(rows, tokenizer, MaskSettings(packed=packed, vocab_size=vocab_size, max_seq_len=max((len(row.ids) for row in rows), default=None)), name)
    return LintedLoader(report, rows, token_facts(tokenizer))


def _row_of_unknown_kind(name: str, batch: Mapping[str, Any], index: int) -> LintRow:
    """A row of which everything is trained is text, which may end anywhere."""
    row = LintRow.from_batch(name, batch, index)
    return replace(row, kind=TEXT if row.targets[1:][row.is_real()[1:]].all() else FINETUNING)


def chat_render(tokenizer: Any) -> Render:
    """The chat template as the loader applies it."""
    return render_chat(tokenizer, CHATML_TEMPLATE, date_string=get_date_string())


def lint_failed_loader(error: Exception, dataset_block: Mapping[str, Any], tokenizer: Any, name: str, num_rows: int = DEFAULT_ROWS) -> LintedLoader:
    """What can be said where a loader could not be built: its error, and what the rules about chat templates find in the rows of its source."""
    conversations: list[tuple[str, Messages]] = source_conversations(dataset_block, tokenizer, num_rows)
    render = chat_render(tokenizer) if conversations else None
    facts = token_facts(tokenizer, render)
    found = [] if render is None else check_template(tokenizer, render, facts)
    if render is not None and not any(f.severity == ERROR for f in found):
        found += [f for row, messages in conversations for f in check_conversation(messages, render, row)]
    found.append(Finding('loader-fails', ERROR, f'{type(error).__name__}: {error}', 'Correct what the message names; masks can be checked when the loader can be built.'))
    return LintedLoader(LintReport(name, found), [], facts)
