"""Signatures read from source equal those that Python reports, for every component that we register."""

from __future__ import annotations

import inspect
import sys
from typing import Any, Literal, Union

import pytest

from llmfoundry import registry
from llmfoundry.config.components import fsdp_fields
from llmfoundry.config.signatures import read_fields, read_signature, signature_of_object

NAMED_IN_YAML = ('loggers', 'callbacks', 'callbacks_with_config', 'optimizers', 'schedulers', 'algorithms', 'models', 'dataloaders', 'metrics', 'tokenizers')


def _runtime_names(obj: Any) -> set[str]:
    return {n for n, p in inspect.signature(obj).parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


@pytest.mark.parametrize('group', NAMED_IN_YAML)
def test_static_names_equal_runtime_names(group: str) -> None:
    reg = registry.all_registries()[group]
    for name in reg.names():
        target = reg.target(name)
        signature = read_signature(target)
        assert signature is not None, (group, name, target)
        # Static reading also sees through **kwargs that a constructor passes to its base.
        assert _runtime_names(reg.get(name)) <= set(signature.parameters) | ({'args', 'kwargs'}), (group, name)
        if signature.closed and not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(reg.get(name)).parameters.values()):
            assert set(signature.parameters) == _runtime_names(reg.get(name)), (group, name)


def test_streaming_arguments_are_read_from_its_source() -> None:
    from streaming import Stream, StreamingDataset

    for target, cls in (('streaming:StreamingDataset', StreamingDataset), ('streaming:Stream', Stream)):
        signature = read_signature(target)
        assert signature is not None and signature.closed
        assert set(signature.parameters) == _runtime_names(cls)
        assert {n: p.required for n, p in signature.parameters.items()} == {n: p.default is p.empty for n, p in inspect.signature(cls).parameters.items()}


def test_fsdp_keys_come_from_composer() -> None:
    from composer.utils.parallelism import FSDPConfig

    assert set(read_fields('composer.utils.parallelism:FSDPConfig')) == {n for n in FSDPConfig.__annotations__ if not n.startswith('_')}
    assert {'sharding_strategy', 'mixed_precision', 'activation_checkpointing', 'reshard_after_forward'} <= set(fsdp_fields())


def test_types() -> None:
    signature = read_signature('streaming:StreamingDataset')
    assert signature is not None
    assert signature.parameters['shuffle'].type is bool
    assert signature.parameters['download_retry'].type is int
    assert signature.parameters['cache_limit'].type == Union[int, str, None]
    assert signature.parameters['stream_config'].type == Union[dict[str, Any], None]


def test_what_cannot_be_read_is_not_checked() -> None:
    assert read_signature('no_such_package:Thing') is None
    assert read_signature('composer.optim:NoSuchScheduler') is None


def test_objects_are_inspected() -> None:
    def build(width: int, kind: Literal['a', 'b'] = 'a', *, extra: float | None = None, **rest: Any) -> None: ...

    signature = signature_of_object(build)
    assert signature is not None and not signature.closed
    assert {n: p.required for n, p in signature.parameters.items()} == {'width': True, 'kind': False, 'extra': False}
    assert signature.parameters['width'].type is int


def test_reading_imports_nothing() -> None:
    before = set(sys.modules)
    read_signature('composer.loggers:CometMLLogger')
    assert not {m for m in set(sys.modules) - before if m.startswith('comet')}
