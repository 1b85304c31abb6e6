"""Config blocks become objects, and stay as they were."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from composer import Callback

from llmfoundry import builders, registry
from llmfoundry.errors import ConfigError
from tests.helpers.train_runs import make_data, tiny_config


@pytest.fixture(scope='module')
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_config(make_data(tmp_path_factory.mktemp('builders')))


@pytest.fixture(scope='module')
def tokenizer() -> Any:
    return builders.build_tokenizer('llmfoundry://gpt2', {'model_max_length': 16})


@pytest.fixture(scope='module')
def model(config: dict[str, Any], tokenizer: Any) -> Any:
    return builders.build_composer_model(*builders.split_name(config['model'], 'model'), tokenizer)


def test_split_name() -> None:
    block = {'name': 'x', 'a': {'b': [1]}}
    name, kwargs = builders.split_name(block, 'model')
    kwargs['a']['b'].append(2)
    assert (name, block) == ('x', {'name': 'x', 'a': {'b': [1]}})
    with pytest.raises(ConfigError, match=r"model: has no `name` \(keys seen: \['a'\]\)"):
        builders.split_name({'a': 1}, 'model')


def test_nothing_is_changed(config: dict[str, Any], tokenizer: Any, model: Any) -> None:
    before = copy.deepcopy(config)
    builders.build_dataloader(config['train_loader'], tokenizer, 2)
    builders.build_optimizer(model, *builders.split_name(config['optimizer'], 'optimizer'))
    assert config == before


def test_unknown_arguments_and_names(model: Any, tokenizer: Any) -> None:
    with pytest.raises(TypeError):
        builders.build_scheduler('constant_with_warmup', {'t_warmup': '1ba', 'no_such': 1})
    with pytest.raises(ValueError, match="llmfoundry -> optimizers. Did you mean 'decoupled_adamw'"):
        builders.build_optimizer(model, 'decoupled_adam', {})
    with pytest.raises(ValueError, match='optimizer.params: parameters come from the model'):
        builders.build_optimizer(model, 'decoupled_adamw', {'params': []})
    for build in (builders.build_logger, builders.build_algorithm, builders.build_metric, builders.build_callback):
        with pytest.raises(ValueError, match='Available names'):
            build('no_such_name')


def test_optimizer_keys_of_ours(config: dict[str, Any], tokenizer: Any) -> None:
    model = builders.build_composer_model(*builders.split_name(config['model'], 'model'), tokenizer)
    groups = [{'param_str_match': 'norm', 'weight_decay': 0.0, 'lr': 5e-4}]
    optimizer = builders.build_optimizer(model, 'decoupled_adamw', {'lr': 1e-2, 'disable_grad': ['wte'], 'param_groups': groups})
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all('wte' in n for n in frozen)
    assert [g['lr'] for g in optimizer.param_groups] == [1e-2, 5e-4]
    assert len(optimizer.param_groups[1]['params']) == sum('norm' in n for n, _ in model.named_parameters())


def test_eval_loaders_are_labelled_and_get_the_metrics_of_the_model(config: dict[str, Any], tokenizer: Any) -> None:
    block = {**config['train_loader'], 'dataset': {**config['train_loader']['dataset'], 'split': 'val'}, 'drop_last': False}
    evaluators, keys, gauntlet = builders.build_evaluators(block, None, None, tokenizer=tokenizer, device_eval_batch_size=2)
    assert ([e.label for e in evaluators], keys, gauntlet) == (['eval'], [], None)
    evaluators = builders.build_eval_loaders([{**block, 'label': 'a'}, {**block, 'label': 'b'}], tokenizer, 2)
    evaluators[1].metric_names = ['Own']
    builders.add_metrics_to_eval_loaders(evaluators, ['M'])
    assert [(e.label, e.metric_names) for e in evaluators] == [('eval/a', ['M']), ('eval/b', ['Own'])]
    assert builders.build_evaluators(None, None, None, tokenizer=tokenizer, device_eval_batch_size=2)[0] == []
    with pytest.raises(ConfigError, match='icl_tasks: in-context tasks cannot be built'):
        builders.build_evaluators(None, [{'label': 'x'}], None, tokenizer=tokenizer, device_eval_batch_size=2)


def test_callbacks_with_config_get_a_copy() -> None:
    class Sees(Callback):
        def __init__(self, train_config: dict[str, Any], extra: int = 0) -> None:
            train_config['seen'] = extra
            self.train_config = train_config

    config = {'a': 1}
    with registry.save_registry():
        registry.callbacks_with_config.register('sees', func=Sees)
        built = builders.build_callback('sees', {'extra': 3}, train_config=config)
        with pytest.raises(ValueError, match='callbacks.sees.train_config'):
            builders.build_callback('sees', {'train_config': {}}, train_config=config)
    assert built.train_config == {'a': 1, 'seen': 3} and config == {'a': 1}


def test_master_weights(config: dict[str, Any], tokenizer: Any) -> None:
    name, kwargs = builders.split_name(config['model'], 'model')
    model = builders.build_composer_model(name, kwargs, tokenizer, master_weights_dtype='bf16')
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="model.master_weights_dtype: 'fp8' is not one of"):
        builders.build_composer_model(name, kwargs, tokenizer, master_weights_dtype='fp8')


def test_planners_must_be_planners() -> None:
    with registry.save_registry():
        registry.save_planners.register('wrong', func=SimpleNamespace)
        with pytest.raises(ValueError, match='must build a SavePlanner'):
            builders.build_save_planner('wrong')


def test_components_are_reached_through_registries_only() -> None:
    source = Path(builders.__file__).read_text()
    assert 'from llmfoundry.data' not in source and 'from llmfoundry.models' not in source
