"""eval_output_logging: one table for each evaluation, from a batch, its outputs and what the metrics hand over."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from composer.loggers import ConsoleLogger, InMemoryLogger

from llmfoundry.callbacks.eval_output_logging_callback import EvalOutputLogging
from llmfoundry.tokenizers.build import build_tokenizer

PAD = 50256


class _Table:
    """A logger that keeps tables as they come."""

    def __init__(self) -> None:
        self.tables: dict[str, tuple[list[str], list[list[Any]]]] = {}

    def log_table(self, columns: list[str], rows: list[list[Any]], name: str, step: int) -> None:
        self.tables[name] = (columns, rows)


class _Console(ConsoleLogger):
    def log_table(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError('tables do not go to the console')


@pytest.fixture(scope='module')
def tokenizer() -> Any:
    return build_tokenizer('llmfoundry://gpt2', {})


def _state(tokenizer: Any, texts: list[str], outputs: Any, **batch: Any) -> Any:
    rows = [tokenizer(text)['input_ids'] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    dataset = types.SimpleNamespace(tokenizer=tokenizer, pad_tok_id=PAD)
    return types.SimpleNamespace(
        batch={'input_ids': ids, **batch}, metric_outputs={'is_correct': torch.tensor([True, False]), 'answer': ['a', 'b']}, outputs=outputs, run_name='r',
        dataloader=types.SimpleNamespace(dataset=dataset), dataloader_label='trivia/0-shot', timestamp=types.SimpleNamespace(batch=7), model=torch.nn.Linear(1, 1), is_model_ddp=False,
    )  # fmt: skip


def _table(callback: EvalOutputLogging, *states: Any) -> tuple[list[str], list[list[Any]]]:
    table, logger = _Table(), types.SimpleNamespace()
    logger.destinations = [table, _Console()]
    for state in states:
        callback.eval_batch_end(state, logger)
    callback.eval_end(states[-1], logger)
    assert list(table.tables) == ['trivia/0-shot_step_7']
    return table.tables['trivia/0-shot_step_7']


def test_generated_answers(tokenizer: Any) -> None:
    state = _state(tokenizer, ['Who wrote Emma?', 'Who?'], [' Austen', ' Me'], mode='generate')
    columns, rows = _table(EvalOutputLogging(), state, state)
    assert columns == ['is_correct', 'answer', 'outputs', 'input', 'run_name']
    assert rows == [[True, 'a', ' Austen', 'Who wrote Emma?', 'r'], [False, 'b', ' Me', 'Who?', 'r']] * 2


def test_most_likely_tokens_and_ids(tokenizer: Any) -> None:
    state = _state(tokenizer, ['a b', 'c d'], None)
    state.outputs = torch.nn.functional.one_hot(state.batch['input_ids'], 50257).float()
    callback = EvalOutputLogging(log_tokens=True, log_output_text=True)
    columns, rows = _table(callback, state)
    first = dict(zip(columns, rows[0], strict=True))
    assert first['outputs'] == 'a b' and first['input_tokens'] == state.batch['input_ids'].tolist()[0]


def test_output_text_needs_a_tokenizer(tokenizer: Any) -> None:
    state = _state(tokenizer, ['a', 'b'], None)
    with pytest.raises(ValueError, match='log_output_text: needs a Hugging Face model with a tokenizer, got Linear'):
        EvalOutputLogging(log_output_text=True).init(state, None)
    callback = EvalOutputLogging()
    callback.init(state, None)
    assert callback.log_output_text is False


def test_without_sample_results_there_is_no_table(tokenizer: Any) -> None:
    state = _state(tokenizer, ['a', 'b'], None)
    state.metric_outputs = {}
    memory = InMemoryLogger()
    callback = EvalOutputLogging()
    callback.eval_batch_end(state, None)
    callback.eval_end(state, types.SimpleNamespace(destinations=[memory]))
    assert memory.tables == {}


def test_columns_of_different_lengths_are_left_out(tokenizer: Any) -> None:
    state = _state(tokenizer, ['a', 'b'], None)
    state.metric_outputs = {'is_correct': [True]}
    with pytest.warns(UserWarning, match=r"differ in length \(\{'is_correct': 1"):
        EvalOutputLogging(log_output_text=False).eval_batch_end(state, None)
