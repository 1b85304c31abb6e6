"""``hf_checkpointer``: writes Hugging Face folders while training, with the same code as ``convert_composer_to_hf.py``.

Weights are gathered on rank 0 in host memory, whatever sharding the run uses, and written from there; the other ranks wait. A folder appears under its name only
when it is whole. Remote folders are uploaded by a background thread, so training goes on meanwhile; the price is a copy on local disk until the upload is done.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Sequence

from composer.core import Callback, Event, State, Time, TimeUnit
from composer.loggers import Logger, MLFlowLogger
from composer.models import HuggingFaceModel
from composer.utils import create_interval_scheduler, dist, format_name_with_dist, format_name_with_dist_and_time, parse_uri
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmfoundry.callbacks import hf_registration
from llmfoundry.checkpoint.adapters import gather_adapter
from llmfoundry.checkpoint.composer_to_hf import ExportOptions, export_checkpoint
from llmfoundry.checkpoint.hf_folder import save_class_code
from llmfoundry.checkpoint.reader import Checkpoint, lazy_tensors
from llmfoundry.checkpoint.trained_model import build_config, build_shell, fill
from llmfoundry.checkpoint.upload import fetch_license, upload_folder
from llmfoundry.errors import CheckpointError
from llmfoundry.models.composer_base import BaseHuggingFaceModel
from llmfoundry.models.hf.adapters import RESIZED

__all__ = ['HuggingFaceCheckpointer']

log = logging.getLogger(__name__)

MAX_SHARD_SIZE_VARIABLE = 'LLM_FOUNDRY_SAVE_FOLDER_HF_MAX_SHARD_SIZE'
_PRECISIONS = ('float32', 'float16', 'bfloat16')


class HuggingFaceCheckpointer(Callback):
    """Saves the model as a Hugging Face folder, ``{save_folder}/huggingface/ba{batch}`` by default.

    Subclasses may override ``transform_config``, ``transform_model_and_tokenizer``, ``transform_model_pre_registration``, ``pre_register_edit`` and
    ``save_additional_contents``.

    Args:
        save_folder: local folder or URI; ``{run_name}`` and the like are filled in.
        save_interval: how often, as a time string (``1ep``, ``500ba``, ``1dur``) or a number of epochs. The end of training is always saved.
        huggingface_folder_name: name of each folder below ``huggingface/``.
        precision: of the saved weights: float32, float16 or bfloat16.
        overwrite: whether an existing folder is replaced; otherwise it is an error.
        mlflow_registered_model_name: registers the last checkpoint under this name with every MLflow logger.
        mlflow_logging_config: arguments of ``mlflow.transformers.save_model``; ``task`` is llm/v1/completions unless given.
        flatten_imports: packages whose imports become relative in model code that a plug-in's class brings along.
        final_register_only: register at the end instead of saving folders.
        register_wait_seconds: how long registration may take.
        check_parity: run the parity gate of the converter on every folder (loads the model twice more on rank 0).
        merge_adapter: of a model with an adapter, save the merged model; otherwise the adapter alone, in PEFT's format.

    Raises:
        ValueError: unknown precision; at start, a model that is not a Hugging Face model, or a name to register without an MLflow logger.
    """

    def __init__(
        self,
        save_folder: str,
        save_interval: str | int | Time,
        huggingface_folder_name: str = 'ba{batch}',
        precision: str = 'float32',
        overwrite: bool = True,
        mlflow_registered_model_name: str | None = None,
        mlflow_logging_config: dict[str, Any] | None = None,
        flatten_imports: Sequence[str] = ('llmfoundry',),
        final_register_only: bool = False,
        register_wait_seconds: int = 7200,
        check_parity: bool = False,
        merge_adapter: bool = False,
    ) -> None:
        if precision not in _PRECISIONS:
            raise ValueError(f'hf_checkpointer.precision: {precision!r} is unknown; choose one of {", ".join(_PRECISIONS)}')
        if final_register_only and mlflow_registered_model_name is None:
            log.warning('hf_checkpointer: final_register_only needs mlflow_registered_model_name; folders are saved as usual')
            final_register_only = False
        self.save_folder = save_folder
        self.save_interval = Time.from_input(save_interval, TimeUnit.EPOCH)
        self.huggingface_folder_name = os.path.join('huggingface', huggingface_folder_name)
        self.precision = precision
        self.overwrite = overwrite
        self.mlflow_registered_model_name = mlflow_registered_model_name
        self.mlflow_logging_config = hf_registration.complete_logging_config(mlflow_logging_config)
        self.flatten_imports = tuple(flatten_imports)
        self.final_register_only = final_register_only
        self.register_wait_seconds = register_wait_seconds
        self.check_parity = check_parity
        self.merge_adapter = merge_adapter
        self.last_checkpoint_batch: Time | None = None
        self.mlflow_loggers: list[MLFlowLogger] = []
        self._should_save = create_interval_scheduler(self.save_interval, include_end_of_training=True)
        self._is_remote = parse_uri(save_folder)[0] != ''
        self._uploader = ThreadPoolExecutor(max_workers=1, thread_name_prefix='hf-upload')
        self._uploads: list[Future[None]] = []
        self._registrations: list[BaseProcess] = []

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self._check_run(state, logger)
        elif state.get_elapsed_duration() is not None and self._should_save(state, event) and self.last_checkpoint_batch != state.timestamp.batch:
            last = self._is_last_batch(state)
            register = last and self.mlflow_registered_model_name is not None
            if not self.final_register_only or register:
                self._save_checkpoint(state, logger, upload_to_save_folder=not self.final_register_only, register_to_mlflow=register)
        elif event in (Event.FIT_END, Event.EVAL_STANDALONE_END):
            self._wait()

    def post_close(self) -> None:
        self._wait()
        self._uploader.shutdown()

    # Hooks ------------------------------------------------------------------------------------------------------------------------

    def transform_config(self, original_config: PretrainedConfig) -> PretrainedConfig:
        """The config of the saved model; gets a copy of the trained model's. MPT's portable settings are applied afterwards in any case."""
        return original_config

    def transform_model_and_tokenizer(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None,
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        """The model and tokenizer to save; gets a copy of the model in fp32 on the CPU, on rank 0."""
        return model, tokenizer

    def transform_model_pre_registration(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model to register with MLflow."""
        return model

    def pre_register_edit(self, local_save_path: str) -> None:
        """Called with the folder that MLflow registers, before it does."""

    def save_additional_contents(self, folder: str, state: State) -> None:
        """Called with the unfinished folder, to write further files into it."""

    # Saving -----------------------------------------------------------------------------------------------------------------------

    def _check_run(self, state: State, logger: Logger) -> None:
        if not isinstance(_unwrapped(state), HuggingFaceModel):
            raise ValueError(f'`HuggingFaceCheckpointer` is only compatible with `HuggingFaceModel`s. Got {type(_unwrapped(state))}.')
        if self.mlflow_registered_model_name is not None:
            self.mlflow_loggers = [d for d in logger.destinations if isinstance(d, MLFlowLogger)]
            if not self.mlflow_loggers:
                raise ValueError('`mlflow_registered_model_name` was set, but no `MLFlowLogger` was found in the loggers. Add an mlflow logger or remove the name.')
            hf_registration.require_mlflow()

    def _is_last_batch(self, state: State) -> bool:
        """Whether training ends after this batch, also where the epoch that would end it has not been counted yet."""
        elapsed = state.get_elapsed_duration()
        if elapsed is not None and elapsed >= 1.0:
            return True
        limit = state.max_duration
        if limit is None or limit.unit != TimeUnit.EPOCH or state.dataloader_len is None:
            return False
        return int(state.timestamp.epoch) + 1 == limit.value and int(state.timestamp.batch_in_epoch) == int(state.dataloader_len)

    def _save_checkpoint(self, state: State, logger: Logger, upload_to_save_folder: bool, register_to_mlflow: bool) -> None:
        """Saves and, if asked, registers; every rank must call it.

        Raises:
            CheckpointError: on every rank, if rank 0 could not write.
        """
        del logger
        self._raise_failed_uploads()
        self.last_checkpoint_batch = state.timestamp.batch
        composer_model = _unwrapped(state)
        if composer_model.using_peft and isinstance(composer_model, BaseHuggingFaceModel) and not self.merge_adapter:
            weights = gather_adapter(composer_model)
        else:
            weights = get_model_state_dict(composer_model.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        failure: list[str | None] = [None]
        if dist.get_global_rank() == 0:
            try:
                self._write(state, composer_model, weights, upload_to_save_folder, register_to_mlflow)
            except (OSError, RuntimeError, ValueError) as e:
                log.exception('hf_checkpointer: saving failed')
                failure = [f'{type(e).__name__}: {e}']
        # The others would otherwise wait in a barrier for a rank that is gone.
        dist.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            raise CheckpointError(f'hf_checkpointer could not save batch {int(state.timestamp.batch)}: {failure[0]}')

    def _write(self, state: State, composer_model: HuggingFaceModel, weights: dict[str, Any], upload: bool, register: bool) -> None:
        name = format_name_with_dist_and_time(self.huggingface_folder_name, state.run_name, state.timestamp)
        base = format_name_with_dist(self.save_folder, state.run_name)
        temporary = None
        if self._is_remote or not upload:
            temporary = tempfile.mkdtemp(prefix='hf-checkpoint-')
        output = Path(temporary or base) / name
        self._write_folder(output, state, composer_model, weights)
        log.info(f'hf_checkpointer: wrote {output}')
        if register:
            self._register(output, state)
        if upload and self._is_remote:
            self._uploads.append(self._uploader.submit(_upload_and_remove, output, f'{base.rstrip("/")}/{name}', temporary))
        elif temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write_folder(self, output: Path, state: State, composer_model: HuggingFaceModel, weights: dict[str, Any]) -> None:
        """Writes one folder, on rank 0."""
        if composer_model.using_peft:
            self._write_adapter(output, state, composer_model, weights)
            return
        config = self.transform_config(copy.deepcopy(composer_model.model.config))
        live = _checkpoint(composer_model, config, weights)
        # A second model around the same tensors; on the CPU these are the ones in training, so hooks get a copy.
        model = fill(build_shell(live, build_config(live, True), True), live.weights)
        tokenizer = composer_model.tokenizer
        if type(self).transform_model_and_tokenizer is not HuggingFaceCheckpointer.transform_model_and_tokenizer:
            model, tokenizer = self.transform_model_and_tokenizer(copy.deepcopy(model), copy.deepcopy(tokenizer))
        model.config.use_cache = config.use_cache
        transformed = _checkpoint(composer_model, model.config, model.state_dict())

        def finish(folder: Path) -> None:
            save_class_code(model, folder, self.flatten_imports)
            fetch_license(folder, getattr(composer_model.model.config, '_name_or_path', ''))
            self.save_additional_contents(str(folder), state)

        export_checkpoint(transformed, output, self._options(), tokenizer, finish)

    def _write_adapter(self, output: Path, state: State, composer_model: HuggingFaceModel, weights: dict[str, Any]) -> None:
        """Writes the adapter or, with ``merge_adapter``, base model and adapter in one."""
        live = _checkpoint(composer_model, composer_model.model.get_base_model().config, weights)
        adapter = json.loads(json.dumps(composer_model.model.active_peft_config.to_dict(), default=_jsonable))
        live.huggingface['model']['peft_config'] = {'content': adapter}
        export_checkpoint(live, output, self._options(), composer_model.tokenizer, lambda folder: self.save_additional_contents(str(folder), state))

    def _options(self) -> ExportOptions:
        return ExportOptions(
            precision=self.precision, max_shard_size=os.environ.get(MAX_SHARD_SIZE_VARIABLE, '1GB'), trust_remote_code=True, check_parity=self.check_parity,
            overwrite=self.overwrite, merge_adapter=self.merge_adapter,
        )

    # Registration and upload --------------------------------------------------------------------------------------------------------

    def _register(self, output: Path, state: State) -> None:
        for number, destination in enumerate(self.mlflow_loggers):
            folder = Path(tempfile.mkdtemp(prefix='mlflow-model-')) / f'model_{number}'
            hf_registration.save_mlflow_model(output, folder, self.mlflow_logging_config, self.transform_model_pre_registration)
            self.pre_register_edit(str(folder))
            assert self.mlflow_registered_model_name is not None
            self._registrations.append(hf_registration.start_registration(destination, self.mlflow_registered_model_name, folder, self.register_wait_seconds))

    def _raise_failed_uploads(self) -> None:
        finished = [u for u in self._uploads if u.done()]
        self._uploads = [u for u in self._uploads if not u.done()]
        for upload in finished:
            upload.result()

    def _wait(self) -> None:
        """Waits for uploads and registrations; raises what went wrong in them."""
        uploads, self._uploads = self._uploads, []
        registrations, self._registrations = self._registrations, []
        for upload in uploads:
            upload.result()
        hf_registration.wait_for(registrations, self.register_wait_seconds)


def _unwrapped(state: State) -> Any:
    return state.model.module if state.is_model_ddp else state.model


def _checkpoint(composer_model: HuggingFaceModel, config: PretrainedConfig, weights: dict[str, Any]) -> Checkpoint:
    """The running model in the form of an opened checkpoint."""
    inner = composer_model.model.get_base_model() if composer_model.using_peft else composer_model.model
    # FSDP2 puts a class of its own before the model's.
    cls = next(c for c in type(inner).__mro__ if not c.__module__.startswith('torch.distributed'))
    entry = {'content': json.loads(config.to_json_string()), 'class': f'{cls.__module__}.{cls.__name__}', 'resized_embeddings': bool(getattr(inner, RESIZED, False))}
    model: dict[str, Any] = {'config': entry}
    if getattr(inner, 'generation_config', None) is not None:
        model['generation_config'] = {'content': json.loads(inner.generation_config.to_json_string())}
    return Checkpoint('the model in training', lazy_tensors(weights), {'model': model}, cls)


def _jsonable(value: Any) -> Any:
    """Sets, which adapter configs hold, as lists; enums as their values."""
    return sorted(value) if isinstance(value, (set, frozenset)) else getattr(value, 'value', str(value))


def _upload_and_remove(folder: Path, uri: str, temporary: str | None) -> None:
    try:
        upload_folder(folder, uri)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
