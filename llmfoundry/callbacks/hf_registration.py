"""Registers a Hugging Face folder with MLflow in a process of its own, since a registry may take minutes to copy a large model."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import multiprocessing
import shutil
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Sequence

import transformers

from llmfoundry.errors import CheckpointError

if TYPE_CHECKING:
    from composer.loggers import MLFlowLogger

__all__ = ['complete_logging_config', 'register', 'require_mlflow', 'save_mlflow_model', 'start_registration', 'wait_for']

log = logging.getLogger(__name__)

_DEFAULT_TASK = 'llm/v1/completions'
_CHAT_EXAMPLE = {'messages': [{'role': 'user', 'content': 'What is machine learning?'}]}
_COMPLETION_EXAMPLE = {'prompt': 'What is machine learning?'}
_WAIT_SLACK_S = 60


def complete_logging_config(config: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of ``mlflow.transformers.save_model`` with defaults: the task, its copy in the metadata, and an input example in the form of the task."""
    complete = dict(config or {})
    task = complete.setdefault('task', _DEFAULT_TASK)
    complete['metadata'] = {'task': task, **(complete.get('metadata') or {})}
    complete.setdefault('input_example', _CHAT_EXAMPLE if task.endswith('chat') else _COMPLETION_EXAMPLE)
    return complete


def require_mlflow() -> None:
    """Raises ImportError, with the remedy, unless MLflow is installed."""
    if importlib.util.find_spec('mlflow') is None:
        raise ImportError("hf_checkpointer.mlflow_registered_model_name needs MLflow: pip install 'llm-foundry[mlflow]'")


def save_mlflow_model(
    hf_folder: Path, mlflow_folder: Path, logging_config: dict[str, Any], transform: Callable[[transformers.PreTrainedModel], transformers.PreTrainedModel],
) -> None:
    """Writes the model of ``hf_folder`` as an MLflow model into ``mlflow_folder``, in the precision of the folder."""
    mlflow_transformers = importlib.import_module('mlflow.transformers')
    # The folder was written by this very run, so its code is ours.
    model = transform(transformers.AutoModelForCausalLM.from_pretrained(hf_folder, trust_remote_code=True, torch_dtype='auto'))
    components: dict[str, Any] = {'model': model}
    if (hf_folder / 'tokenizer_config.json').exists():
        components['tokenizer'] = transformers.AutoTokenizer.from_pretrained(hf_folder, trust_remote_code=True)
    mlflow_transformers.save_model(transformers_model=components, path=str(mlflow_folder), **logging_config)
    for code in hf_folder.glob('*.py'):
        shutil.copy(code, mlflow_folder / 'model' / code.name)


def register(settings: dict[str, Any]) -> None:
    """Creates the model if it is new, and a version of it; runs in the child process."""
    mlflow = importlib.import_module('mlflow')
    mlflow.set_tracking_uri(settings['tracking_uri'])
    if settings['registry_uri']:
        mlflow.set_registry_uri(settings['registry_uri'])
    client = importlib.import_module('mlflow.tracking').MlflowClient(settings['tracking_uri'], settings['registry_uri'])
    exceptions = importlib.import_module('mlflow.exceptions')
    try:
        client.create_registered_model(settings['name'])
    except exceptions.MlflowException as e:
        if e.error_code not in ('RESOURCE_ALREADY_EXISTS', 'ALREADY_EXISTS'):
            raise
    client.create_model_version(name=settings['name'], source=settings['source'], run_id=settings['run_id'], await_creation_for=settings['wait_s'])


def start_registration(destination: MLFlowLogger, name: str, folder: Path, wait_s: int) -> BaseProcess:
    """Starts a process that registers ``folder`` under ``name`` in the registry of the logger ``destination``."""
    prefix = destination.model_registry_prefix
    settings = {
        'name': f'{prefix}.{name}' if prefix else name,
        'source': str(folder),
        'run_id': destination._run_id,
        'tracking_uri': destination.tracking_uri,
        'registry_uri': destination.model_registry_uri,
        'wait_s': wait_s,
    }
    # Not fork: the parent holds CUDA and threads.
    process = multiprocessing.get_context('spawn').Process(target=register, args=(settings,), name=f'register-{name}')
    process.start()
    return process


def wait_for(processes: Sequence[BaseProcess], wait_s: int) -> None:
    """Waits for registrations.

    Raises:
        CheckpointError: one failed or took too long; the folder itself is saved.
    """
    for process in processes:
        process.join(wait_s + _WAIT_SLACK_S)
        if process.is_alive():
            process.terminate()
            raise CheckpointError(f'{process.name} did not finish within {wait_s} s (register_wait_seconds)')
        if process.exitcode != 0:
            raise CheckpointError(f'{process.name} failed with exit status {process.exitcode}; its error stands above')
