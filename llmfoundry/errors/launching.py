"""Runs that cannot be started."""

from __future__ import annotations

from llmfoundry.errors.base import UserError


class LaunchError(UserError):
    """A run that cannot be handed to the system that was asked for."""


class PreflightError(UserError):
    """Processes of a run that disagree, or that are not all there, found before the first collective."""
