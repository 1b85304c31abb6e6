"""What a run reads is found from its config, in the documented order, and recorded in a real MLflow store where MLflow is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmfoundry.loggers.dataset_inputs import DatasetInput, dataset_inputs, log_dataset_uri


def config(dataset: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {'train_loader': {'name': 'text', 'dataset': dataset}, **more}


@pytest.mark.parametrize(
    ('dataset', 'metadata', 'wanted'),
    [
        ({'local': '/no/such', 'remote': 's3://b/data', 'split': 'train_small'}, None, DatasetInput('uri', 's3://b/data', 'train_small')),
        ({'local': '/no/such', 'split': 'train'}, None, DatasetInput('local', '/no/such', 'train')),
        ({'hf_name': 'org/name', 'split': 'train'}, None, DatasetInput('hf', 'org/name', 'train')),
        ({'hf_name': 's3://b/rows', 'split': 'train'}, None, DatasetInput('uri', 's3://b/rows', 'train')),
        ({'hf_name': 'dbfs:/Volumes/a/b', 'split': 'train'}, None, DatasetInput('uc_volume', '/Volumes/a/b', 'train')),
        ({'local': '/no/such'}, {'source_dataset_train': 'main.raw.text'}, DatasetInput('delta_table', 'main.raw.text', 'train')),
        ({'local': '/no/such'}, {'source_dataset_train': 'dbfs:/Volumes/x'}, DatasetInput('uc_volume', '/Volumes/x', 'train')),
    ],
)
def test_order_of_detection(dataset: dict[str, Any], metadata: dict[str, str] | None, wanted: DatasetInput) -> None:
    assert dataset_inputs(config(dataset, metadata=metadata)) == [wanted]


def test_an_existing_folder_under_hf_name_is_local(tmp_path: Path) -> None:
    assert dataset_inputs(config({'hf_name': str(tmp_path)})) == [DatasetInput('local', str(tmp_path), 'train')]


def test_streams_eval_loaders_and_repeats() -> None:
    cfg = config({'streams': {'a': {'remote': 's3://a', 'split': 'x'}, 'b': {'local': '/b'}}}, eval_loaders=[{'dataset': {'local': '/e'}}, {'dataset': {'local': '/e'}}])
    assert dataset_inputs(cfg) == [DatasetInput('uri', 's3://a', 'x'), DatasetInput('local', '/b', 'train'), DatasetInput('local', '/e', 'eval')]


def test_an_unknown_source_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert dataset_inputs(config({})) == []
    assert 'train_loader: the source of its data set is not known' in caplog.text


def test_nothing_without_the_mlflow_logger() -> None:
    assert log_dataset_uri(config({'local': '/x'})) == []


def test_recorded_in_a_real_store(tmp_path: Path) -> None:
    mlflow = pytest.importorskip('mlflow', reason='the mlflow extra is not installed')
    mlflow.set_tracking_uri(f'sqlite:///{tmp_path}/runs.db')
    cfg = config({'remote': 's3://b/data', 'local': '/l', 'split': 'train'}, loggers={'mlflow': {}}, eval_loader={'dataset': {'local': str(tmp_path)}})
    assert log_dataset_uri(cfg) == [], 'there is no active run'
    with mlflow.start_run() as run:
        assert [i.path for i in log_dataset_uri(cfg)] == ['s3://b/data', str(tmp_path)]
    inputs = mlflow.get_run(run.info.run_id).inputs.dataset_inputs
    assert sorted((i.dataset.name, i.dataset.source_type) for i in inputs) == [('eval', 'local'), ('train', 's3')]
