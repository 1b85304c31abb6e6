"""The ``llmfoundry`` command.

Only signatures live here and in the sibling modules, so ``--help`` answers at once; what a command does is named by a string and imported when it runs.
Mistakes of the user (a config, a data file, a name) print as one block without a traceback and exit 1, as in ``scripts/train/train.py``.
"""

from __future__ import annotations

import typer

from llmfoundry._version import __version__
from llmfoundry.cli import check, config_commands, data_prep, incident, launch, plan, registry_commands
from llmfoundry.command_utils.error_report import run_or_exit

__all__ = ['app', 'main']

app = typer.Typer(
    name='llmfoundry',
    help='Pretrain, finetune, evaluate and export language models from one YAML.',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={'help_option_names': ['-h', '--help']},
)
app.command('train')(config_commands.train)
app.command('validate')(config_commands.validate)
app.command('schema')(config_commands.schema)
app.command('plan')(plan.plan)
app.command('launch')(launch.launch)
app.command('incident')(incident.incident)
app.add_typer(check.app, name='check')
app.add_typer(registry_commands.app, name='registry')
app.add_typer(data_prep.app, name='data_prep')


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(False, '--version', callback=_print_version, is_eager=True, help='Print the version and exit.'),
) -> None:
    """Pretrain, finetune, evaluate and export language models from one YAML."""


def main() -> None:
    """Runs the command line; errors of the user end as one block and exit code 1."""
    run_or_exit(app)
