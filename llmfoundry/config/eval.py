"""``EvalConfig``: every top-level key of an evaluation YAML, its type, unit and default."""

from __future__ import annotations

from typing import Any

from pydantic import PrivateAttr

from llmfoundry.config.base import Block
from llmfoundry.config.train import Precision

__all__ = ['EVAL_CONFIG_KEYS', 'EvalConfig', 'EvalModel']

Named = dict[str, Any]


class EvalModel(Block):
    """One entry of ``models``."""

    model_name: str
    """Name of the model in the tables of results."""
    model: Named
    """As in training: ``name`` from the models registry, the other keys are its arguments."""
    tokenizer: Named
    """As in training: ``name`` and ``kwargs``."""
    load_path: str | None = None
    """Checkpoint whose weights are loaded; MPT models need one, Hugging Face models may load published weights instead."""


class EvalConfig(Block):
    """An evaluation run over one or several models. Frozen, like ``TrainConfig``."""

    models: list[Named]
    """The models, evaluated one after another; filled from top-level ``model``, ``tokenizer`` and ``load_path`` of a training-style file."""
    max_seq_len: int
    """Tokens per sequence."""
    device_eval_batch_size: int | float
    """Samples per step on one device; whole when there are in-context-learning tasks."""
    code_paths: list[str] | None = None
    """Python files executed first, so that they can register components."""
    eval_gauntlet: dict[str, Any] | str | None = None
    """How task scores are averaged, or the path of a YAML file with it."""
    eval_gauntlet_str: str | None = None
    """Path of the gauntlet file; filled when ``eval_gauntlet`` is a string."""
    eval_loader: Named | list[Named] | None = None
    """Evaluation data in the form of a training loader; a list needs a ``label`` in each element and is moved to ``eval_loaders``."""
    eval_loaders: list[Named] | None = None
    """Several evaluation loaders; filled from a list in ``eval_loader``."""
    eval_subset_num_batches: int = -1
    """Batches per evaluation; -1 takes all."""
    icl_subset_num_batches: int | None = None
    """Batches per in-context-learning task; null takes all."""
    icl_tasks: list[Named] | str | None = None
    """In-context-learning tasks, or the path of a YAML file with them."""
    icl_tasks_str: str | None = None
    """Path of the task file; filled when ``icl_tasks`` is a string."""
    python_log_level: str | None = 'debug'
    """Level of our Python loggers; null leaves logging alone."""
    loggers: Named | None = None
    """Logger name -> arguments."""
    console_log_interval: int | str = '1ba'
    """Time between console lines."""
    log_config: bool = True
    """Prints the config and sends it to the loggers as hyperparameters."""
    seed: int = 17
    """Seeds Python, NumPy and torch; few-shot examples are drawn from it."""
    precision: Precision = 'amp_bf16'
    """Number format of the forward pass."""
    run_name: str | None = None
    """Name of the run; by default the variable RUN_NAME, else ``llm``."""
    metadata: dict[str, Any] | None = None
    """Free-form facts about the run, sent to the loggers."""
    dist_timeout: int | float = 600.0
    """Seconds that a collective operation may take before the run is declared dead."""
    fsdp_config: dict[str, Any] | None = None
    """Fully sharded data parallelism, in Composer's keys; ignored in a single process."""
    callbacks: Named | None = None
    """Callback name -> arguments."""
    variables: dict[str, Any] | None = None
    """Values for interpolation; nothing reads them otherwise."""

    _notes: tuple[str, ...] = PrivateAttr(default=())
    """See ``notes``."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the loader derived or accepted with a remark, one line each."""
        return self._notes

    def to_dict(self) -> dict[str, Any]:
        """A deep copy as plain containers, for logging."""
        return self.model_dump()


EVAL_CONFIG_KEYS = set(EvalConfig.model_fields)
