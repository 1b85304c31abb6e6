"""What chat templates may ask for. Standard library only: exported folders carry this file beside the tiktoken wrapper."""

from __future__ import annotations

from datetime import datetime

__all__ = ['get_date_string']

# Chat templates were written for English month names, whatever the locale of the machine, so strftime('%b') is not used.
_MONTHS = ('Jan', 'Feb', 'Mar', 'Apr', 'May', 'Jun', 'Jul', 'Aug', 'Sep', 'Oct', 'Nov', 'Dec')


def get_date_string() -> str:
    """Today's date as chat templates expect it, for example ``05 Nov 2026``."""
    today = datetime.now()
    return f'{today.day:02d} {_MONTHS[today.month - 1]} {today.year}'
