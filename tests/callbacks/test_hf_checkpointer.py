"""hf_checkpointer writes the folders that the converter would write, when it should, and says what goes wrong."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Callback, Time
from composer.loggers import MLFlowLogger
from composer.models import ComposerClassifier
from safetensors.torch import load_file

from llmfoundry.callbacks import HuggingFaceCheckpointer, hf_registration
from llmfoundry.callbacks import hf_checkpointer as module
from llmfoundry.checkpoint.composer_to_hf import ExportOptions, convert_checkpoint
from llmfoundry.errors import CheckpointError
from tests.helpers.composer_checkpoints import MPT_VARIANTS, build_mpt, gpt2_tokenizer, tiny_hf_gpt2, train


def run(tmp_path: Path, callback: Callback, duration: str = '2ba', model: Any = None, **arguments: Any) -> Path:
    model = model or build_mpt(gpt2_tokenizer(), **MPT_VARIANTS['alibi'])
    return train(model, tmp_path / 'run', duration, callbacks=[callback], **arguments).path


def folders(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / 'hf' / 'huggingface').iterdir())


def test_same_folder_as_the_converter(tmp_path: Path) -> None:
    callback = HuggingFaceCheckpointer(str(tmp_path / 'hf'), '1ba', precision='bfloat16', check_parity=True)
    checkpoint = run(tmp_path, callback)
    assert folders(tmp_path) == ['ba1', 'ba2']
    convert_checkpoint(str(checkpoint), tmp_path / 'converted', ExportOptions(precision='bf16', check_parity=False))
    ours, theirs = tmp_path / 'hf' / 'huggingface' / 'ba2', tmp_path / 'converted'
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()}
    for name in ('model.safetensors', 'config.json', 'generation_config.json', 'tokenizer.json', 'modeling_mpt.py'):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert not torch.equal(load_file(ours / 'model.safetensors')['transformer.norm_f.weight'], load_file(ours.parent / 'ba1' / 'model.safetensors')['transformer.norm_f.weight'])


@pytest.mark.parametrize(
    ('interval', 'duration', 'wanted', 'registered'),
    [('1ba', '3ba', ['ba1', 'ba2', 'ba3'], 3), ('2ba', '3ba', ['ba2', 'ba3'], 3), ('1dur', '3ba', ['ba3'], 3), ('1ba', '1ep', ['ba1', 'ba2'], 2), ('1ep', '2ep', ['ba2', 'ba4'], 4)],
)
def test_intervals_and_the_last_batch(interval: str, duration: str, wanted: list[str], registered: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, bool]] = []
    callback = HuggingFaceCheckpointer(str(tmp_path / 'hf'), interval)

    def record(state: Any, logger: Any, upload_to_save_folder: bool, register_to_mlflow: bool) -> None:
        callback.last_checkpoint_batch = state.timestamp.batch
        calls.append((int(state.timestamp.batch), register_to_mlflow))

    monkeypatch.setattr(callback, '_save_checkpoint', record)
    monkeypatch.setattr(callback, '_check_run', lambda state, logger: None)
    callback.mlflow_registered_model_name = 'name'
    run(tmp_path, callback, duration)
    assert [f'ba{batch}' for batch, _ in calls] == wanted
    assert [batch for batch, register in calls if register] == [registered], 'only the last batch is registered'


def test_hooks_of_subclasses(tmp_path: Path) -> None:
    class Own(HuggingFaceCheckpointer):
        def transform_config(self, original_config):
            original_config.note = 'mine'
            return original_config

        def transform_model_and_tokenizer(self, model, tokenizer):
            with torch.no_grad():
                model.transformer.norm_f.weight.fill_(3.0)
            tokenizer.chat_template = '{{ messages }}'
            return model, tokenizer

        def save_additional_contents(self, folder, state):
            Path(folder, 'extra.txt').write_text(str(int(state.timestamp.batch)))

    model = build_mpt(gpt2_tokenizer(), **MPT_VARIANTS['alibi'])
    run(tmp_path, Own(str(tmp_path / 'hf'), '2ba', 'step-{batch}'), model=model)
    folder = tmp_path / 'hf' / 'huggingface' / 'step-2'
    assert json.loads((folder / 'config.json').read_text())['note'] == 'mine'
    assert (load_file(folder / 'model.safetensors')['transformer.norm_f.weight'] == 3).all()
    assert (folder / 'extra.txt').read_text() == '2'
    assert not hasattr(model.model.config, 'note')
    assert json.loads((folder / 'tokenizer_config.json').read_text()).get('chat_template', '') or (folder / 'chat_template.jinja').exists()
    assert model.tokenizer.chat_template is None
    assert not (model.model.transformer.norm_f.weight == 3).any(), 'the model in training is untouched'


def test_transformers_models_and_shard_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(module.MAX_SHARD_SIZE_VARIABLE, '20KB')
    run(tmp_path, HuggingFaceCheckpointer(str(tmp_path / 'hf'), '2ba'), model=tiny_hf_gpt2(gpt2_tokenizer()))
    folder = tmp_path / 'hf' / 'huggingface' / 'ba2'
    assert len(list(folder.glob('model-*.safetensors'))) > 1 and not list(folder.glob('*.py'))


def test_existing_folders(tmp_path: Path) -> None:
    taken = tmp_path / 'hf' / 'huggingface' / 'ba2'
    taken.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r'could not save batch 2: FileExistsError'):
        run(tmp_path, HuggingFaceCheckpointer(str(tmp_path / 'hf'), '2ba', overwrite=False))
    run(tmp_path, HuggingFaceCheckpointer(str(tmp_path / 'hf'), '2ba'), save_overwrite=True)
    assert (taken / 'config.json').exists()


def test_remote_folders_are_uploaded_config_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[str] = []

    class Store:
        def upload_object(self, object_name: str, filename: str) -> None:
            assert Path(filename).exists()
            uploaded.append(object_name)

    monkeypatch.setattr('composer.utils.file_helpers.maybe_create_object_store_from_uri', lambda uri: Store())
    run(tmp_path, HuggingFaceCheckpointer('s3://bucket/models/{run_name}', '2ba'), run_name='my-run')
    assert uploaded[-1] == 'models/my-run/huggingface/ba2/config.json'
    assert 'models/my-run/huggingface/ba2/model.safetensors' in uploaded


def test_a_failed_upload_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        def upload_object(self, object_name: str, filename: str) -> None:
            raise OSError('bucket is gone')

    monkeypatch.setattr('composer.utils.file_helpers.maybe_create_object_store_from_uri', lambda uri: Store())
    with pytest.raises(OSError, match='bucket is gone'):
        run(tmp_path, HuggingFaceCheckpointer('s3://bucket/x', '2ba'))


def test_wrong_arguments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="precision: 'int8' is unknown"):
        HuggingFaceCheckpointer('x', '1ba', precision='int8')
    callback = HuggingFaceCheckpointer('x', 1, final_register_only=True)
    assert not callback.final_register_only and 'final_register_only needs mlflow_registered_model_name' in caplog.text
    assert callback.save_interval == Time(1, 'ep')
    with pytest.raises(ValueError, match='no `MLFlowLogger` was found'):
        run(tmp_path, HuggingFaceCheckpointer(str(tmp_path / 'hf'), '1ba', mlflow_registered_model_name='m'))


def test_only_hugging_face_models() -> None:
    state = types.SimpleNamespace(model=ComposerClassifier(torch.nn.Linear(2, 2), num_classes=2), is_model_ddp=False)
    with pytest.raises(ValueError, match='only compatible with `HuggingFaceModel`s'):
        HuggingFaceCheckpointer('x', '1ba')._check_run(state, None)  # type: ignore[arg-type]


def test_logging_config_defaults() -> None:
    complete = hf_registration.complete_logging_config(None)
    assert complete['task'] == 'llm/v1/completions' and 'prompt' in complete['input_example'] and complete['metadata'] == {'task': 'llm/v1/completions'}
    chat = hf_registration.complete_logging_config({'task': 'llm/v1/chat', 'metadata': {'a': 1}})
    assert 'messages' in chat['input_example'] and chat['metadata'] == {'task': 'llm/v1/chat', 'a': 1}


def test_registration_on_the_last_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for MLflow, which the default installation lacks."""
    saved: list[dict[str, Any]] = []

    def save_model(**kwargs: Any) -> None:
        Path(kwargs['path'], 'model').mkdir(parents=True)
        saved.append(kwargs)

    fake = types.ModuleType('mlflow.transformers')
    fake.save_model = save_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, 'mlflow.transformers', fake)
    started: list[tuple[str, str, int]] = []

    def start(destination: Any, name: str, folder: Path, wait_s: int) -> Any:
        started.append((name, folder.name, wait_s))
        return types.SimpleNamespace(join=lambda timeout: None, is_alive=lambda: False, exitcode=0, name=name)

    monkeypatch.setattr(hf_registration, 'start_registration', start)
    monkeypatch.setattr(hf_registration, 'require_mlflow', lambda: None)
    edited: list[str] = []

    class Own(HuggingFaceCheckpointer):
        def _check_run(self, state: Any, logger: Any) -> None:
            self.mlflow_loggers = [object.__new__(MLFlowLogger)]

        def pre_register_edit(self, local_save_path: str) -> None:
            edited.append(local_save_path)

    run(tmp_path, Own(str(tmp_path / 'hf'), '1ba', mlflow_registered_model_name='my-model', final_register_only=True, register_wait_seconds=5))
    assert started == [('my-model', 'model_0', 5)] and len(edited) == 1
    assert not (tmp_path / 'hf').exists(), 'final_register_only saves no folder'
    assert type(saved[0]['transformers_model']['model']).__name__ == 'MPTForCausalLM'
    assert saved[0]['task'] == 'llm/v1/completions'


def test_failed_registrations_are_raised() -> None:
    failed = types.SimpleNamespace(join=lambda timeout: None, is_alive=lambda: False, exitcode=1, name='register-x')
    with pytest.raises(CheckpointError, match='register-x failed with exit status 1'):
        hf_registration.wait_for([failed], 1)  # type: ignore[list-item]
