"""The callbacks that every run has without naming them: what stops it, saves it, and remembers what a resume needs."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlparse

from composer import Callback
from composer.callbacks import CheckpointSaver

from llmfoundry import dist
from llmfoundry.callbacks.activation_recompute import ActivationRecompute
from llmfoundry.callbacks.checkpoint_saver import AtomicCheckpointSaver
from llmfoundry.callbacks.microbatch_memory import MicrobatchMemory
from llmfoundry.callbacks.nan_loss import NonFiniteLossStopper
from llmfoundry.callbacks.phase_tracker import PhaseTracker
from llmfoundry.callbacks.sample_chain import SampleChain
from llmfoundry.callbacks.save_target import staging_folder
from llmfoundry.command_utils.memory import available_cpu_bytes
from llmfoundry.command_utils.parallelism import recomputes_unsharded
from llmfoundry.command_utils.save_folder import local_folder
from llmfoundry.config.train import TrainConfig
from llmfoundry.typed_registry import resolve_target

__all__ = ['own_callbacks']

# Composer fills in the run's id there and uploads by MLflow's own client, so its saver is left to it.
MLFLOW_ARTIFACTS = 'databricks/mlflow-tracking'


def own_callbacks(cfg: TrainConfig) -> list[Callback]:
    """What the run is doing at any moment, the stop at a loss that is not finite, the proof of what was trained on, the saver of checkpoints and that of adapters."""
    callbacks: list[Callback] = [PhaseTracker(), NonFiniteLossStopper(), SampleChain()]
    if cfg.device_train_microbatch_size == 'auto':
        callbacks.append(MicrobatchMemory(cfg.device_train_batch_size))
    if recomputes_unsharded(cfg.fsdp_config, dist.get_world_size()):
        callbacks.append(ActivationRecompute())
    if dist.get_world_size() > 1 and (cfg.tp_config or {}).get('tensor_parallel_degree', 1) > 1:
        callbacks.append(resolve_target('llmfoundry.callbacks.tensor_parallel_gradients:TensorParallelGradients')())
    if cfg.save_folder is not None and MLFLOW_ARTIFACTS not in cfg.save_folder:
        callbacks.append(_checkpoint_saver(cfg))
    if cfg.save_folder is not None and (cfg.model.get('peft_config') or cfg.model.get('pretrained_lora_id_or_path')):
        adapter_saver = resolve_target('llmfoundry.callbacks.adapter_saver:AdapterSaver')  # most runs need none of the export code
        callbacks.append(adapter_saver(cfg.save_folder, cfg.save_interval, cfg.save_num_checkpoints_to_keep))
    return callbacks


def _checkpoint_saver(cfg: TrainConfig) -> CheckpointSaver:
    folder = within = str(cfg.save_folder)
    remote = local_folder(folder, cfg.run_name) is None
    if remote:
        within = urlparse(folder).path.strip('/')
        folder = str(staging_folder(folder, cfg.run_name, dist.get_global_rank()))
    return AtomicCheckpointSaver(
        in_background=cfg.save_async,
        free_bytes=available_cpu_bytes,
        remote=cfg.save_folder if remote else None,
        mirrors=cfg.additional_output_paths or (),
        patience_s=cfg.dist_timeout,
        folder=folder,
        filename=cfg.save_filename,
        remote_file_name=str(Path(within) / cfg.save_filename),
        latest_filename=cfg.save_latest_filename,
        latest_remote_file_name=str(Path(within) / cfg.save_latest_filename),
        overwrite=cfg.save_overwrite,
        weights_only=cfg.save_weights_only,
        ignore_keys=cfg.save_ignore_keys,
        save_interval=cfg.save_interval,
        num_checkpoints_to_keep=cfg.save_num_checkpoints_to_keep,
    )
