"""The training command. ``train`` is the table of contents of a run: read it top to bottom to know what happens when.

Data come before the model, since their errors are the common ones and cost nothing to find; the checkpoint is loaded inside the Trainer, after everything that has state
exists. Every step is a short function of ``train_parts``, ``train_setup``, ``save_folder``, ``parallelism`` or ``auto_microbatch``.
"""

from __future__ import annotations

import os
from typing import Any, Mapping, Sequence

import torch
import yaml
from composer import Trainer
from composer.loggers import Logger

from llmfoundry import builders, dist
from llmfoundry.command_utils import host_memory, preflight, start_checks
from llmfoundry.command_utils import train_parts as parts
from llmfoundry.command_utils import train_setup as setup
from llmfoundry.command_utils.parallelism import build_parallelism_config, resolve_placement
from llmfoundry.command_utils.threads import share_cores
from llmfoundry.config.load import load_train_config
from llmfoundry.config.report import Report
from llmfoundry.config.rules import check_rules
from llmfoundry.config.train import TRAIN_CONFIG_KEYS, TrainConfig
from llmfoundry.loggers.dataset_inputs import log_dataset_uri

__all__ = ['TRAIN_CONFIG_KEYS', 'TrainConfig', 'train', 'train_from_yaml', 'validate_config']


def train(cfg: TrainConfig) -> Trainer:
    """Trains as ``cfg`` says and returns the Trainer.

    Raises:
        ConfigError: (a ValueError) what could only be found out while building, such as a save folder that cannot be written to.
        NaNLossError: the loss is not finite.
    """
    start_process(cfg)
    placement = resolve_placement(
        cfg.model.get('init_device'), cfg.fsdp_config, cfg.tp_config, world_size=dist.get_world_size(), rank=dist.get_global_rank(), has_cuda=torch.cuda.is_available(),
        master_weights_dtype=cfg.model.get('master_weights_dtype'),
    )
    cfg, found = parts.prepare_checkpoints(cfg)
    setup.say([*cfg.notes, cfg.batch_summary, *placement.notes, *found])

    # What goes around the model
    tokenizer = builders.build_tokenizer(cfg.tokenizer['name'], cfg.tokenizer.get('kwargs'))
    parts.check_vocabulary(cfg, tokenizer)
    scheduler = builders.build_scheduler(*builders.split_name(cfg.scheduler, 'scheduler'))
    loggers = parts.build_loggers(cfg)
    logged_cfg = setup.merge_metadata(cfg.to_dict(), cfg.metadata, cfg.flatten_metadata)
    profiler = parts.build_profiler(cfg.profiler)
    callbacks = parts.build_callbacks(cfg, logged_cfg)
    algorithms = parts.build_algorithms(cfg)

    # Data, then the model and its optimizer
    train_loader = parts.build_train_loader(cfg, tokenizer)
    evaluators, _, gauntlet = builders.build_evaluators(
        cfg.eval_loader or cfg.eval_loaders, cfg.icl_tasks or cfg.icl_tasks_str, cfg.eval_gauntlet or cfg.eval_gauntlet_str, tokenizer=tokenizer,
        device_eval_batch_size=cfg.device_eval_batch_size, icl_seq_len=cfg.icl_seq_len, icl_subset_num_batches=cfg.icl_subset_num_batches,
    )
    callbacks += [gauntlet] if gauntlet is not None else []
    start_checks.check_masks(cfg, train_loader, evaluators, tokenizer)
    model = parts.build_model(cfg, tokenizer, placement)
    logged_cfg.update(parts.count_parameters(model))
    parallelism_config, notes = build_parallelism_config(placement, model)
    setup.say(notes)
    optimizer = builders.build_optimizer(model, *builders.split_name(cfg.optimizer, 'optimizer'))
    builders.add_metrics_to_eval_loaders(evaluators, list(model.get_metrics(is_train=False)))

    # The Trainer, and the run
    trainer = parts.build_trainer(
        cfg, model=model, optimizer=optimizer, scheduler=scheduler, train_loader=train_loader, evaluators=evaluators, callbacks=callbacks, loggers=loggers,
        algorithms=algorithms, profiler=profiler, parallelism_config=parallelism_config,
    )
    parts.sort_callbacks(trainer)
    if parts.write_only_checkpoint(cfg, trainer):
        return trainer
    if cfg.log_config:
        log_config(trainer.logger, logged_cfg)
    log_dataset_uri(logged_cfg)
    start_checks.check_packing(cfg, trainer, tokenizer)
    parts.settle_microbatch_size(cfg, trainer)
    if cfg.eval_first and evaluators and trainer.state.timestamp.batch.value == 0:
        trainer.eval()
    parts.fit(trainer)
    return trainer


def start_process(cfg: TrainConfig) -> None:
    """Logging, ranks, settings of the process, seed. Plug-ins (code_paths) were imported while the config was loaded, so that it could be checked against what they register."""
    setup.configure_logging(cfg.python_log_level)
    dist.init_process_group(cfg.dist_timeout, lambda store: preflight.check(cfg, store))
    validate_config(cfg)
    setup.configure_process(cfg.max_split_size_mb, cfg.expandable_segments, cfg.cuda_load_lazy)
    share_cores()
    if not torch.cuda.is_available():
        host_memory.return_freed_blocks()
    setup.seed_everything(cfg.seed)


def validate_config(cfg: TrainConfig | Mapping[str, Any]) -> None:
    """Applies the rules between keys (loading a config did so already; for configs made in Python) and gives the warnings about TransformerEngine.

    Raises:
        ConfigError: (a ValueError) every rule that is broken.
    """
    config = cfg.to_dict() if isinstance(cfg, TrainConfig) else dict(cfg)
    report = Report({}, None)
    check_rules(config, report)
    report.raise_if_any()
    setup.warn_about_transformer_engine(config)


def train_from_yaml(yaml_path: str | os.PathLike, args_list: Sequence[str] | None = None) -> Trainer:
    """Loads a YAML with ``key=value`` overrides and trains.

    Raises:
        ConfigError: every problem of the config, in one report.
    """
    return train(load_train_config(yaml_path, list(args_list or ())))


def log_config(logger: Logger, cfg: Mapping[str, Any]) -> None:
    """Prints the config as YAML once, without the keys that are not set, and sends all of it to the loggers as hyperparameters."""
    shown = {k: v for k, v in cfg.items() if v is not None}
    setup.say(['config:', yaml.safe_dump(shown, sort_keys=False, default_flow_style=None, width=150)])
    logger.log_hyperparameters(dict(cfg))
