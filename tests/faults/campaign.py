"""One fault, with further tries where it came too late, and the table."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.faults.jobs import JobFailed, NotInjected, make_campaign_data
from tests.faults.kinds import Campaign, Failed, Fault, Outcome, Skipped
from tests.helpers.warm_launcher import WarmLauncher

__all__ = ['Row', 'prepare', 'produce', 'table']

TRIES = 3


@dataclass
class Row:
    """What became of one fault."""

    outcome: Outcome
    status: str  # survived, refused, failed or skipped

    @property
    def passed(self) -> bool:
        return self.status != 'failed'

    def line(self) -> str:
        return f'{self.status:9} {self.outcome.fault} at {self.outcome.moment}: exit {self.outcome.exit_code}; {self.outcome.cause}; {self.outcome.result}'


def prepare(folder: Path, launcher: WarmLauncher | None = None) -> Campaign:
    """Writes the data that all runs train on."""
    return Campaign(folder, make_campaign_data(folder / 'data'), random.Random(0), launcher)


def produce(campaign: Campaign, fault: Fault, place: Path, rng: random.Random) -> Row:
    """One fault; up to ``TRIES`` times if the run was faster than the fault."""
    for attempt in range(TRIES):
        try:
            outcome = fault.produce(replace(campaign, rng=rng), place / str(attempt))
            return Row(outcome, 'refused' if outcome.result.startswith('refused') else 'survived')
        except NotInjected as e:
            missed = str(e)
        except (Skipped, pytest.skip.Exception) as e:
            return Row(Outcome(fault.name, result=f'skipped: {e}'), 'skipped')
        except (Failed, JobFailed) as e:
            return Row(Outcome(fault.name, result=f'FAILED: {e}'), 'failed')
    return Row(Outcome(fault.name, result=f'FAILED: it came too late {TRIES} times: {missed}'), 'failed')


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ['| fault | moment | exit code | cause that was named | after the resume |', '| --- | --- | --- | --- | --- |']
    for row in rows:
        o = row.outcome
        cells = (o.fault, o.moment, '' if o.exit_code is None else str(o.exit_code), o.cause, o.result)
        lines.append('| ' + ' | '.join(' '.join(c.replace('|', '\\|').split())[:300] for c in cells) + ' |')
    return '\n'.join(lines)
