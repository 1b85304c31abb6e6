"""The ``llmfoundry`` command as a user meets it: output, exit codes, and what it does not import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.config.base_config import BASE, edited, write

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ('torch', 'composer', 'streaming', 'transformers', 'datasets', 'numpy')


def run(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own and appends the heavy packages that it imported to the standard error."""
    code = f"""
import atexit, sys
atexit.register(lambda: print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr))
sys.argv = ['llmfoundry', *sys.argv[1:]]
from llmfoundry.cli import main
main()
"""
    environment = {**os.environ, 'COLUMNS': '200', **(env or {})}
    environment.pop('WORLD_SIZE', None) if env is None else None
    return subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, cwd=ROOT, env=environment)


def light(result: subprocess.CompletedProcess[str]) -> bool:
    return result.stderr.rstrip().endswith('HEAVY []')


def test_help_names_the_commands_and_loads_nothing_heavy() -> None:
    result = run('--help')
    assert result.returncode == 0 and light(result)
    for command in ('train', 'validate', 'schema', 'registry', 'data_prep'):
        assert command in result.stdout


@pytest.mark.parametrize('command', ['train', 'validate', 'schema', 'registry', 'data_prep'])
def test_help_of_each_command_is_light(command: str) -> None:
    result = run(command, '--help')
    assert result.returncode == 0 and light(result), result.stderr


def test_validate_prints_a_summary(tmp_path: Path) -> None:
    path = write(tmp_path)
    result = run('validate', path, 'max_duration=20ba')
    assert (result.returncode, result.stdout) == (0, f"""\
{path}: valid
  model: mpt_causal_lm (d_model 16, 2 layers, 2 heads)
  data: text, sequences of 64 tokens; tokenizer llmfoundry://gpt2
  run: 20ba, precision amp_bf16, optimizer decoupled_adamw, scheduler cosine_with_warmup
  batch: global 8 samples = 1 process x device 8; device 8 = 2 x microbatch 4; evaluation 4 per device
""")
    assert light(result)


def test_validate_reports_everything_once_and_exits_1(tmp_path: Path) -> None:
    path = write(tmp_path, edited(('  d_model: 16', '  d_modl: 16'), ('precision: amp_bf16', 'precision: bf16')))
    result = run('validate', path, 'seed=x')
    assert (result.returncode, result.stdout) == (1, '')
    assert light(result)
    assert result.stderr.replace('HEAVY []\n', '') == f"""\
3 problems in {path}:
  model.d_modl ({path}:6): unknown key (did you mean 'd_model'?)
  precision ({path}:41): expected one of 'fp32', 'amp_fp16', 'amp_bf16', 'amp_fp8', got 'bf16'
  seed (command line): expected an integer, got 'x'
"""


def test_validate_for_a_cluster(tmp_path: Path) -> None:
    result = run('validate', write(tmp_path), '--world-size', '8')
    assert 'global 8 samples = 8 processes x device 1' in result.stdout
    result = run('validate', write(tmp_path), '--world-size', '3')
    assert result.returncode == 1
    assert 'global batch size 8 is not divisible by the 3 data-parallel ranks, so it cannot be the same on each; use 6 or 9' in result.stderr


def test_validate_without_a_file_is_a_usage_error() -> None:
    result = run('validate')
    assert result.returncode == 2 and "Missing argument 'YAML'" in result.stderr


def test_missing_file(tmp_path: Path) -> None:
    result = run('validate', f'{tmp_path}/none.yaml')
    assert result.returncode == 1 and result.stderr.startswith(f'1 problem in {tmp_path}/none.yaml:\n  yaml: no such file\n')


def test_train_stops_at_a_wrong_config_without_a_traceback(tmp_path: Path) -> None:
    result = run('train', write(tmp_path, BASE.replace('lr: 6e-4', 'lr: fast')))
    assert result.returncode == 1 and result.stdout == ''
    assert "optimizer.lr" in result.stderr and "expected a number, got 'fast'" in result.stderr and 'Traceback' not in result.stderr
    assert light(result), 'a wrong config must be found before torch is loaded'


def test_schema(tmp_path: Path) -> None:
    result = run('schema')
    assert result.returncode == 0 and light(result)
    assert json.loads(result.stdout)['required'] == ['model', 'tokenizer', 'optimizer', 'scheduler', 'train_loader', 'max_duration', 'max_seq_len']
    assert run('schema', '-o', f'{tmp_path}/s.json').returncode == 0
    assert (tmp_path / 's.json').read_text() == result.stdout


def test_registry_get() -> None:
    result = run('registry', 'get')
    assert result.returncode == 0 and light(result)
    groups = [line for line in result.stdout.splitlines() if line and not line.startswith(' ')]
    assert len(groups) == 27 and 'optimizers' in groups
    one = run('registry', 'get', '--group', 'optimizers').stdout
    assert one.startswith('optimizers\n') and 'options: adalr_lion, clip_lion, decoupled_adamw, decoupled_lionw, no_op\n' in one


def test_registry_get_of_an_unknown_group_gives_a_hint_and_exits_0() -> None:
    result = run('registry', 'get', '--group', 'optimiser')
    assert result.returncode == 0 and "Did you mean 'optimizers'?" in result.stdout


def test_registry_find() -> None:
    result = run('registry', 'find', 'config_transforms', 'update_batch_size_info')
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert lines[0] == 'module: llmfoundry.config.batch_size'
    assert lines[1].endswith('llmfoundry/config/batch_size.py') and lines[2].startswith('line: ') and lines[3].startswith('docstring: Returns a copy of the config')


@pytest.mark.parametrize(('args', 'message'), [
    (('optimizer', 'x'), "there is no registry 'optimizer'; did you mean 'optimizers'?"),
    (('config_transforms', 'update_batch'), "Cannot find 'update_batch' in the registry llmfoundry -> config_transforms. Did you mean 'update_batch_size_info'?"),
])  # fmt: skip
def test_registry_find_errors(args: tuple[str, str], message: str) -> None:
    result = run('registry', 'find', *args)
    assert result.returncode == 1 and result.stderr.startswith('\nERROR: RegistryError\n' + message) and 'Traceback' not in result.stderr


def test_version() -> None:
    from llmfoundry import __version__

    assert run('--version').stdout == f'{__version__}\n'
