"""``import llmfoundry``, the command line and ``validate`` load neither torch nor what is built on it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ('torch', 'composer', 'streaming', 'transformers', 'datasets', 'matplotlib', 'pandas')


def _loaded(code: str) -> list[str]:
    script = f'{code}\nimport sys\nprint(" ".join(m for m in {HEAVY!r} if m in sys.modules))'
    return subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=True).stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    'code',
    [
        'import llmfoundry',
        'import llmfoundry.registry',
        'import llmfoundry.config.load, llmfoundry.config.train, llmfoundry.config.schema',
        'import llmfoundry.cli',
        'import llmfoundry.dist',
        'import llmfoundry.utils, llmfoundry.callbacks, llmfoundry.data, llmfoundry.models, llmfoundry.optim, llmfoundry.tokenizers, llmfoundry.command_utils',
        'from llmfoundry import registry; [r.names() for r in registry.all_registries().values()]',
    ],
)
def test_light(code: str) -> None:
    assert _loaded(code) == []


def test_help_is_light() -> None:
    code = (
        'import sys; sys.argv = ["llmfoundry", "--help"]\nfrom llmfoundry.cli import main\n'
        'try:\n    main()\nexcept SystemExit as e:\n    assert not e.code, e.code\nprint()'
    )
    assert _loaded(code) == []


def test_top_level_names() -> None:
    """Every public name of the package resolves."""
    import llmfoundry

    assert len(llmfoundry.__all__) >= 20
    for name in llmfoundry.__all__:
        assert getattr(llmfoundry, name) is not None, name
    with pytest.raises(AttributeError, match='no attribute'):
        llmfoundry.no_such_name  # noqa: B018
