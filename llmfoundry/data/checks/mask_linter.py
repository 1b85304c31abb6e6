"""The mask linter: rows of a loader, a tokenizer and settings in, findings and counts out.

It looks at rows rather than at the code that makes them, so it also judges data that were tokenised elsewhere. A few dozen rows are enough, since templates and collators are wrong everywhere or
nowhere; what goes wrong in one row of a million is counted by the loader itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Iterable, Mapping, Sequence

import numpy as np

from llmfoundry.data.checks.findings import ERROR, WARNING, Finding, LintCounts, LintReport
from llmfoundry.data.checks.mask_rules import MaskSettings, check_row, trained_turns
from llmfoundry.data.checks.pieces import role_of_tokens
from llmfoundry.data.checks.rows import FINETUNING, TEXT, LintRow
from llmfoundry.data.checks.template_rules import check_conversation, check_prompt_tokens, check_template
from llmfoundry.data.checks.tokenizer_facts import Render, TokenizerFacts, token_facts

__all__ = ['check_vocabulary', 'count_rows', 'lint']

# Shares of all rows from which on a loss of data deserves a warning.
_MANY_TRUNCATED = 0.1
_MANY_DROPPED = 0.1


def lint(
    rows: Sequence[LintRow],
    tokenizer: Any,
    settings: MaskSettings,
    name: str = 'data',
    render: Render | None = None,
    conversations: Iterable[tuple[str, Sequence[Mapping[str, Any]]]] = (),
    source: LintCounts | None = None,
    separator_id: int | None = None,
    batch_rows: Sequence[LintRow] = (),
) -> LintReport:
    """Checks rows.

    Args:
        rows: rows as the loader gives them, counted and checked.
        tokenizer: a transformers tokenizer.
        settings: what the loader was asked to do.
        name: of the loader, for the report.
        render: the chat template, as ``render_chat`` makes it; None where the data are not chats.
        conversations: (name, messages) of rows of the source, to render.
        source: counts over the whole data set (the ``source_*`` fields).
        separator_id: token that ends or begins documents of a text loader, None if there is none.
        batch_rows: the same data as packed and padded rows of a batch; checked, not counted again. Where they are given, ``rows`` hold one document each whatever the packing.

    Returns:
        Findings, counts and facts. Nothing is raised.
    """
    conversations = list(conversations)
    first = conversations[0][1] if conversations else ()
    facts = token_facts(tokenizer, render, first)
    report = LintReport(name, counts=count_rows(rows, facts, settings, source or LintCounts()))
    report.findings += check_vocabulary(facts, settings.vocab_size)
    if render is not None:
        report.findings += _check_chats(rows, tokenizer, facts, render, conversations)
    single = replace(settings, packed=False) if batch_rows else settings
    report.findings += [f for row in rows for f in check_row(row, facts, single)]
    report.findings += [f for row in batch_rows for f in check_row(row, facts, settings)]
    report.findings += [*_answers_repeat_prompts(rows), *_separator_seen(rows, facts, separator_id), *_losses(report.counts)]
    report.facts = _facts(facts, settings)
    return report


def _check_chats(rows: Sequence[LintRow], tokenizer: Any, facts: TokenizerFacts, render: Render, conversations: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> list[Finding]:
    found = check_template(tokenizer, render, facts, conversations[0][1] if conversations else ())
    if any(f.severity == ERROR for f in found):
        # A template that is wrong for the simplest conversation is wrong for all.
        return found
    of_data = [f for row, messages in conversations for f in check_conversation(messages, render, row)]
    if not any(f.severity == ERROR for f in of_data):
        by_name = {row.name: row for row in rows}
        of_data += [f for row, messages in conversations if row in by_name for f in check_prompt_tokens(tokenizer, by_name[row], messages, render)]
    return found + of_data


def check_vocabulary(facts: TokenizerFacts, vocab_size: int | None) -> list[Finding]:
    """Whether every id of the tokenizer has a row in the model's embedding."""
    if vocab_size is None or facts.num_ids <= vocab_size:
        return []
    return [
        Finding(
            'tokenizer-larger-than-model', ERROR, f'the tokenizer has {facts.num_ids} ids, the embedding of the model {vocab_size} rows',
            f'Use the tokenizer of the model, set model.vocab_size to at least {facts.num_ids}, or for a Hugging Face model model.allow_embedding_resizing: true.',
        )
    ]


