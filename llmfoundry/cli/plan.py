"""``llmfoundry plan``: whether a run fits into memory, before it is started."""

from __future__ import annotations

from typing import Annotated

import typer

from llmfoundry.cli.config_commands import Overrides, YamlArgument
from llmfoundry.errors import ConfigError
from llmfoundry.typed_registry import resolve_target

__all__ = ['plan']


def plan(
    yaml_path: YamlArgument,
    overrides: Overrides = None,
    devices: Annotated[int | None, typer.Option('--devices', min=1, help='Number of processes; by default that of the environment.')] = None,
    device_memory: Annotated[str | None, typer.Option('--device-memory', metavar='SIZE', help='Memory of one device, e.g. 80GB; by default what this machine has free.')] = None,
    device: Annotated[str | None, typer.Option('--device', metavar='cpu|cuda', help='By default cuda where there is one, or where --device-memory is given.')] = None,
    as_json: Annotated[bool, typer.Option('--json', help='Print the figures as JSON and nothing else.')] = False,
) -> None:
    """Plan the memory of a training run without weights or data: what it takes, whether it fits, the largest microbatch, and what else would fit."""
    try:
        resolve_target('llmfoundry.config.summary:validation_summary')(yaml_path, overrides or [], devices)  # mistakes are told before torch is imported
        typer.echo(resolve_target('llmfoundry.command_utils.plan.command:plan')(yaml_path, overrides or [], devices, device_memory, device, as_json))
    except ConfigError as e:
        typer.echo(str(e), err=True)
        raise typer.Exit(1) from None
