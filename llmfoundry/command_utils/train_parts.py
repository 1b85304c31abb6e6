"""The pieces of a training run, each built by one function from the typed config: what ``train`` lists, in the same order.

Settings of Composer's Trainer that we do not follow blindly are decided here: bf16 on the CPU, the checkpoint saver, the console, the order of callbacks.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from typing import Any, Iterator, Mapping, Sequence

import torch
from composer import Callback, Evaluator, Trainer
from composer.callbacks import CheckpointSaver
from composer.core import DataSpec
from composer.loggers import LoggerDestination
from composer.profiler import JSONTraceHandler, Profiler, cyclic_schedule

from llmfoundry import builders, dist
from llmfoundry.callbacks.checkpoint_saver import AtomicCheckpointSaver
from llmfoundry.callbacks.microbatch_memory import MicrobatchMemory
from llmfoundry.callbacks.phase_tracker import PhaseTracker
from llmfoundry.callbacks.rng_restorer import RNGRestorer
from llmfoundry.checkpoint.composer_loading import safe_loading
from llmfoundry.command_utils.auto_microbatch import find_microbatch_size
from llmfoundry.command_utils.own_callbacks import own_callbacks
from llmfoundry.command_utils.parallelism import Placement
from llmfoundry.command_utils.remote_resumption import forget_downloads
from llmfoundry.command_utils.resumption import settle_start
from llmfoundry.command_utils.save_folder import SaveNames, check_free_space, local_folder, prepare_save_folder
from llmfoundry.command_utils.sharding import let_adapters_generate
from llmfoundry.command_utils.train_setup import say
from llmfoundry.config.train import TrainConfig
from llmfoundry.errors import TRAIN_DATALOADER, BaseContextualError, ConfigError, ConfigProblem, DataError
from llmfoundry.loggers.console import TrainConsoleLogger
from llmfoundry.models.cpu_autocast import wrap_forward
from llmfoundry.models.mpt import param_count
from llmfoundry.tokenizers.build import check_vocab

__all__ = [
    'build_algorithms',
    'build_callbacks',
    'build_loggers',
    'build_model',
    'build_profiler',
    'build_train_loader',
    'build_trainer',
    'check_vocabulary',
    'count_parameters',
    'fit',
    'prepare_checkpoints',
    'settle_microbatch_size',
    'sort_callbacks',
    'write_only_checkpoint',
]


def prepare_checkpoints(cfg: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Checks the save folder and settles which checkpoint the run starts from (see ``resumption``); a collective call.

    Returns:
        The config with ``load_path`` as the run will use it, and notes to print.

    Raises:
        ConfigError: the folder cannot be written to, or holds checkpoints that this run would overwrite; ``load_path`` cannot be used.
        CheckpointError: the checkpoint in ``load_path`` is damaged.
    """
    folder, names = local_folder(cfg.save_folder, cfg.run_name), _save_names(cfg)
    if folder is not None:
        dist.on_rank_zero(lambda: prepare_save_folder(folder, names, overwrite=cfg.save_overwrite, may_resume=cfg.autoresume or cfg.load_path is not None))
    return settle_start(cfg, names)


def _save_names(cfg: TrainConfig) -> SaveNames:
    sharded = (cfg.fsdp_config or {}).get('state_dict_type') == 'sharded'
    return SaveNames(cfg.save_filename, cfg.save_latest_filename, sharded)


def build_loggers(cfg: TrainConfig) -> list[LoggerDestination]:
    """The ``loggers`` block, and the console."""
    loggers = [builders.build_logger(name, kwargs) for name, kwargs in (cfg.loggers or {}).items()]
    if cfg.log_to_console:
        loggers.append(TrainConsoleLogger(log_interval=cfg.console_log_interval, stream='stderr'))
    return loggers


def build_profiler(block: Mapping[str, Any] | None) -> Profiler | None:
    """The ``profiler`` block: ``schedule``, optional ``json_trace_handler``, and arguments of Composer's Profiler.

    Raises:
        ConfigError: no ``schedule``.
    """
    if block is None:
        return None
    kwargs = dict(block)
    if 'schedule' not in kwargs:
        raise ConfigError([ConfigProblem('profiler.schedule', 'is missing: say which batches are profiled, e.g. {wait: 0, warmup: 1, active: 4, repeat: 1}')])
    schedule = cyclic_schedule(**kwargs.pop('schedule'))
    handler = kwargs.pop('json_trace_handler', None)
    handlers = [] if handler is None else [JSONTraceHandler(**handler)]
    return Profiler(schedule=schedule, trace_handlers=handlers, **kwargs)


def build_callbacks(cfg: TrainConfig, logged_cfg: Mapping[str, Any]) -> list[Callback]:
    """The ``callbacks`` block, and ours (see ``own_callbacks``)."""
    callbacks = [builders.build_callback(name, kwargs, train_config=logged_cfg) for name, kwargs in (cfg.callbacks or {}).items()]
    return callbacks + own_callbacks(cfg)


