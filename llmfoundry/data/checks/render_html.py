"""Rows and findings as one HTML page: no script, nothing loaded from elsewhere, and everything from the data escaped.

Each token is an element of its own, trained ones ``<b>``, with its index, id and role as a tooltip; the page can be sent to a colleague or kept with the run.
"""

from __future__ import annotations

from html import escape
from typing import Sequence

from llmfoundry.data.checks.findings import Finding, LintReport
from llmfoundry.data.checks.pieces import Piece, pieces_of
from llmfoundry.data.checks.render_terminal import summary_table, visible
from llmfoundry.data.checks.rows import LintRow
from llmfoundry.data.checks.tokenizer_facts import TokenizerFacts

__all__ = ['render_html']

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.7 ui-monospace, monospace; border: 1px solid #8886; border-radius: 6px; padding: .8em; }
pre b { font-weight: normal; background: #2da44e55; border-radius: 2px; box-shadow: inset -1px 0 #2da44e; }
pre i { font-style: normal; box-shadow: inset -1px 0 #8884; }
pre i.pad { opacity: .4; } pre b.pad { background: #cf222e88; }
pre .user { color: #0969da; } pre .system { color: #8250df; } pre .tool { color: #9a6700; } pre .template { opacity: .65; }
pre .hit { outline: 2px solid #cf222e; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .15em 1em .15em 0; vertical-align: top; }
.error { border-left: 5px solid #cf222e; } .warning { border-left: 5px solid #bf8700; }
.finding { padding: .3em .8em; margin: .6em 0; background: #8881; } .finding code { white-space: pre-wrap; overflow-wrap: anywhere; }
"""
_CSP = "default-src 'none'; style-src 'unsafe-inline'"
_SHOWN_PADDING = 8
_SHOWN_FINDINGS = 200
# About 60 bytes a token: a page of 10 MB, which browsers still scroll.
_TOKENS_PER_SECTION = 150_000


def render_html(sections: Sequence[tuple[LintReport, Sequence[LintRow], TokenizerFacts]], title: str) -> str:
    """A page with one section per loader: counts, findings, rows."""
    body = ''.join(_section(report, rows, facts) for report, rows, facts in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{escape(_CSP)}">'
        f'<meta name="viewport" content="width=device-width"><title>{_safe(title)}</title><style>{_STYLE}</style></head>\n'
        f'<body><h1>{_safe(title)}</h1><p>Trained tokens are <b>marked</b>; point at a token to see its index, id and role.</p>\n{body}</body></html>\n'
    )


def _safe(text: str) -> str:
    return escape(visible(text))


def _section(report: LintReport, rows: Sequence[LintRow], facts: TokenizerFacts) -> str:
    table = ''.join(f'<tr><th>{_safe(label)}</th><td>{_safe(value)}</td></tr>' for label, value in [*report.facts, *summary_table(report.counts)])
    shown = [*report.errors, *report.warnings][:_SHOWN_FINDINGS]
    findings = ''.join(_finding(f) for f in shown) or '<p>No findings.</p>'
    hits: dict[str, set[int]] = {}
    for finding in report.findings:
        hits.setdefault(finding.row, set()).add(finding.position)
    shown_rows = _within_limit(rows, set(hits))
    body = ''.join(_row(row, facts, hits.get(row.name, set())) for row in shown_rows)
    if len(shown_rows) < len(rows):
        body += f'<p>{len(rows) - len(shown_rows)} more rows are left out, since a section shows at most {_TOKENS_PER_SECTION} tokens.</p>'
    head = f'<h2>{_safe(report.name)}</h2><p>{len(report.errors)} errors, {len(report.warnings)} warnings</p>'
    return f'<section>{head}<table>{table}</table><h3>Findings</h3>{findings}<h3>Rows</h3>{body}</section>\n'


def _within_limit(rows: Sequence[LintRow], with_findings: set[str]) -> list[LintRow]:
    """Rows in their order, those with findings before others where there is no room for all. One row is always shown."""
    left, chosen = _TOKENS_PER_SECTION, set()
    for index in sorted(range(len(rows)), key=lambda i: rows[i].name not in with_findings):
        left -= len(rows[index].ids)
        if left < 0 and chosen:
            break
        chosen.add(index)
    return [row for index, row in enumerate(rows) if index in chosen]


def _finding(finding: Finding) -> str:
    where = f' in row {_safe(finding.row)}' if finding.row else ''
    snippet = f'<br><code>{_safe(finding.snippet)}</code>' if finding.snippet else ''
    return f'<div class="finding {escape(finding.severity)}"><strong>{escape(finding.rule)}</strong>{where}: {_safe(finding.seen)}{snippet}<br><em>{_safe(finding.remedy)}</em></div>\n'


def _row(row: LintRow, facts: TokenizerFacts, hits: set[int]) -> str:
    real = row.is_real()
    starts = {start: number for number, (start, _) in enumerate(row.documents())} if row.sequence_id is not None else {}
    parts, padding = [], 0
    for piece in pieces_of(row, facts):
        if piece.padding:
            padding += 1
            if padding > _SHOWN_PADDING and not piece.trained:
                continue
        if piece.start in starts and starts[piece.start]:
            parts.append(f'<hr title="document {starts[piece.start]}">')
        parts.append(_token(row, piece, bool(hits.intersection(range(piece.start, piece.stop)))))
    more = f' <span class="template">({padding} tokens of padding)</span>' if padding else ''
    cut = ', truncated' if row.truncated else ''
    head = f'row {_safe(row.name)}: {int(real.sum())} tokens, {int((row.targets & real).sum())} trained{cut}'
    return f'<h4>{head}</h4><pre>{"".join(parts)}{more}</pre>\n'


def _token(row: LintRow, piece: Piece, hit: bool) -> str:
    tag = 'b' if piece.trained else 'i'
    classes = ' '.join(filter(None, [piece.role, 'pad' if piece.padding else '', 'hit' if hit else '']))
    ids = ' '.join(str(int(i)) for i in row.ids[piece.start : piece.stop])
    title = f'token {piece.start}, id {ids}' + (f', {piece.role}' if piece.role else '')
    text = _safe(piece.text).replace('\n', '&#9166;\n')
    return f'<{tag}{f" class={chr(34)}{escape(classes)}{chr(34)}" if classes else ""} title="{escape(title)}">{text}</{tag}>'
