"""Rows and findings as lines for a terminal: trained tokens in colour, or in double brackets where there is none.

Data are not trusted: control characters are shown as escapes, so that no row can move the cursor or hide text.
"""

from __future__ import annotations

import re
from typing import Sequence

from llmfoundry.data.checks.findings import ERROR, LintCounts, LintReport, format_findings
from llmfoundry.data.checks.pieces import Piece, pieces_of
from llmfoundry.data.checks.rows import LintRow
from llmfoundry.data.checks.tokenizer_facts import TokenizerFacts

__all__ = ['render_report', 'render_row', 'render_summary', 'summary_table', 'visible']

# Two shades, so that neighbouring tokens can be told apart.
_TRAINED = ('\x1b[30;42m', '\x1b[30;102m')
_PLAIN = ('\x1b[2m', '\x1b[0m')
_RESET, _RED, _YELLOW, _BOLD = '\x1b[0m', '\x1b[31m', '\x1b[33m', '\x1b[1m'
_CONTROL = re.compile('[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]')


def visible(text: str) -> str:
    """``text`` with control and direction characters as escapes; newlines and tabs stay."""
    return _CONTROL.sub(lambda m: f'\\x{ord(m[0]):02x}' if ord(m[0]) < 256 else f'\\u{ord(m[0]):04x}', text)


def render_row(row: LintRow, facts: TokenizerFacts, color: bool, max_tokens: int | None = None) -> str:
    """One row: a head line, then its text. Without colour, trained tokens stand in ``[[...]]`` with ``|`` between them.

    Args:
        color: use ANSI colours.
        max_tokens: leave out the middle of rows that are longer.
    """
    pieces, documents = pieces_of(row, facts), list(row.documents())
    real = row.is_real()
    packed = f', {len(documents)} documents' if len(documents) > 1 else ''
    head = f'row {row.name}: {int(real.sum())} tokens, {int((row.targets & real).sum())} trained{packed}{", truncated" if row.truncated else ""}'
    lines = [f'{_BOLD}{head}{_RESET}' if color else head]
    half = None if max_tokens is None or len(row.ids) <= max_tokens else max_tokens // 2
    for number, (start, stop) in enumerate(documents):
        inside = [p for p in pieces if start <= p.start < stop]
        if len(documents) > 1:
            lines.append(f'--- document {number}: tokens {start} to {stop - 1} ---')
        if half is not None and stop - start > 2 * half:
            first, last = [p for p in inside if p.start < start + half], [p for p in inside if p.start >= stop - half]
            lines += [_text(first, color), f'... {last[0].start - first[-1].stop} tokens left out ...', _text(last, color)]
        else:
            lines.append(_text(inside, color))
    padding = int((~real).sum())
    if padding:
        trained = int((row.targets & ~real).sum())
        lines.append(f'({padding} tokens of padding' + (f', {trained} of them trained)' if trained else ')'))
    return '\n'.join(lines)


def _text(pieces: Sequence[Piece], color: bool) -> str:
    if color:
        return ''.join(_coloured(index, piece) for index, piece in enumerate(pieces)) + _RESET
    parts: list[str] = []
    for index, piece in enumerate(pieces):
        before = pieces[index - 1].trained if index else False
        after = pieces[index + 1].trained if index + 1 < len(pieces) else False
        if not piece.trained:
            parts.append(visible(piece.text))
        else:
            # The newline that a token holds must not tear the brackets apart.
            parts.append(('|' if before else '[[') + visible(piece.text).replace('\n', '\\n') + ('' if after else ']]'))
    return ''.join(parts)


def _coloured(index: int, piece: Piece) -> str:
    shade = (_TRAINED if piece.trained else _PLAIN)[index % 2]
    shown = visible(piece.text).replace('\n', f'\\n{_RESET}\n' + shade)
    return f'{_RESET}{shade}{shown}'


def summary_table(counts: LintCounts) -> list[tuple[str, str]]:
    """(what, how many) of the rows looked at and of the whole data set."""
    table = [
        ('rows looked at', f'{counts.rows}' + (f' ({counts.documents} documents)' if counts.documents != counts.rows else '')),
        ('tokens', f'{counts.tokens}' + (f' and {counts.padding_tokens} of padding' if counts.padding_tokens else '')),
        ('trained tokens', f'{counts.trained_tokens} ({counts.trained_share:.1%})'),
    ]
    if counts.turns:
        table.append(('answers', f'{counts.turns}, {counts.trained_turns} trained'))
        table.append(('truncated', f'{counts.truncated}'))
    for role in sorted(set(counts.messages) | set(counts.role_tokens), key=lambda r: (r not in counts.messages, r)):
        messages = f'{counts.messages[role]} messages, ' if role in counts.messages else ''
        table.append((f'  {role or "other"}', f'{messages}{counts.role_tokens[role]} tokens, {counts.role_trained[role]} trained'))
    if counts.source_rows is not None:
        kept = '' if counts.source_kept is None else f', {counts.source_kept} kept'
        table.append(('rows of the source', f'{counts.source_rows}{kept}'))
    if counts.source_truncated is not None:
        table.append(('  truncated', f'{counts.source_truncated}'))
    if counts.source_dropped is not None:
        reasons = ', '.join(f'{number} {reason}' for reason, number in counts.source_dropped.items() if number)
        table.append(('  dropped', f'{sum(counts.source_dropped.values())}' + (f' ({reasons})' if reasons else '')))
    return table


def render_summary(report: LintReport, color: bool) -> str:
    """The table of counts and the findings."""
    rows = [*report.facts, *summary_table(report.counts)]
    width = max(len(label) for label, _ in rows)
    lines = [f'{_BOLD}{report.name}{_RESET}' if color else report.name]
    lines += [f'  {label.ljust(width)}  {visible(value)}' for label, value in rows]
    for line in format_findings(report.findings):
        shade = '' if line.startswith(' ') else _RED if line.startswith(ERROR) else _YELLOW
        lines.append(f'  {shade}{visible(line)}{_RESET}' if color and shade else f'  {visible(line)}')
    lines.append(f'  {len(report.errors)} errors, {len(report.warnings)} warnings')
    return '\n'.join(lines)


def render_report(report: LintReport, rows: Sequence[LintRow], facts: TokenizerFacts, color: bool, show: int = 3, max_tokens: int | None = 400) -> str:
    """The first ``show`` rows and the rows with errors that are not among them (at most ``show`` more), then the summary."""
    broken = {f.row for f in report.errors}
    chosen = [*rows[:show], *[row for row in rows[show:] if row.name in broken][:show]]
    return '\n\n'.join([*(render_row(row, facts, color, max_tokens) for row in chosen), render_summary(report, color)])