def build_algorithms(cfg: TrainConfig) -> list[Any]:
    """The ``algorithms`` block."""
    return [builders.build_algorithm(name, kwargs) for name, kwargs in (cfg.algorithms or {}).items()]


def build_train_loader(cfg: TrainConfig, tokenizer: Any) -> DataSpec:
    """The ``train_loader`` block.

    Raises:
        BaseContextualError: with ``location`` TrainDataloader.
    """
    try:
        return builders.build_dataloader(cfg.train_loader, tokenizer, cfg.device_train_batch_size)
    except BaseContextualError as e:
        e.location = TRAIN_DATALOADER
        raise


def build_model(cfg: TrainConfig, tokenizer: Any, placement: Placement) -> Any:
    """The ``model`` block; on a CPU with ``amp_bf16`` its passes run under autocast.

    Raises:
        ConfigError: a precision that the CPU does not have, or no space for the weights in the save folder.
    """
    name, kwargs = builders.split_name(cfg.model, 'model')
    dtype = kwargs.pop('master_weights_dtype', None)
    if placement.init_device is not None:
        kwargs['init_device'] = placement.init_device
    model = builders.build_composer_model(name, kwargs, tokenizer, placement.init_context(), dtype)
    if not torch.cuda.is_available():
        if cfg.precision == 'amp_bf16':
            model = wrap_forward(model, torch.bfloat16)
        elif cfg.precision != 'fp32':
            raise ConfigError([ConfigProblem('precision', f'{cfg.precision!r} needs a CUDA GPU; on the CPU use amp_bf16 or fp32')])
    folder = local_folder(cfg.save_folder, cfg.run_name)
    if folder is not None and dist.get_global_rank() == 0:
        check_free_space(folder, sum(p.numel() * p.element_size() for p in model.parameters()))
    return model


def check_vocabulary(cfg: TrainConfig, tokenizer: Any) -> None:
    """Checks, before data and model are built, that every token id has an embedding. Models without ``vocab_size`` in the YAML check it themselves.

    Raises:
        ConfigError: (a ValueError) ``model.vocab_size`` is smaller than the tokenizer.
    """
    if cfg.model.get('vocab_size') is not None:
        check_vocab(tokenizer, cfg.model['vocab_size'], cfg.tokenizer['name'])


def count_parameters(model: Any) -> dict[str, int]:
    """``n_params``, ``n_active_params`` (mixture of experts: those that one token meets) and ``n_trainable_params``, for the logged config."""
    inner = getattr(model, 'model', model)
    config = getattr(inner, 'config', None)
    total = param_count.n_params(inner)
    active = param_count.n_active_params(inner, config) if hasattr(config, 'ffn_config') else total
    return {'n_params': total, 'n_active_params': active, 'n_trainable_params': param_count.n_trainable_params(inner)}


def build_trainer(
    cfg: TrainConfig, *, model: Any, optimizer: Any, scheduler: Any, train_loader: DataSpec, evaluators: Sequence[Evaluator], callbacks: list[Callback],
    loggers: list[LoggerDestination], algorithms: list[Any], profiler: Profiler | None, parallelism_config: dict[str, Any] | None,
) -> Trainer:
    """Composer's Trainer, loaded from ``load_path``, which ``prepare_checkpoints`` has settled. The documented interface is the Trainer's.

    The microbatch size is never given as ``auto``; ``settle_microbatch_size`` replaces the device batch when it is.
    """
    auto = cfg.device_train_microbatch_size == 'auto'
    with warnings.catch_warnings(), safe_loading(), _metadata_for_sharded_checkpoints(cfg, model):
        warnings.filterwarnings('ignore', message='Specifying the (ConsoleLogger|ProgressBarLogger) via `loggers`')
        trainer = Trainer(
            run_name=cfg.run_name, seed=cfg.seed, model=model, optimizers=optimizer, schedulers=scheduler, algorithms=algorithms, callbacks=callbacks, loggers=loggers,
            train_dataloader=train_loader, train_subset_num_batches=cfg.train_subset_num_batches, max_duration=cfg.max_duration, spin_dataloaders=cfg.spin_dataloaders,
            eval_dataloader=list(evaluators) or None, eval_interval=cfg.eval_interval if evaluators else 1, eval_subset_num_batches=cfg.eval_subset_num_batches if evaluators else -1,
            progress_bar=cfg.progress_bar, log_to_console=False, console_log_interval=cfg.console_log_interval, python_log_level=None,
            precision=cfg.precision if torch.cuda.is_available() else 'fp32', parallelism_config=parallelism_config, dist_timeout=cfg.dist_timeout,
            device_train_microbatch_size=cfg.device_train_batch_size if auto else cfg.device_train_microbatch_size,
            accumulate_train_batch_on_tokens=cfg.accumulate_train_batch_on_tokens, compile_config=cfg.compile_config, profiler=profiler,
            save_folder=cfg.save_folder, save_filename=cfg.save_filename, save_latest_filename=cfg.save_latest_filename, save_interval=cfg.save_interval,
            save_num_checkpoints_to_keep=cfg.save_num_checkpoints_to_keep, save_overwrite=cfg.save_overwrite, save_weights_only=cfg.save_weights_only,
            save_ignore_keys=cfg.save_ignore_keys, load_path=cfg.load_path, load_weights_only=cfg.load_weights_only,
            load_strict_model_weights=cfg.load_strict_model_weights, load_ignore_keys=cfg.load_ignore_keys,
        )  # fmt: skip
    forget_downloads()
    _restore_rng_in_mid_epoch(trainer)
    let_adapters_generate(trainer.state.model)
    return trainer


