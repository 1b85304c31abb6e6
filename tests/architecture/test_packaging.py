"""What pip sees: the extras, the requirements of the modern stack, and what lands in a wheel."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = {'gpu', 'peft', 'mlflow', 'wandb', 'tensorboard', 'tiktoken', 'dev', 'all'}
# Installed with --no-deps, as the head of modern.txt says.
WITHOUT_DEPENDENCIES = {'mosaicml', 'mosaicml-streaming'}

def has_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


needs_setuptools = pytest.mark.skipif(not has_module('setuptools'), reason='setuptools is not installed')
# setuptools itself builds wheels since 70.1; before, the package `wheel` does.
can_build_wheels = has_module('pip') and has_module('setuptools') and (has_module('wheel') or Version(importlib.metadata.version('setuptools')) >= Version('70.1'))


@pytest.fixture(scope='module')
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that it leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp('source')
    for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / 'llmfoundry', copy / 'llmfoundry', ignore=shutil.ignore_patterns('__pycache__'))
    return copy


def run_python(source: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope='module')
def distribution(source: Path, tmp_path_factory: pytest.TempPathFactory) -> importlib.metadata.Distribution:
    folder = tmp_path_factory.mktemp('metadata')
    run_python(source, 'setup.py', '--quiet', 'egg_info', '--egg-base', str(folder))
    [path] = folder.glob('*.egg-info')
    return importlib.metadata.PathDistribution(path)


def names(requirements: list[str], extra: str | None = None) -> set[str]:
    """Canonical names of the requirements that hold without extras, or with just ``extra``."""
    parsed = [Requirement(line) for line in requirements]
    return {
        canonicalize_name(r.name) for r in parsed
        if (extra is None and not (r.marker and 'extra' in str(r.marker))) or (extra is not None and r.marker and r.marker.evaluate({'extra': extra}) and 'extra' in str(r.marker))
    }


def modern_names() -> set[str]:
    lines = (ROOT / 'requirements' / 'modern.txt').read_text(encoding='utf-8').splitlines()
    return names([line.partition('#')[0].strip() for line in lines if line.partition('#')[0].strip()])


@needs_setuptools
def test_metadata_has_the_extras_and_a_sound_core(distribution: importlib.metadata.Distribution) -> None:
    metadata, requirements = distribution.metadata, distribution.requires
    assert metadata['Name'] == 'llm-foundry'
    assert metadata['Version'] in (ROOT / 'llmfoundry' / '_version.py').read_text(encoding='utf-8') and metadata['Version']
    assert metadata['Requires-Python'] == '>=3.10'
    assert set(metadata.get_all('Provides-Extra')) == EXTRAS
    core = names(requirements)
    assert {'mosaicml', 'mosaicml-streaming', 'torch', 'transformers', 'omegaconf', 'datasets', 'zstandard', 'pydantic', 'rich', 'matplotlib'} <= core
    assert not [r for r in map(Requirement, requirements) if canonicalize_name(r.name) == 'mosaicml' and r.extras], "Composer's extras cap transformers too low"
    assert any(r.name == 'datasets' and r.specifier.contains('3.0') and not r.specifier.contains('2.21') for r in map(Requirement, requirements))
    assert {e.name: e.value for e in distribution.entry_points if e.group == 'console_scripts'} == {
        'llmfoundry': 'llmfoundry.cli:main', 'merge_adapter': 'llmfoundry.command_utils.merge_adapter:main',
    }


@needs_setuptools
def test_all_is_every_extra_but_gpu(distribution: importlib.metadata.Distribution) -> None:
    by_extra = {extra: names(distribution.requires, extra) for extra in EXTRAS}
    assert all(by_extra.values())
    assert by_extra['all'] == set().union(*(by_extra[extra] for extra in EXTRAS - {'gpu', 'all'}))
    assert by_extra['gpu'] == {'flash-attn', 'liger-kernel'} and not by_extra['gpu'] & by_extra['all']


@needs_setuptools
@pytest.mark.parametrize('other', ['mosaicml', 'mosaicml-streaming'])
def test_caps_are_no_looser_than_those_of_the_stack(distribution: importlib.metadata.Distribution, other: str) -> None:
    """Else plain pip may download a release of torch or transformers only to learn that it cannot be used."""
    ours = {canonicalize_name(r.name): r.specifier for r in map(Requirement, distribution.requires)}
    theirs = [r for r in map(Requirement, importlib.metadata.requires(other) or []) if canonicalize_name(r.name) in {'torch', 'transformers'} and not r.marker]
    assert theirs
    for requirement in theirs:
        caps = [Version(part.version) for part in requirement.specifier if part.operator == '<']
        assert caps and not any(ours[canonicalize_name(requirement.name)].contains(cap) for cap in caps), requirement


@needs_setuptools
def test_the_modern_stack_lists_what_this_package_needs(distribution: importlib.metadata.Distribution) -> None:
    assert not names(distribution.requires) - modern_names() - WITHOUT_DEPENDENCIES


@pytest.mark.parametrize('other', sorted(WITHOUT_DEPENDENCIES))
def test_the_modern_stack_lists_what_is_installed_without_dependencies(other: str) -> None:
    needed = names(importlib.metadata.requires(other) or [])
    assert len(needed) > 10
    assert not needed - modern_names()


def test_the_modern_stack_says_how_to_install_the_rest() -> None:
    text = (ROOT / 'requirements' / 'modern.txt').read_text(encoding='utf-8')
    [command] = [line for line in text.splitlines() if '--no-deps' in line and 'pip install' in line]
    assert all(re.search(rf'{name}==', command) for name in WITHOUT_DEPENDENCIES)
    assert not WITHOUT_DEPENDENCIES & modern_names()


def expected_files() -> set[str]:
    """Every module and asset of the checkout, relative to its root."""
    package = ROOT / 'llmfoundry'
    files = (p.relative_to(package) for p in package.rglob('*') if p.is_file() and '__pycache__' not in p.parts)
    return {f'llmfoundry/{p.as_posix()}' for p in files if p.suffix in {'.py', '.typed'} or p.parts[0] == 'assets'}


@needs_setuptools
def test_a_build_holds_every_module_and_asset_and_nothing_else(source: Path, tmp_path: Path) -> None:
    run_python(source, 'setup.py', '--quiet', 'build', '--build-base', str(tmp_path / 'base'), '--build-lib', str(tmp_path / 'lib'))
    assert {'llmfoundry/assets/gpt2/tokenizer.json', 'llmfoundry/assets/austen/austen.txt.xz', 'llmfoundry/py.typed'} <= expected_files()
    assert {p.relative_to(tmp_path / 'lib').as_posix() for p in (tmp_path / 'lib').rglob('*') if p.is_file()} == expected_files()


@pytest.mark.skipif(not can_build_wheels, reason='building a wheel without isolation needs pip and setuptools >= 70.1 (or the package wheel)')
def test_a_wheel_holds_every_module_and_asset_and_nothing_else(source: Path, tmp_path: Path) -> None:
    options = ['--quiet', '--no-deps', '--no-build-isolation', '--disable-pip-version-check', '--wheel-dir', str(tmp_path)]
    run_python(source, '-m', 'pip', 'wheel', *options, str(source))
    [path] = tmp_path.glob('*.whl')
    with zipfile.ZipFile(path) as wheel:
        assert {n for n in wheel.namelist() if '.dist-info/' not in n and not n.endswith('/')} == expected_files()
