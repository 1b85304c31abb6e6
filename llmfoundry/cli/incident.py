"""``llmfoundry incident``: why a run ended, from what its ranks left behind."""

from __future__ import annotations

from typing import Annotated

import typer

from llmfoundry.typed_registry import resolve_target

__all__ = ['incident']


def incident(
    folder: Annotated[str, typer.Argument(metavar='FOLDER', help='The incident folder that the summary names, or the save folder of the run.')],
    rank: Annotated[int | None, typer.Option('--rank', '-r', min=0, help='Print what this rank left, with its traceback and the stacks of its threads.')] = None,
) -> None:
    """Print the summary of a run that failed, or the bundle of one of its ranks; exit 1 when there is none."""
    code = resolve_target('llmfoundry.command_utils.incidents.report:report')(folder, rank)
    raise typer.Exit(code)