@contextlib.contextmanager
def _metadata_for_sharded_checkpoints(cfg: TrainConfig, model: Any) -> Iterator[None]:
    """Around the Trainer's construction, which loads: no metadata in the state until then, text after it (see ``BaseHuggingFaceModel.get_metadata``)."""
    sharded = _save_names(cfg).sharded
    if sharded:
        model.metadata_form = 'none'
    yield
    if sharded:
        model.metadata_form = 'text'


def _restore_rng_in_mid_epoch(trainer: Trainer) -> None:
    """Hands the checkpoint's random state to a callback where Composer would forget it (see ``RNGRestorer``)."""
    state = trainer.state
    if trainer._rng_state is not None and int(state.timestamp.batch_in_epoch) > 0 and 'train' in state.dataset_resumption:
        state.callbacks.append(RNGRestorer(trainer._rng_state))
        trainer._rng_state = None


def sort_callbacks(trainer: Trainer) -> None:
    """The phase tracker first, so that what the others do counts as its phase; checkpoint savers after the others, so that what these log is saved; the Hugging Face one last."""
    trainer.state.callbacks[:] = sorted(trainer.state.callbacks, key=lambda c: 2 if _is_hf_checkpointer(c) else int(isinstance(c, CheckpointSaver)) - int(isinstance(c, PhaseTracker)))


def _is_hf_checkpointer(callback: Callback) -> bool:
    """By class name, subclasses included: runs without one should not have to import the export code."""
    return any(cls.__name__ == 'HuggingFaceCheckpointer' for cls in type(callback).__mro__)


def write_only_checkpoint(cfg: TrainConfig, trainer: Trainer) -> bool:
    """Serves ``only_hf_checkpoint`` and ``only_composer_checkpoint``; returns whether one of them was asked for.

    Raises:
        ConfigError: ``only_hf_checkpoint`` with no or several Hugging Face checkpointers.
    """
    if cfg.only_hf_checkpoint:
        savers = [c for c in trainer.state.callbacks if _is_hf_checkpointer(c)]
        if len(savers) != 1:
            raise ConfigError([ConfigProblem('only_hf_checkpoint', f'needs exactly one hf_checkpointer callback, found {len(savers)}')])
        savers[0]._save_checkpoint(trainer.state, trainer.logger, upload_to_save_folder=True, register_to_mlflow=True)
        return True
    if cfg.only_composer_checkpoint:
        trainer.save_checkpoint_to_save_folder()
        return True
    return False


def settle_microbatch_size(cfg: TrainConfig, trainer: Trainer) -> None:
    """Sets the microbatch that ``auto`` stands for: the one in the checkpoint that was resumed, else the largest that fits. What the start left in memory is given back first."""
    gc.collect()
    torch.cuda.empty_cache()
    if cfg.device_train_microbatch_size != 'auto':
        return
    found = next(c for c in trainer.state.callbacks if isinstance(c, MicrobatchMemory))
    how = 'as in the checkpoint'
    if found.size is None:
        found.size = find_microbatch_size(trainer, cfg.device_train_batch_size, cfg.max_seq_len)
        how = 'the largest that fits' if found.size < cfg.device_train_batch_size else 'the whole device batch fits'
    trainer.state.device_train_microbatch_size = found.size
    steps = -(-cfg.device_train_batch_size // found.size)
    say([f'device_train_microbatch_size: auto -> {found.size} ({how}); {int(steps)} forward passes per step'])


def fit(trainer: Trainer) -> None:
    """Trains.

    Raises:
        ConfigError: (a ValueError) the checkpoint that was loaded has reached ``max_duration``.
        DataError: a batch in which no token has a target, so that its mean loss does not exist.
        NaNLossError: the loss is not finite.
    """
    end, now = trainer.state.max_duration, trainer.state.timestamp
    if end is not None and now >= end:
        raise ConfigError([ConfigProblem(
            'max_duration', f'{end.to_timestring()} is reached already: the checkpoint {trainer.state.load_path} is at batch {int(now.batch)}. Raise max_duration to train on, or use another run_name.',
        )])
    savers = [c for c in trainer.state.callbacks if isinstance(c, AtomicCheckpointSaver)]
    try:
        trainer.fit()
        for saver in savers:
            saver.finish()
    except ZeroDivisionError as e:
        batch = int(trainer.state.timestamp.batch) + 1
        raise DataError(f'no token of batch {batch} has a target: all labels are -100 (padding, or prompts without responses). Check the data and its masking.') from e
    finally:
        if dist.get_world_size() == 1:  # of several, the guard gives each rank time, and does not wait for ranks that are gone
            for saver in savers:
                saver.wait()
