"""Errors of the checks that run before the first step."""

from __future__ import annotations

from llmfoundry.errors.base import UserError


class MaskLintError(UserError):
    """Rows of training data that would teach the wrong thing; ``report`` is the text with every finding, ``rules`` the names of the broken rules."""

    def __init__(self, report: str, rules: tuple[str, ...] = ()) -> None:
        super().__init__(report, report=report, rules=rules)
