"""What a check found: one broken rule in one place, and the report that gathers them.

Findings of one rule are printed together with the rows that have it, since a wrong template breaks every row in the same way and fifty copies of one sentence hide the second problem.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Iterable, Iterator, Sequence

from llmfoundry.errors import MaskLintError

__all__ = ['ERROR', 'WARNING', 'Finding', 'LintCounts', 'LintReport', 'format_findings']

ERROR = 'error'
WARNING = 'warning'
_ROWS_SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """One broken rule.

    Args:
        rule: short name, such as ``unterminated-turn``.
        severity: ``error`` stops a run, ``warning`` does not.
        seen: what is wrong, with the values seen.
        remedy: what to do about it.
        row: where, such as ``17`` (row of the source) or ``batch 0 row 3``; '' for the tokenizer or the loader as a whole.
        snippet: the decoded tokens around it, trained ones in brackets; '' where there is no place in a row.
        position: index of the token in its row, or -1.
    """

    rule: str
    severity: str
    seen: str
    remedy: str
    row: str = ''
    snippet: str = ''
    position: int = -1


@dataclass
class LintCounts:
    """Sums over the rows that were looked at, and what the loader says about all rows.

    ``tokens``, ``trained_tokens``, ``padding_tokens`` count positions of the rows; ``messages`` and ``role_tokens``/``role_trained`` are by role (chat rows only; text between messages counts as
    'template'); ``truncated`` rows looked at that fill max_seq_len without an end; ``source_*`` concern the whole data set and are None where the loader does not know.
    """

    rows: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    padding_tokens: int = 0
    turns: int = 0
    trained_turns: int = 0
    truncated: int = 0
    messages: Counter[str] = field(default_factory=Counter)
    role_tokens: Counter[str] = field(default_factory=Counter)
    role_trained: Counter[str] = field(default_factory=Counter)
    source_rows: int | None = None
    source_kept: int | None = None
    source_truncated: int | None = None
    source_dropped: dict[str, int] | None = None

    @property
    def trained_share(self) -> float:
        """Trained tokens / tokens without padding, 0 to 1."""
        return self.trained_tokens / self.tokens if self.tokens else 0.0


@dataclass
class LintReport:
    """All findings of one loader, and its counts.

    Args:
        name: of the loader, such as ``train_loader``.
        facts: lines about the tokenizer for the summary, as (label, value).
    """

    name: str
    findings: list[Finding] = field(default_factory=list)
    counts: LintCounts = field(default_factory=LintCounts)
    facts: list[tuple[str, str]] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """Findings that stop a run."""
        return [f for f in self.findings if f.severity == ERROR]

    @property
    def warnings(self) -> list[Finding]:
        """Findings that do not."""
        return [f for f in self.findings if f.severity == WARNING]

    def raise_if_errors(self) -> None:
        """Raises one error that lists every finding of severity error.

        Raises:
            MaskLintError: there is at least one.
        """
        errors = self.errors
        if errors:
            rules = tuple(dict.fromkeys(f.rule for f in errors))
            head = f'{self.name}: the data would teach the wrong thing ({_count(len(rules), "rule")} broken in the first {self.counts.rows} rows). Nothing was trained.'
            tail = 'To see the rows token by token: llmfoundry check data YAML --html check.html'
            raise MaskLintError('\n'.join([head, *format_findings(errors), tail]), rules)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        counts = {**{key: dict(value) if isinstance(value, Counter) else value for key, value in vars(self.counts).items()}, 'trained_share': round(self.counts.trained_share, 6)}
        return {'name': self.name, 'errors': len(self.errors), 'warnings': len(self.warnings), 'facts': dict(self.facts), 'counts': counts, 'findings': [asdict(f) for f in self.findings]}


def _count(number: int, noun: str) -> str:
    return f'{number} {noun}' + ('' if number == 1 else 's')


def _grouped(findings: Iterable[Finding]) -> Iterator[list[Finding]]:
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.severity, finding.rule), []).append(finding)
    yield from sorted(groups.values(), key=lambda g: g[0].severity)


def format_findings(findings: Sequence[Finding]) -> list[str]:
    """Lines of text, errors first; one paragraph per rule with the rows that break it and the first place in full."""
    lines: list[str] = []
    for group in _grouped(findings):
        first, rows = group[0], list(dict.fromkeys(f.row for f in group if f.row))
        where = ''
        if rows:
            more = f' and {len(rows) - _ROWS_SHOWN} more' if len(rows) > _ROWS_SHOWN else ''
            where = f' (row{"" if len(rows) == 1 else "s"} {", ".join(rows[:_ROWS_SHOWN])}{more})'
        lines.append(f'{first.severity} {first.rule}{where}: {first.seen}')
        if first.snippet:
            lines.append(f'    seen in row {first.row}: {first.snippet}' if first.row else f'    seen: {first.snippet}')
        lines.append(f'    remedy: {first.remedy}')
    return lines
