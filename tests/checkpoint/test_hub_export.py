"""The exported code: which files go along, and how their imports are rewritten."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

from llmfoundry.checkpoint.flatten_imports import edit_files_for_hf_compatibility, flatten_source
from llmfoundry.checkpoint.hub_export import portable_config, portable_modules, unportable_layers, write_model_code
from llmfoundry.layers_registry import norms
from llmfoundry.registry import save_registry


@pytest.fixture(scope='module')
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('code')
    write_model_code(folder)
    return folder


def _imports(path: Path) -> list[ast.Import | ast.ImportFrom]:
    return [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, (ast.Import, ast.ImportFrom))]


def test_all_files_are_flat_and_need_torch_and_transformers_only(code: Path) -> None:
    stems = {p.stem for p in code.glob('*.py')}
    assert {'modeling_mpt', 'configuration_mpt', 'typed_registry', 'layers_registry', 'attention', 'norm', 'ffn', 'moe', 'param_init'} <= stems
    assert 'composer_mpt' not in stems
    foreign = set()
    for path in code.glob('*.py'):
        for node in _imports(path):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f'{path.name}:{node.lineno}'
                named = [node.module] if node.module else [a.name for a in node.names]
                assert set(named) <= stems, f'{path.name}:{node.lineno} names {named}'
            else:
                foreign |= {(node.module or '') if isinstance(node, ast.ImportFrom) else a.name for a in node.names}
    assert not {m for m in foreign if m.split('.')[0] in {'llmfoundry', 'composer', 'omegaconf', 'streaming'}}


@pytest.mark.parametrize('entry', ['modeling_mpt.py', 'configuration_mpt.py'])
def test_the_hub_loader_finds_every_file_from_each_entry(entry: str, code: Path) -> None:
    # The expression that transformers uses to find files.
    named = set(re.findall(r'^\s*from\s+\.(\S+)\s+import', (code / entry).read_text(), flags=re.MULTILINE))
    assert named | {Path(entry).stem} == {p.stem for p in code.glob('*.py')}


def test_no_docstring_looks_like_an_import_to_the_hub_loader(code: Path) -> None:
    stems = {p.stem for p in code.glob('*.py')}
    for path in code.glob('*.py'):
        assert set(re.findall(r'^\s*from\s+\.(\S+)\s+import', path.read_text(), flags=re.MULTILINE)) <= stems, path.name


def test_registry_targets_are_flat(code: Path) -> None:
    text = (code / 'layers_registry.py').read_text()
    assert '.models.' not in text
    targets = set(re.findall(r"""['"]\.(\w+):""", text))
    assert targets and targets <= {p.stem for p in code.glob('*.py')}


def test_every_registered_layer_file_is_portable() -> None:
    for path in portable_modules().values():
        assert os.path.isfile(path)


@pytest.mark.parametrize(
    ('before', 'after'),
    [
        ('from llmfoundry.models.layers.norm import RMSNorm as R, LPLayerNorm\n', 'from .norm import RMSNorm as R, LPLayerNorm\n'),
        ('from llmfoundry.models.layers import attention\n', 'from . import attention\n'),
        ('from llmfoundry import layers_registry as lr\n', 'from . import layers_registry as lr\n'),
        ('if x:\n    from llmfoundry.layers_registry import (\n        norms,\n        fcs,\n    )\n    y = 1\n', 'if x:\n    from .layers_registry import norms, fcs\n    y = 1\n'),
        ('import torch  # kept\nfrom torch import nn\n', 'import torch  # kept\nfrom torch import nn\n'),
        ('if TYPE_CHECKING:\n    from composer import State\n', 'if TYPE_CHECKING:\n    pass\n'),
        ('import composer, os\nfrom omegaconf import DictConfig\nz = 1\n', 'import os\nz = 1\n'),
        ('from llmfoundry.metrics import TokenAccuracy\nz = 1\n', 'z = 1\n'),
    ],
)
def test_rewriting(before: str, after: str) -> None:
    assert flatten_source(before) == after


def test_relative_imports_of_any_depth() -> None:
    name = 'llmfoundry.models.layers.attention'
    assert flatten_source('from ...layers_registry import norms\n', name) == 'from .layers_registry import norms\n'
    assert flatten_source('from .norm import RMSNorm\n', name) == 'from .norm import RMSNorm\n'
    assert flatten_source('from . import norm\n', name) == 'from . import norm\n'


def test_an_import_without_a_flat_form_is_an_error() -> None:
    with pytest.raises(ImportError, match='`import llmfoundry.models` cannot be flattened'):
        flatten_source('import llmfoundry.models\n')


def test_code_of_plug_ins_is_edited_in_place(tmp_path: Path) -> None:
    (tmp_path / 'modeling_own.py').write_text('from acme.layers.norms import AcmeNorm\nfrom llmfoundry.models.layers.norm import RMSNorm\nimport torch\n')
    edit_files_for_hf_compatibility(str(tmp_path), ('llmfoundry', 'acme'))
    assert (tmp_path / 'modeling_own.py').read_text() == 'from .norms import AcmeNorm\nfrom .norm import RMSNorm\nimport torch\n'


def test_public_import_path() -> None:
    from llmfoundry.utils import edit_files_for_hf_compatibility as public

    assert public is edit_files_for_hf_compatibility


def test_config_for_any_machine() -> None:
    trained = {
        'init_device': 'meta', 'attn_config': {'attn_impl': 'flash', 'alibi': True}, 'd_model': 8,
        'ffn_config': {'ffn_type': 'mb_dmoe', 'moe_world_size': 8, 'device_mesh': [1, 8], 'moe_top_k': 2},
    }
    config = portable_config(trained)
    assert config['init_device'] == 'cpu' and config['attn_config'] == {'attn_impl': 'torch', 'alibi': True}
    assert config['ffn_config'] == {'ffn_type': 'mb_dmoe', 'moe_world_size': 1, 'moe_top_k': 2}
    dropout = portable_config({'attn_config': {'attn_pdrop': 0.0}})['attn_config']['attn_pdrop']
    assert type(dropout) is int, 'a float is refused by the strict MptConfig of transformers 5'
    assert trained['attn_config']['attn_impl'] == 'flash' and trained['ffn_config']['moe_world_size'] == 8


def test_layers_of_plug_ins_are_pointed_out() -> None:
    assert unportable_layers({'norm_type': 'rmsnorm', 'fc_type': 'torch', 'ffn_config': {'ffn_type': 'mptglu'}}) == []
    with save_registry():
        norms.register('acme_norm', func='acme.norms:AcmeNorm')
        assert unportable_layers({'norm_type': 'Acme_Norm', 'fc_type': {'name': 'torch'}}) == ['norms: Acme_Norm (acme.norms)']