def count_rows(rows: Iterable[LintRow], facts: TokenizerFacts, settings: MaskSettings, source: LintCounts) -> LintCounts:
    """Adds the rows to a copy of ``source``. The first token of a decoder-only row is never a target, whatever its label."""
    counts = replace(source, messages=source.messages.copy(), role_tokens=source.role_tokens.copy(), role_trained=source.role_trained.copy())
    for row in rows:
        if len(row.ids) != len(row.targets):
            continue
        real = row.is_real()
        counted = row.targets & real
        if row.decoder_only and len(counted):
            counted = np.concatenate([[False], counted[1:]])
        documents = list(row.documents())
        counts.rows += 1
        counts.documents += len(documents)
        counts.tokens += int(real.sum())
        counts.trained_tokens += int(counted.sum())
        counts.padding_tokens += int((~real).sum())
        if row.kind == FINETUNING:
            counts.turns += len(row.turns) or len(trained_turns(row, settings))
            counts.trained_turns += len(trained_turns(row, settings))
            full = [stop - start >= settings.max_seq_len for start, stop in documents] if settings.max_seq_len else []
            counts.truncated += row.truncated or any(full)
        _count_roles(row, facts, counted, counts)
    return counts


def _count_roles(row: LintRow, facts: TokenizerFacts, counted: np.ndarray, counts: LintCounts) -> None:
    if not row.messages:
        return
    counts.messages.update(role for role, _ in row.messages)
    roles = role_of_tokens(row, facts)
    for sums, counted_roles in ((counts.role_tokens, roles), (counts.role_trained, roles[counted])):
        names, numbers = np.unique(counted_roles, return_counts=True)
        sums.update(dict(zip(names.tolist(), numbers.tolist(), strict=True)))


def _answers_repeat_prompts(rows: Sequence[LintRow]) -> list[Finding]:
    """Rows tokenised elsewhere whose ``labels`` repeat ``input_ids`` without any -100 look like a prompt and an equal response."""
    repeated = [row for row in rows for turn in row.turns[:1] if len(row.turns) == 1 and turn.middle > 1 and np.array_equal(row.ids[: turn.middle], row.ids[turn.middle : 2 * turn.middle])]
    if not repeated:
        return []
    most = 2 * len(repeated) > len(rows)
    return [
        Finding(
            'answer-repeats-prompt', ERROR if most else WARNING, f'in {len(repeated)} of {len(rows)} rows the answer is the prompt once more',
            'If the rows were tokenised before, labels must be -100 for the tokens of the prompt; labels without any -100 are taken for the ids of an answer.', row=repeated[0].name,
        )
    ]


def _separator_seen(rows: Sequence[LintRow], facts: TokenizerFacts, separator_id: int | None) -> list[Finding]:
    texts = [row for row in rows if row.kind == TEXT]
    if separator_id is None or not texts or any((row.ids == separator_id).any() for row in texts):
        return []
    return [
        Finding(
            'separator-missing', WARNING, f'{facts.name(separator_id)}, which should stand between documents, is in none of the first {len(texts)} rows ({sum(len(r.ids) for r in texts)} tokens)',
            'Prepare the data with --eos_text (or --bos_text), or leave eos_token_id / bos_token_id out of the dataset block; fine if every document is longer than these rows.',
        )
    ]


def _losses(counts: LintCounts) -> list[Finding]:
    found = []
    truncated, rows = (counts.source_truncated, counts.source_kept) if counts.source_truncated is not None else (counts.truncated, counts.documents)
    if rows and truncated / rows > _MANY_TRUNCATED:
        found.append(
            Finding(
                'many-truncated', WARNING, f'{truncated} of {rows} rows ({truncated / rows:.0%}) are cut at max_seq_len, and their answers end without an end',
                'Set max_seq_len higher, or shorten or split the rows.',
            )
        )
    dropped = sum((counts.source_dropped or {}).values())
    if counts.source_rows and dropped / counts.source_rows > _MANY_DROPPED:
        listed = ', '.join(f'{number} {reason}' for reason, number in (counts.source_dropped or {}).items() if number)
        found.append(
            Finding(
                'many-dropped', WARNING, f'{dropped} of {counts.source_rows} rows ({dropped / counts.source_rows:.0%}) are dropped: {listed}',
                'Correct the columns or the preprocessing function, or set max_seq_len higher if the prompts fill it.',
            )
        )
    return found


def _facts(facts: TokenizerFacts, settings: MaskSettings) -> list[tuple[str, str]]:
    lines = [(label, facts.name(value)) for label, value in (('bos', facts.bos_id), ('eos', facts.eos_id), ('pad', facts.pad_id))]
    lines.append(('ends a turn', ', '.join(facts.name(i) for i in sorted(facts.stop_ids))))
    if facts.terminator is not None:
        lines.append(('after an assistant message', repr(facts.terminator)))
    room = '' if settings.vocab_size is None else f', embedding of the model {settings.vocab_size}'
    lines.append(('ids', f'tokenizer {facts.num_ids}{room}'))
    lines.append(('trained', f'prompts {settings.target_prompts}, responses {settings.target_responses}{", packed" if settings.packed else ""}'))
    return lines
