"""What ``llmfoundry validate`` and ``llmfoundry schema`` print."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence

from llmfoundry.config.load import load_train_config
from llmfoundry.config.schema import train_schema
from llmfoundry.config.train import TrainConfig

__all__ = ['describe', 'schema_text', 'validation_summary']


def validation_summary(yaml_path: str, overrides: Sequence[str] = (), world_size: int | None = None) -> str:
    """Checks a config and describes it in a few lines.

    Args:
        world_size: number of processes to check for; by default that of the environment.

    Raises:
        ConfigError: with every problem.
    """
    with _as_if_world_size(world_size):
        config = load_train_config(yaml_path, overrides)
    return f'{yaml_path}: valid\n{describe(config)}'


@contextlib.contextmanager
def _as_if_world_size(world_size: int | None) -> Iterator[None]:
    saved = os.environ.get('WORLD_SIZE')
    if world_size is not None:
        os.environ['WORLD_SIZE'] = str(world_size)
    try:
        yield
    finally:
        if world_size is not None:
            os.environ.pop('WORLD_SIZE')
            if saved is not None:
                os.environ['WORLD_SIZE'] = saved


def describe(config: TrainConfig) -> str:
    """Main facts, the batch arithmetic and the derived values, indented, one per line."""
    model = config.model
    shape = f' (d_model {model["d_model"]}, {model["n_layers"]} layers, {model["n_heads"]} heads)' if {'d_model', 'n_layers', 'n_heads'} <= set(model) else ''
    name = model.get('pretrained_model_name_or_path')
    lines = [
        f'model: {model["name"]}{f" {name}" if name else ""}{shape}',
        f'data: {config.train_loader["name"]}, sequences of {config.max_seq_len} tokens; tokenizer {config.tokenizer["name"]}',
        f'run: {config.max_duration}, precision {config.precision}, optimizer {config.optimizer["name"]}, scheduler {config.scheduler["name"]}',
        config.batch_summary,
        *(f'note: {note}' for note in config.notes),
    ]
    return '\n'.join(f'  {line}' for line in lines)


def schema_text() -> str:
    """The JSON Schema as indented text."""
    return json.dumps(train_schema(), indent=2)
