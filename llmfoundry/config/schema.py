"""JSON Schema (draft 2020-12) of a training YAML, for editors and for tools that write configs.

Generated from the same typed blocks and signatures that validation uses, so installed plug-ins appear by themselves. Every
place also accepts an interpolation string, since editors see the file before it is resolved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llmfoundry import registry
from llmfoundry.config.base import Block, field_types, mandatory_keys
from llmfoundry.config.blocks import target_signature
from llmfoundry.config.components import DATASET_TARGETS, MODEL_BUILDER_KEYS, OPTIMIZER_BUILDER_KEYS, dataset_signature, fsdp_fields
from llmfoundry.config.mpt_block import MPT_SUB_BLOCKS, MPTBlock
from llmfoundry.config.renames import KNOWN_VARIABLES
from llmfoundry.config.signatures import Parameter, Signature, read_signature
from llmfoundry.config.train import TrainConfig
from llmfoundry.config.value_types import type_schema
from llmfoundry.typed_registry import TypedRegistry

__all__ = ['train_schema']

Schema = dict[str, Any]
_INTERPOLATION: Schema = {'type': 'string', 'pattern': r'\$\{'}
_OPEN: Schema = {}


def train_schema() -> Schema:
    """The schema of a training config with everything that is registered now."""
    properties = _block_properties(TrainConfig)
    loader = _named(registry.dataloaders, ('tokenizer', 'device_batch_size'), ('label',), special={'text': {'dataset': _dataset('text')}})
    components: dict[str, Schema] = {
        'model': _named(registry.models, ('tokenizer',), MODEL_BUILDER_KEYS - {'name'}, replaced={'mpt_causal_lm': _mpt()}),
        'optimizer': _named(registry.optimizers, ('params',), OPTIMIZER_BUILDER_KEYS - {'name'}),
        'scheduler': _named(registry.schedulers),
        'tokenizer': {'type': 'object', 'properties': {'name': {'type': 'string'}, 'kwargs': type_schema(dict | None)}, 'required': ['name'], 'additionalProperties': False},
        'train_loader': loader,
        'eval_loader': {'anyOf': [loader, {'type': 'array', 'items': loader}, {'type': 'null'}]},
        'eval_loaders': {'anyOf': [{'type': 'array', 'items': loader}, {'type': 'null'}]},
        'callbacks': _group(registry.callbacks, registry.callbacks_with_config),
        'loggers': _group(registry.loggers),
        'algorithms': _group(registry.algorithms),
        'fsdp_config': {'anyOf': [_object(fsdp_fields()), {'type': 'null'}]},
    }
    for key, schema in components.items():
        properties[key] = {'description': properties[key].get('description', ''), 'anyOf': [schema, _INTERPOLATION]}
    for name in sorted(KNOWN_VARIABLES - set(properties)):
        properties[name] = {'description': 'Used for interpolation only; newer files put it under `variables:`.'}
    return {
        '$schema': 'https://json-schema.org/draft/2020-12/schema',
        'title': 'LLM Foundry training config',
        'type': 'object',
        'properties': properties,
        'required': mandatory_keys(TrainConfig),
        'additionalProperties': False,
    }


def _block_properties(block: type[Block]) -> dict[str, Schema]:
    types = field_types(block)
    properties = {}
    for name, info in block.model_fields.items():
        properties[name] = {**type_schema(types[name]), 'description': info.description or ''}
        if not info.is_required() and info.default is not None:
            properties[name]['default'] = info.default
    return properties


def _mpt() -> Schema:
    properties = _block_properties(MPTBlock)
    for key, sub in MPT_SUB_BLOCKS.items():
        # Mixture-of-experts and plug-in layers add keys of their own to these blocks.
        nested = {'type': 'object', 'properties': _block_properties(sub), 'additionalProperties': key != 'attn_config'}
        properties[key] = {'description': properties[key]['description'], 'anyOf': [nested, {'type': 'null'}, _INTERPOLATION]}
    return {'properties': properties, 'additionalProperties': False}


def _object(parameters: Mapping[str, Parameter], closed: bool = True, extra: Iterable[str] = (), special: Mapping[str, Schema] | None = None) -> Schema:
    """Keys of a component; ``extra`` keys take anything, ``special`` ones their own schema."""
    properties = {name: _parameter(p) for name, p in parameters.items()} | {name: _OPEN for name in sorted(extra)} | dict(special or {})
    schema: Schema = {'type': 'object', 'properties': properties, 'additionalProperties': not closed}
    required = [name for name, p in parameters.items() if p.required]
    return {**schema, 'required': required} if required else schema


def _parameter(parameter: Parameter) -> Schema:
    schema = type_schema(parameter.type)
    return {**schema, 'default': parameter.default} if parameter.default is not None else schema


def _without(signature: Signature, provided: Iterable[str]) -> dict[str, Parameter]:
    hidden = set(provided)
    return {n: p for n, p in signature.parameters.items() if n not in hidden}


def _named(
    reg: TypedRegistry,
    provided: Iterable[str] = (),
    extra: Iterable[str] = (),
    special: Mapping[str, Mapping[str, Schema]] | None = None,
    replaced: Mapping[str, Schema] | None = None,
) -> Schema:
    """A block {name, **arguments}: the name chooses which arguments there are."""
    cases = []
    for name in reg.names():
        signature = target_signature(reg, name)
        then = (replaced or {}).get(name)
        if then is None and signature is not None:
            then = _object(_without(signature, provided), signature.closed, ('name', *extra), (special or {}).get(name))
        if then is not None:
            cases.append({'if': {'properties': {'name': {'const': name}}, 'required': ['name']}, 'then': then})
    name_schema = {'enum': reg.all_names(), 'description': reg.description}
    return {'type': 'object', 'properties': {'name': {'anyOf': [name_schema, _INTERPOLATION]}}, 'required': ['name'], 'allOf': cases}


def _group(*registries: TypedRegistry) -> Schema:
    """A block {name: arguments}."""
    properties = {}
    for reg in registries:
        for name in reg.all_names():
            signature = target_signature(reg, name)
            arguments = _object(_without(signature, ('train_config',)), signature.closed) if signature is not None else {'type': 'object'}
            properties[name] = {'anyOf': [arguments, {'type': 'null'}, _INTERPOLATION]}
    return {'anyOf': [{'type': 'object', 'properties': properties, 'additionalProperties': False}, {'type': 'null'}]}


def _dataset(loader_name: str) -> Schema:
    if loader_name not in DATASET_TARGETS:
        return {'type': 'object'}
    signature = dataset_signature(loader_name)
    schema = _object(_without(signature, ('tokenizer', 'batch_size')))
    stream = read_signature('streaming:Stream')
    if stream is not None:
        streams = {'type': 'object', 'additionalProperties': {'anyOf': [_object(stream.parameters), _INTERPOLATION]}}
        schema['properties']['streams'] = {'anyOf': [streams, {'type': 'null'}, _INTERPOLATION]}
    return {'anyOf': [schema, _INTERPOLATION]}
