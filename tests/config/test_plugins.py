"""Plug-ins: components from code_paths and from installed entry points are named, checked and shown like ours; config transforms run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmfoundry import registry
from llmfoundry.config.batch_size import calculate_batch_size_info, update_config_with_batch_size_info
from llmfoundry.config.load import load_train_config
from llmfoundry.config.schema import train_schema
from llmfoundry.errors import ConfigError
from tests.config.base_config import BASE, problems_of, write

PLUGIN = """\
from llmfoundry.registry import callbacks, norms

@callbacks.register('counter')
class Counter:
    def __init__(self, every: int, label: str = 'n') -> None:
        pass

@norms.register('my_norm')
class MyNorm:
    pass
"""


@pytest.fixture(autouse=True)
def _restored_registries():
    with registry.save_registry():
        yield


def test_code_paths_register_before_validation(tmp_path: Path) -> None:
    (tmp_path / 'plugin.py').write_text(PLUGIN)
    overrides = (f'code_paths=[{tmp_path}/plugin.py]', 'callbacks.counter.every=3', 'model.norm_type=my_norm')
    assert problems_of(tmp_path, overrides=overrides) == []
    assert problems_of(tmp_path, overrides=(overrides[0], 'callbacks.counter.evry=3', 'callbacks.counter.label=3')) == [
        "callbacks.counter.evry (command line): unknown key (did you mean 'every'?)",
        'callbacks.counter.label (command line): expected a string, got 3',
    ]
    assert train_schema()['properties']['callbacks']['anyOf'][0]['anyOf'][0]['properties']['counter']['anyOf'][0] == {
        'type': 'object', 'additionalProperties': False, 'required': ['every'],
        'properties': {'every': {'anyOf': [{'type': 'integer'}, {'type': 'string', 'pattern': r'\$\{'}]}, 'label': {'type': 'string', 'default': 'n'}},
    }  # fmt: skip


def test_without_the_plugin_its_names_are_unknown(tmp_path: Path) -> None:
    assert problems_of(tmp_path, overrides=('callbacks.counter.every=3',))[0].startswith("callbacks.counter (command line): 'counter' is not in the registry llmfoundry -> callbacks")


def test_missing_and_failing_code_paths(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='code_paths: no file at'):
        load_train_config(write(tmp_path), [f'code_paths=[{tmp_path}/none.py]'])
    (tmp_path / 'bad.py').write_text('1 / 0\n')
    with pytest.raises(RuntimeError, match='ZeroDivisionError') as e:
        load_train_config(write(tmp_path), [f'code_paths=[{tmp_path}/bad.py]'])
    assert isinstance(e.value.__cause__, ZeroDivisionError)


def test_entry_points_of_an_installed_package_need_no_import(tmp_path: Path) -> None:
    package = tmp_path / 'site' / 'my_plugin'
    package.mkdir(parents=True)
    (package / '__init__.py').write_text('raise RuntimeError("validation must not import plug-ins")\n')
    (package / 'schedule.py').write_text('class Steps:\n    def __init__(self, t_warmup: str, heights: list[float]) -> None:\n        pass\n')
    info = tmp_path / 'site' / 'my_plugin-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text('[llmfoundry_schedulers]\nsteps = my_plugin.schedule:Steps\n')
    text = BASE.replace('  name: cosine_with_warmup\n', '  name: steps\n  heights: [1.0, high]\n')
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / 'site')!r})
from llmfoundry.config.load import load_train_config
try:
    load_train_config({write(tmp_path, text)!r})
except ValueError as e:
    print(*[str(p).replace({str(tmp_path)!r} + '/', '') for p in e.problems], sep='\\n')
assert 'my_plugin' not in sys.modules and 'torch' not in sys.modules
"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert out == ["scheduler.heights (c.yaml:28): expected a list of numbers, got [1.0, 'high']", "scheduler.alpha_f (c.yaml:30): unknown key (valid keys: heights, name, t_warmup)"]


def test_config_transforms_run_before_keys_are_checked(tmp_path: Path) -> None:
    def fold_platform_keys(config: dict) -> dict:
        config = dict(config)
        config['metadata'] = {'platform': config.pop('platform_id')}
        return config

    registry.config_transforms.register('fold_platform_keys', func=fold_platform_keys)
    assert load_train_config(write(tmp_path), ['platform_id=7']).metadata == {'platform': 7}


def test_a_plug_in_may_replace_the_batch_arithmetic(tmp_path: Path) -> None:
    def replicated(config: dict) -> dict:
        return update_config_with_batch_size_info(config, *calculate_batch_size_info(config['global_train_batch_size'], 1, 2, world_size=2))

    registry.config_transforms.register('update_batch_size_info', func=replicated)
    config = load_train_config(write(tmp_path))
    assert (config.device_train_batch_size, config.device_train_microbatch_size, config.device_train_grad_accum) == (4, 1, 4)


def test_a_failing_transform_is_one_of_the_problems(tmp_path: Path) -> None:
    def fail(config: dict) -> dict:
        raise KeyError('x')

    registry.config_transforms.register('fails', func=fail)
    with pytest.raises(ConfigError) as e:
        load_train_config(write(tmp_path), ['seed=s'])
    assert sorted(map(str, e.value.problems)) == ["config_transforms.fails: failed: KeyError: 'x'", "seed (command line): expected an integer, got 's'"]
