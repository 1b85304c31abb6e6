"""``llmfoundry check data``: looks at the data of a run before it is started."""

from __future__ import annotations

from typing import Annotated

import typer

from llmfoundry.cli.config_commands import Overrides, YamlArgument
from llmfoundry.typed_registry import resolve_target

__all__ = ['app', 'data']

app = typer.Typer(help='Look at the data of a run before it is started.', no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Look at the data of a run before it is started."""


@app.command('data')
def data(
    yaml_path: YamlArgument,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option('--rows', '-n', min=1, help='Examples to look at, per loader.')] = 50,
    show: Annotated[int, typer.Option('--show', min=0, help='Rows to print, per loader; rows with errors come on top.')] = 3,
    html: Annotated[str | None, typer.Option('--html', metavar='FILE', help='Write a page with all rows, token by token.')] = None,
    as_json: Annotated[bool, typer.Option('--json', help='Print counts and findings as JSON and nothing else.')] = False,
    color: Annotated[bool | None, typer.Option('--color/--no-color', help='By default, colours if the output is a terminal; otherwise trained tokens stand in [[...]].')] = None,
) -> None:
    """Show the first rows of each loader with the trained tokens marked, and check them: exit 0 if they are right, 1 if not."""
    code = resolve_target('llmfoundry.command_utils.check_data:check_data')(yaml_path, overrides or [], rows, html, as_json, color, show)
    raise typer.Exit(code)
