"""From a multiple-choice row to prompt and response: a preprocessing function that a YAML names by its import path."""

from __future__ import annotations

from typing import Any, Mapping


def multiple_choice(row: Mapping[str, Any]) -> dict[str, str]:
    """``query``, ``choices`` and ``gold`` (index of the right choice) -> the question with its choices, and the right one."""
    choices = ''.join(f'- {choice}\n' for choice in row['choices'])
    return {'prompt': f'{row["query"]}\nChoices:\n{choices}Answer:', 'response': f' {row["choices"][row["gold"]]}'}
