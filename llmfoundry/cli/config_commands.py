"""``llmfoundry train``, ``validate`` and ``schema``: the commands around one training YAML."""

from __future__ import annotations

from typing import Annotated

import typer

from llmfoundry.errors import ConfigError
from llmfoundry.typed_registry import resolve_target

__all__ = ['schema', 'train', 'validate']

YamlArgument = Annotated[str, typer.Argument(metavar='YAML', help='Path of the config.')]
Overrides = Annotated[list[str] | None, typer.Argument(metavar='[KEY=VALUE]...', help='Overrides with dotted keys, e.g. train_loader.dataset.split=val.')]


def train(yaml_path: YamlArgument, overrides: Overrides = None) -> None:
    """Train from a YAML file. For several devices: `composer scripts/train/train.py YAML [KEY=VALUE]...`."""
    resolve_target('llmfoundry.command_utils.train_command:main')([yaml_path, *(overrides or [])])


def validate(
    yaml_path: YamlArgument,
    overrides: Overrides = None,
    world_size: Annotated[int | None, typer.Option(min=1, help='Number of processes to check batch sizes for; by default that of the environment.')] = None,
) -> None:
    """Check a training YAML without loading torch: exit 0 with a summary, or 1 with every problem."""
    summary = resolve_target('llmfoundry.config.summary:validation_summary')
    try:
        typer.echo(summary(yaml_path, overrides or [], world_size))
    except ConfigError as e:
        typer.echo(str(e), err=True)
        raise typer.Exit(1) from None


def schema(
    output: Annotated[str | None, typer.Option('--output', '-o', help='File to write; by default standard output.')] = None,
) -> None:
    """Print the JSON Schema of a training YAML, with the keys of installed plug-ins."""
    text = resolve_target('llmfoundry.config.summary:schema_text')()
    if output is None:
        typer.echo(text)
    else:
        with open(output, 'w', encoding='utf-8') as f:
            f.write(text + '\n')
