"""The 27 registries exist, and every target string resolves (or names the optional package that it needs)."""

from __future__ import annotations

import pytest

from llmfoundry import registry

NAMES = {
    'loggers', 'optimizers', 'schedulers', 'tokenizers', 'callbacks', 'algorithms', 'callbacks_with_config', 'dataloaders', 'dataset_replication_validators', 'collators', 'data_specs',
    'metrics', 'models', 'norms', 'param_init_fns', 'module_init_fns', 'ffns', 'ffns_with_norm', 'ffns_with_megablocks', 'attention_classes', 'attention_implementations', 'fcs', 'icl_datasets',
    'config_transforms', 'load_planners', 'save_planners', 'tp_strategies',
}


def test_the_27_names() -> None:
    assert set(registry.all_registries()) == NAMES
    assert len(NAMES) == 27
    for name, found in registry.all_registries().items():
        assert getattr(registry, name) is found
        assert found.description, name


@pytest.mark.parametrize('name', sorted(NAMES))
def test_every_target_resolves(name: str) -> None:
    found = registry.all_registries()[name]
    for entry in found.names():
        assert found.get(entry) is not None
        assert set(found.find(entry)) == {'module', 'file', 'line_no', 'docstring'}


def test_register_replace_and_restore() -> None:
    with registry.save_registry():
        registry.optimizers.register('mine', func='builtins:dict')
        assert registry.optimizers.get('mine') is dict

        @registry.optimizers.register('mine')
        class Mine:
            pass

        assert registry.optimizers.get('mine') is Mine
        extra = registry.create_registry('llmfoundry', 'extra', description='x')
        extra.register('a', func=1)
        with pytest.raises(registry.RegistryError, match='a registry called llmfoundry -> extra already exists'):
            registry.create_registry('llmfoundry', 'extra')
    assert 'mine' not in registry.optimizers
    assert 'extra' not in registry.all_registries()


def test_unknown_name_says_where_and_what_is_near() -> None:
    with pytest.raises(ValueError) as e:
        registry.optimizers.get('decoupled_adam')
    assert str(e.value) == (
        "Cannot find 'decoupled_adam' in the registry llmfoundry -> optimizers. Did you mean 'decoupled_adamw'? "
        'Available names: adalr_lion, clip_lion, decoupled_adamw, decoupled_lionw, no_op'
    )


def test_broken_target_names_the_cause() -> None:
    with registry.save_registry():
        registry.optimizers.register('broken', func='no_such_package.module:thing')
        with pytest.raises(ValueError, match="the entry 'broken' points to 'no_such_package.module:thing', which cannot be imported: No module named 'no_such_package'"):
            registry.optimizers.get('broken')


def test_construct_from_registry() -> None:
    with registry.save_registry():
        registry.metrics.register('cls', func='collections:OrderedDict')
        registry.metrics.register('fn', func='builtins:sorted')
        assert registry.construct_from_registry('cls', registry.metrics, kwargs={'a': 1}) == {'a': 1}
        assert registry.construct_from_registry('fn', registry.metrics, kwargs={'reverse': True})([1, 2]) == [2, 1]
        with pytest.raises(ValueError, match='must be a subclass of list'):
            registry.construct_from_registry('cls', registry.metrics, pre_validation_function=list)
        with pytest.raises(ValueError, match='must build a list, got OrderedDict'):
            registry.construct_from_registry('cls', registry.metrics, post_validation_function=list)


def test_import_file(tmp_path) -> None:
    good, bad = tmp_path / 'good.py', tmp_path / 'bad.py'
    good.write_text("from llmfoundry import registry\nregistry.metrics.register('from_file', func='builtins:int')\n")
    bad.write_text('1 / 0\n')
    with registry.save_registry():
        registry.import_file(good)
        assert registry.metrics.get('from_file') is int
    with pytest.raises(FileNotFoundError, match="code_paths: no file at '.*missing.py'"):
        registry.import_file(tmp_path / 'missing.py')
    with pytest.raises(RuntimeError, match=r"code_paths: '.*bad.py' failed: ZeroDivisionError: division by zero"):
        registry.import_file(bad)


def test_entry_points_are_entries(tmp_path, monkeypatch) -> None:
    """An installed distribution adds names through the group ``llmfoundry_<name>``."""
    info = tmp_path / 'plugin-1.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text('Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n')
    (info / 'entry_points.txt').write_text('[llmfoundry_metrics]\nfrom_plugin = plugin_module:thing\n')
    (tmp_path / 'plugin_module.py').write_text('thing = 42\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry.metrics, '_entry_point_cache', None)
    assert 'from_plugin' in registry.metrics
    assert registry.metrics.get('from_plugin') == 42
    assert registry.metrics.get_entry_points() == {'from_plugin': 42}
    monkeypatch.setattr(registry.metrics, '_entry_point_cache', None)
