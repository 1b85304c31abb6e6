"""Records in MLflow which data sets a run read, as inputs of the run named by split.

What a loader reads is found from its block without opening anything, in the order that the interface names: a Delta table given in ``metadata``, a Unity Catalog volume, a Hub or local name
under ``hf_name``, ``remote``, ``local``. A source that MLflow cannot describe costs a warning, never the run.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Mapping

from llmfoundry import dist

__all__ = ['DatasetInput', 'dataset_inputs', 'log_dataset_uri']

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetInput:
    """One data set.

    Attributes:
        kind: ``delta_table``, ``uc_volume``, ``hf``, ``uri`` or ``local``.
        path: table name, path, Hub name or URI.
        split: the name of the input, ``train``, ``eval`` or what the loader's ``split`` says.
    """

    kind: str
    path: str
    split: str


def dataset_inputs(cfg: Mapping[str, Any]) -> list[DatasetInput]:
    """The data sets of ``train_loader``, ``eval_loader`` and ``eval_loaders``, each once, in order.

    Args:
        cfg: the config as plain containers.
    """
    loaders = [('train', cfg.get('train_loader'))]
    evaluation = cfg.get('eval_loader') or cfg.get('eval_loaders')
    loaders += [('eval', loader) for loader in (evaluation if isinstance(evaluation, list) else [evaluation])]
    found: list[DatasetInput] = []
    for role, loader in loaders:
        if not loader:
            continue
        table = (cfg.get('metadata') or {}).get(f'source_dataset_{role}')
        inputs = [_from_metadata(table, role)] if table else list(_from_block(loader.get('dataset') or {}, role))
        if not inputs:
            log.warning(f'{role}_loader: the source of its data set is not known, so MLflow does not record it')
        found += [i for i in inputs if i not in found]
    return found


def _from_metadata(source: str, role: str) -> DatasetInput:
    return DatasetInput('delta_table', source, role) if len(source.split('.')) == 3 else _from_path(source, role)


def _from_block(dataset: Mapping[str, Any], role: str) -> Iterator[DatasetInput]:
    split = str(dataset.get('split') or role)
    if dataset.get('hf_name'):
        yield _from_path(str(dataset['hf_name']), split, otherwise='hf')
        return
    for stream in (dataset.get('streams') or {'': dataset}).values():
        path = stream.get('remote') or stream.get('local')
        if path:
            yield _from_path(str(path), str(stream.get('split') or split))


def _from_path(path: str, split: str, otherwise: str = 'local') -> DatasetInput:
    if path.startswith('dbfs:'):
        return DatasetInput('uc_volume', path[len('dbfs:'):], split)
    if '://' in path:
        return DatasetInput('uri', path, split)
    return DatasetInput('local' if os.path.exists(path) else otherwise, path, split)


def log_dataset_uri(cfg: Mapping[str, Any]) -> list[DatasetInput]:
    """Records the data sets of ``cfg`` in the active MLflow run; does nothing without ``loggers.mlflow`` or an active run, and on ranks above 0.

    Returns:
        What was recorded.
    """
    if 'mlflow' not in (cfg.get('loggers') or {}) or dist.get_global_rank() != 0:
        return []
    import mlflow
    from mlflow.data.meta_dataset import MetaDataset

    if mlflow.active_run() is None:
        return []
    recorded = []
    for item in dataset_inputs(cfg):
        try:
            mlflow.log_input(MetaDataset(_SOURCES[item.kind](item.path), name=item.split), context=item.split)
        except (mlflow.MlflowException, ImportError, ValueError, OSError) as e:
            log.warning(f'MLflow does not record the data set {item.path!r}: {e}')
            continue
        recorded.append(item)
    return recorded


def _delta_table(path: str) -> Any:
    from mlflow.data.delta_dataset_source import DeltaDatasetSource

    return DeltaDatasetSource(delta_table_name=path)


def _uc_volume(path: str) -> Any:
    from mlflow.data.uc_volume_dataset_source import UCVolumeDatasetSource

    return UCVolumeDatasetSource(path)


def _hub(path: str) -> Any:
    from mlflow.data.huggingface_dataset_source import HuggingFaceDatasetSource

    return HuggingFaceDatasetSource(path)


def _uri(path: str) -> Any:
    from mlflow.data.dataset_source_registry import resolve_dataset_source

    return resolve_dataset_source(path)


def _local(path: str) -> Any:
    from mlflow.data.sources import LocalArtifactDatasetSource

    return LocalArtifactDatasetSource(path)


_SOURCES: dict[str, Callable[[str], Any]] = {'delta_table': _delta_table, 'uc_volume': _uc_volume, 'hf': _hub, 'uri': _uri, 'local': _local}
