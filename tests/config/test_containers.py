"""Config helpers that plug-ins of earlier releases call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from omegaconf import OmegaConf

from llmfoundry.config.containers import config_to_yaml, make_dataclass_and_log_config, pop_config, to_dict_container, to_list_container


def test_containers_become_plain_and_resolved() -> None:
    config = OmegaConf.create({'a': 1, 'b': ['${a}', {'c': '${a}'}]})
    assert to_dict_container(config) == {'a': 1, 'b': [1, {'c': 1}]}
    assert type(to_dict_container(config)['b']) is list
    assert to_list_container(config.b) == [1, {'c': 1}]
    with pytest.raises(TypeError, match='expected a mapping, got ListConfig'):
        to_dict_container(config.b)
    with pytest.raises(TypeError, match='config keys must be text, got 1'):
        to_dict_container({1: 2})
    with pytest.raises(TypeError, match='expected a list, got dict'):
        to_list_container({})


def test_pop_config() -> None:
    config = OmegaConf.create({'a': {'b': 1}, 'n': None})
    assert pop_config(config, 'a', convert=True) == {'b': 1}
    assert 'a' not in config
    assert pop_config(config, 'a', must_exist=False, default_value=3) == 3
    assert pop_config({'n': None}, 'n', must_exist=False, default_value=3) == 3
    with pytest.raises(NameError, match="the config has no key 'zzz', which is mandatory"):
        pop_config(config, 'zzz')


@dataclass
class Small:
    """A plug-in's own config."""

    width: int
    variables: dict[str, Any]
    eval_loader: Any = None
    eval_loaders: Any = None


def test_make_dataclass_and_log_config() -> None:
    fields = {'width', 'variables', 'eval_loader', 'eval_loaders'}
    logged, typed = make_dataclass_and_log_config(OmegaConf.create({'width': 2, 'eval_loader': [{'label': 'a'}]}), Small, fields, transforms=[lambda c: {**c, 'width': c['width'] + 1}])
    assert typed == Small(3, {}, None, [{'label': 'a'}]) and logged['width'] == 3
    logged['variables']['x'] = 1
    assert typed.variables == {}
    with pytest.raises(ValueError) as e:
        make_dataclass_and_log_config({'widht': 2, 'zz': 1}, Small, fields)
    assert str(e.value) == "2 problems in the config:\n  widht: unknown key (did you mean 'width'?)\n  zz: unknown key (valid keys: eval_loader, eval_loaders, variables, width)"
    with pytest.raises(ValueError, match='icl_tasks must be set'):
        make_dataclass_and_log_config({'width': 2}, Small, fields, icl_tasks_required=True)


def test_config_to_yaml_keeps_the_order() -> None:
    assert config_to_yaml({'b': 1, 'a': [True, None]}) == 'b: 1\na:\n- true\n- null\n'
