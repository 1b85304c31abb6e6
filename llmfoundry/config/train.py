"""``TrainConfig``: every top-level key of a training YAML, its type, unit and default.

Blocks that configure a component (``model``, ``optimizer``, ...) stay plain dicts, because their keys are the component's own arguments; they are checked
against its signature before this class is built. Build it with ``llmfoundry.config.load``, which checks everything, fills the derived fields and
says what it filled; the constructor alone checks names and types.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import PrivateAttr

from llmfoundry.config.base import Block

__all__ = ['TRAIN_CONFIG_KEYS', 'Precision', 'TrainConfig']

Precision = Literal['fp32', 'amp_fp16', 'amp_bf16', 'amp_fp8']
Named = dict[str, Any]


class TrainConfig(Block):
    """A training run. Frozen: nothing changes a setting after it was checked and shown."""

    DERIVED: ClassVar[frozenset[str]] = frozenset({'n_gpus', 'device_train_batch_size', 'device_train_grad_accum', 'device_eval_batch_size'})
    """Mandatory fields that the loader computes when they are left out."""

    # What is trained, on what, how ------------------------------------------------------------------------------------------------------
    model: Named
    """The model: ``name`` from the models registry, the other keys are its arguments."""
    tokenizer: Named
    """``name`` (a Hugging Face name, a folder, ``llmfoundry://gpt2`` or a registered name) and ``kwargs``."""
    optimizer: Named
    """``name`` from the optimizers registry plus its arguments; also ``disable_grad`` and ``param_groups``."""
    scheduler: Named
    """Learning-rate schedule: ``name`` from the schedulers registry plus its arguments."""
    train_loader: Named
    """Training data: ``name`` from the dataloaders registry, ``dataset``, ``num_workers`` and other loader arguments."""
    max_duration: int | str
    """Length of the run as a time (``100ba``, ``1ep``, ``10000000tok``); an integer counts epochs."""
    max_seq_len: int
    """Tokens per sequence. Not pushed into the model or data sets: YAMLs interpolate it (``${max_seq_len}``)."""

    # Randomness and numerics
    seed: int = 17
    """Seeds Python, NumPy and torch; 17 as in the published runs, so that a run without the key is repeatable."""
    precision: Precision = 'amp_bf16'
    """Number format of forward and backward; bf16 needs no loss scaling, and works on CPUs and on GPUs since Ampere."""

    # Batch sizes (samples)
    global_train_batch_size: int | None = None
    """Samples per optimizer step over all devices: part of the mathematics of the run, so it has no usable default and must be given."""
    device_train_microbatch_size: int | float | Literal['auto'] = 'auto'
    """Samples per forward pass on one device: changes memory and speed, not results. ``auto`` searches for the largest that fits."""
    device_eval_batch_size: int | float
    """Samples per evaluation step on one device; by default the microbatch, or 1 when that is ``auto``."""
    n_gpus: int
    """Derived: number of processes of the run (CPU processes count too)."""
    device_train_batch_size: int | float
    """Derived: global_train_batch_size / n_gpus."""
    device_train_grad_accum: int | Literal['auto']
    """Derived: microbatches per step, ceil(device_train_batch_size / device_train_microbatch_size)."""
    accumulate_train_batch_on_tokens: bool = True
    """Weights each microbatch by its number of loss-generating tokens, so that the result does not depend on the microbatch size."""

    # Evaluation
    eval_loader: Named | list[Named] | None = None
    """Evaluation data in the form of ``train_loader``; a list needs a ``label`` in each element and is moved to ``eval_loaders``."""
    eval_loaders: list[Named] | None = None
    """Several evaluation loaders; filled from a list in ``eval_loader``."""
    eval_interval: int | str = 1
    """Time between evaluations; an integer counts epochs, 0 turns evaluation off."""
    eval_first: bool = False
    """Evaluates before the first step of a new run, to have the untrained loss in the log."""
    eval_subset_num_batches: int = -1
    """Batches per evaluation; -1 takes all, which a loader without length cannot do."""
    icl_tasks: list[Named] | str | None = None
    """In-context-learning tasks, or the path of a YAML file with them."""
    icl_tasks_str: str | None = None
    """Path of the task file; filled when ``icl_tasks`` is a string."""
    icl_subset_num_batches: int | None = None
    """Batches per in-context-learning task; null takes all."""
    icl_seq_len: int | None = None
    """Tokens per in-context-learning sequence; by default ``max_seq_len``."""
    eval_gauntlet: dict[str, Any] | str | None = None
    """How task scores are averaged, or the path of a YAML file with it."""
    eval_gauntlet_str: str | None = None
    """Path of the gauntlet file; filled when ``eval_gauntlet`` is a string."""

    # Distribution
    fsdp_config: dict[str, Any] | None = None
    """Fully sharded data parallelism, in Composer's keys; ignored in a single process."""
    tp_config: dict[str, Any] | None = None
    """Tensor parallelism: ``strategy`` and ``tensor_parallel_degree``."""
    dist_timeout: int | float = 600.0
    """Seconds that a collective operation may take before the run is declared dead; enough for a slow file system at start."""
    max_split_size_mb: int | None = None
    """MiB above which the CUDA allocator does not split blocks; null leaves torch's rule."""
    expandable_segments: bool = True
    """Lets the CUDA allocator grow segments, which avoids fragmentation with varying sequence lengths."""
    cuda_load_lazy: bool = False
    """Loads CUDA kernels at first use (less memory, first steps slower)."""
    compile_config: dict[str, Any] | None = None
    """Arguments of ``torch.compile``; ``{}`` compiles with defaults, null does not compile."""

    # Logging
    run_name: str | None = None
    """Name of the run, also ``{run_name}`` in folders; by default the variable RUN_NAME, else Composer invents one."""
    loggers: Named | None = None
    """Logger name -> arguments."""
    progress_bar: bool = False
    """Shows a bar instead of lines; off because log files want lines."""
    log_to_console: bool = True
    """Prints metrics in the form ``[batch=1/100]:``."""
    console_log_interval: int | str = '1ba'
    """Time between console lines; an integer counts epochs."""
    python_log_level: str | None = 'debug'
    """Level of our Python loggers; null leaves logging alone."""
    log_config: bool = True
    """Prints the config and sends it to the loggers as hyperparameters."""
    metadata: dict[str, Any] | None = None
    """Free-form facts about the run, sent to the loggers."""
    flatten_metadata: bool = True
    """Puts metadata beside the config keys in the logged config rather than below ``metadata``."""
    profiler: dict[str, Any] | None = None
    """Composer profiler: ``schedule``, ``json_trace_handler`` and arguments of the profiler."""

    # Additions to the loop
    callbacks: Named | None = None
    """Callback name -> arguments."""
    algorithms: Named | None = None
    """Algorithm name -> arguments, for example gradient_clipping."""
    code_paths: list[str] | None = None
    """Python files executed first, so that they can register components."""
    train_subset_num_batches: int = -1
    """Batches per training epoch; -1 takes all."""
    spin_dataloaders: bool = True
    """On resumption, fast-forwards a loader that cannot jump to its position, so that no sample repeats."""

    # Checkpoints
    save_folder: str | None = None
    """Folder or URI for checkpoints; may hold ``{run_name}``. null saves none."""
    save_filename: str | None = None
    """Name of a checkpoint; derived as ``ep{epoch}-ba{batch}-rank{rank}.pt``."""
    save_latest_filename: str | None = None
    """Name of the link to the newest checkpoint; derived as ``latest-rank{rank}.pt``, or ``latest-sharded-rank{rank}`` for sharded states."""
    save_interval: int | str = '1000ba'
    """Time between checkpoints; an integer counts epochs."""
    save_num_checkpoints_to_keep: int = -1
    """Checkpoints kept, the newest, in a local or remote save_folder; -1 keeps all."""
    save_async: bool = True
    """Training waits only for a copy of the state in host memory while a checkpoint is written and uploaded; false waits for all of it, and needs no memory for the copy."""
    additional_output_paths: list[str] | None = None
    """Paths or URIs that save_folder, a local one, is copied to after every save and at the end; only what has changed."""
    save_overwrite: bool = False
    """Allows replacing existing checkpoints; off so that a repeated command destroys nothing."""
    save_weights_only: bool = False
    """Saves without optimizer and position; such checkpoints cannot resume a run."""
    save_ignore_keys: list[str] | None = None
    """Glob patterns over state-dict paths that are not saved."""
    load_path: str | None = None
    """Checkpoint to start from: file or URI, may hold ``{rank}``."""
    load_weights_only: bool = False
    """Takes only the weights from ``load_path``."""
    load_strict_model_weights: bool = True
    """Missing or surplus weights in ``load_path`` are an error."""
    load_ignore_keys: list[str] | None = None
    """Glob patterns over state-dict paths that are not loaded."""
    autoresume: bool = False
    """Continues from the newest checkpoint in ``save_folder``. Derived as true when run_name and save_folder are set and neither save_overwrite nor save_weights_only is."""
    only_hf_checkpoint: bool = False
    """Builds everything, writes one Hugging Face checkpoint with the hf_checkpointer callback, and stops."""
    only_composer_checkpoint: bool = False
    """Builds everything, writes one Composer checkpoint, and stops."""

    variables: dict[str, Any] | None = None
    """Values for interpolation (``${variables.data_local}``); nothing reads them otherwise."""

    _notes: tuple[str, ...] = PrivateAttr(default=())
    """See ``notes``."""
    _batch_summary: str = PrivateAttr(default='')
    """See ``batch_summary``."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the loader derived or accepted with a remark, one line each, to be printed once."""
        return self._notes

    @property
    def batch_summary(self) -> str:
        """The batch arithmetic in one line: global -> device -> microbatch -> accumulation."""
        return self._batch_summary

    def to_dict(self) -> dict[str, Any]:
        """A deep copy as plain containers, for logging."""
        return self.model_dump()


TRAIN_CONFIG_KEYS = set(TrainConfig.model_fields)
