"""A table of what a model saw, said and scored in each in-context evaluation: the first thing to read when a score surprises.

Metrics of in-context tasks hand over what they found for each sample (``state.metric_outputs``, lists of one entry per sample); the callback adds the input as text and
writes one table for each evaluation.
"""

from __future__ import annotations

import warnings
from typing import Any, Mapping, Sequence

import torch
from composer.core import Callback, State
from composer.loggers import ConsoleLogger, Logger
from composer.models import HuggingFaceModel

from llmfoundry import dist

__all__ = ['EvalOutputLogging']


class EvalOutputLogging(Callback):
    """Logs the table ``{label}_step_{batch}`` to every logger but the console, after each evaluation.

    Columns: what the metrics hand over, ``input``, ``outputs`` (with ``log_output_text``, or where the task generates text), ``input_tokens`` (with ``log_tokens``), ``run_name``.

    Args:
        log_tokens: log the input's token ids too.
        log_output_text: log the text of the model's most likely tokens; None does so where the model has a tokenizer.

    Raises:
        ValueError: (at start) ``log_output_text: true`` with a model that is not a Hugging Face model, or has no tokenizer.
    """

    def __init__(self, log_tokens: bool = False, log_output_text: bool | None = None) -> None:
        self.log_tokens = log_tokens
        self.log_output_text = log_output_text
        self._columns: list[str] = []
        self._rows: list[list[Any]] = []

    def init(self, state: State, logger: Logger) -> None:
        del logger
        model = state.model.module if state.is_model_ddp else state.model
        has_tokenizer = isinstance(model, HuggingFaceModel) and model.tokenizer is not None
        if self.log_output_text and not has_tokenizer:
            raise ValueError(f'callbacks.eval_output_logging.log_output_text: needs a Hugging Face model with a tokenizer, got {type(model).__name__}. Set it to false.')
        self.log_output_text = has_tokenizer if self.log_output_text is None else self.log_output_text

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        del logger
        if not isinstance(state.batch, Mapping) or 'input_ids' not in state.batch:
            warnings.warn(f'eval_output_logging: a batch of {state.dataloader_label} has no input_ids ({type(state.batch).__name__}), so it is left out')
            return
        if not state.metric_outputs:
            return  # language modelling losses, which know nothing of samples
        columns = self._columns_of(state)
        lengths = {name: len(values) for name, values in columns.items()}
        if len(set(lengths.values())) > 1:
            warnings.warn(f'eval_output_logging: the columns of {state.dataloader_label} differ in length ({lengths}), so the batch is left out')
            return
        self._columns = list(columns)
        self._rows += [list(row) for row in zip(*columns.values(), strict=True)]

    def eval_end(self, state: State, logger: Logger) -> None:
        gathered = dist.all_gather_objects((self._columns, self._rows))
        columns = next((names for names, _ in gathered if names), [])
        rows = [row for _, part in gathered for row in part]
        self._columns, self._rows = [], []
        step = int(state.timestamp.batch)
        for destination in logger.destinations:
            if columns and not isinstance(destination, ConsoleLogger):
                destination.log_table(columns, rows, name=f'{state.dataloader_label}_step_{step}', step=step)

    def _columns_of(self, state: State) -> dict[str, Sequence[Any]]:
        """Column name -> one value for each sample of the batch."""
        dataset = state.dataloader.dataset
        tokenizer, pad = dataset.tokenizer, _pad_id(dataset)
        columns = {name: _plain(values) for name, values in state.metric_outputs.items()}
        ids = state.batch['input_ids'].tolist()
        if state.batch.get('mode') == 'generate':
            columns['outputs'] = list(state.outputs)  # text already
        elif self.log_output_text and isinstance(state.outputs, torch.Tensor):
            columns['outputs'] = [_decode(tokenizer, row, pad) for row in state.outputs.argmax(dim=-1).tolist()]
        columns['input'] = [_decode(tokenizer, row, pad) for row in ids]
        if self.log_tokens:
            columns['input_tokens'] = ids
        columns['run_name'] = [state.run_name] * len(ids)
        return columns


def _pad_id(dataset: Any) -> int | None:
    own = getattr(dataset, 'pad_tok_id', None)
    return own if own is not None else getattr(dataset.tokenizer, 'pad_token_id', None)


def _decode(tokenizer: Any, ids: Sequence[int], pad: int | None) -> str:
    return tokenizer.decode([token for token in ids if token != pad])


def _plain(values: Any) -> list[Any]:
    values = values.tolist() if isinstance(values, torch.Tensor) else values
    return [value.tolist() if isinstance(value, torch.Tensor) else value for value in values]
