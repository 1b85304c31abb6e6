"""``llmfoundry registry get|find``: what can be named in a YAML, and where it is defined."""

from __future__ import annotations

import difflib
from typing import Annotated

import typer

from llmfoundry import registry

__all__ = ['app', 'find', 'get']

app = typer.Typer(help='List what a YAML can name.', no_args_is_help=True)


@app.command('get')
def get(group: Annotated[str | None, typer.Option('--group', '-g', help='Show this registry only.')] = None) -> None:
    """Print each registry, what it is for, and its names."""
    registries = registry.all_registries()
    if group is not None and group not in registries:
        near = difflib.get_close_matches(group, registries, n=1)
        hint = f' Did you mean {near[0]!r}?' if near else ''
        typer.echo(f'There is no registry {group!r}.{hint} Registries: {", ".join(registries)}')
        return
    for name, entry in registries.items():
        if group in (None, name):
            typer.echo(_describe(entry))


def _describe(entry: registry.TypedRegistry) -> str:
    available = set(entry.names())
    options = ', '.join(n if n in available else f'{n} (package not installed)' for n in entry.all_names()) or 'none'
    return f'{entry.name}\n  {entry.description}\n  type: {entry.generic_type}\n  options: {options}'


@app.command('find')
def find(
    group: Annotated[str, typer.Argument(help='Registry, e.g. optimizers.')],
    name: Annotated[str, typer.Argument(help='Entry, e.g. decoupled_adamw.')],
) -> None:
    """Print where an entry is defined: module, file, line and docstring."""
    registries = registry.all_registries()
    if group not in registries:
        near = difflib.get_close_matches(group, registries, n=1)
        raise registry.RegistryError(f'there is no registry {group!r}' + (f'; did you mean {near[0]!r}?' if near else f'; registries: {", ".join(registries)}'))
    found = registries[group].find(name)
    for label, key in (('module', 'module'), ('file', 'file'), ('line', 'line_no'), ('docstring', 'docstring')):
        typer.echo(f'{label}: {found[key]}')
