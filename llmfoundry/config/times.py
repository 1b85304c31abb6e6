"""Times as Composer writes them: a number and a unit, ``100ba``."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from llmfoundry.config.value_types import UNRESOLVED, show

__all__ = ['UNITS', 'Duration', 'parse_time', 'time_problem']

UNITS = ('ep', 'iter', 'ba', 'sp', 'tok', 'dur', 'sec')
_TIME = re.compile(r'^\s*([\d_,]*\.?\d+)\s*([A-Za-z]+)\s*$')


class Duration(NamedTuple):
    """A parsed time."""

    value: float
    unit: str


def parse_time(value: Any, int_unit: str = 'ep') -> Duration | None:
    """``'100ba'`` -> (100, 'ba'); an integer counts ``int_unit``; None if it is not a time. Fractions go with dur alone, the share of the run."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return Duration(value, int_unit)
    match = _TIME.match(value) if isinstance(value, str) else None
    if match is None or match.group(2).lower() not in UNITS:
        return None
    number, unit = float(match.group(1).replace('_', '').replace(',', '')), match.group(2).lower()
    return Duration(number, unit) if number.is_integer() or unit == 'dur' else None


def time_problem(value: Any) -> str | None:
    """What is wrong with a time, or None."""
    if value is None or value is UNRESOLVED or parse_time(value) is not None:
        return None
    return f"expected a time such as '100ba' (units {', '.join(UNITS)}; fractions with dur only), got {show(value)}"
