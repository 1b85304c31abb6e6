"""The lines that training prints, as document 002 shows them."""

from __future__ import annotations

import io
from types import SimpleNamespace

import torch
from composer.core import Time, Timestamp, TimeUnit

from llmfoundry.loggers.console import TrainConsoleLogger, console_lines

LOGGED = {
    'time/batch': 1, 'trainer/device_train_microbatch_size': 4, 'loss/train/total': 10.97361, 'metrics/train/LanguagePerplexity': torch.tensor(58312.0586),
    'metrics/train/LanguageCrossEntropy': torch.tensor(10.97361), 'lr-DecoupledAdamW/group0': 3e-5, 'throughput/device/tokens_per_sec': 5.0, 'time/remaining_estimate': 0.25,
}


def _print(metrics: dict) -> str:
    stream = io.StringIO()
    logger = TrainConsoleLogger(log_interval='1ba', stream=stream)
    logger.log_metrics(metrics)
    state = SimpleNamespace(timestamp=Timestamp(batch=1), max_duration=Time(100, TimeUnit.BATCH), dataloader_len=None)
    logger.batch_end(state, None)
    return stream.getvalue()


def test_the_documented_lines() -> None:
    metrics = {k: v for k, v in LOGGED.items() if not k.startswith(('lr', 'time/rem'))}
    assert _print(metrics) == (
        '[batch=1/100]:\n'
        '\t Train LanguageCrossEntropy: 10.9736\n'
        '\t Train Perplexity: 58312.0586\n'
        '\t Train loss/train/total: 10.9736\n'
    )


def test_other_metrics_of_the_model_follow_the_documented_ones() -> None:
    lines = _print({'metrics/train/TokenAccuracy': 0.5, 'metrics/train/LanguageCrossEntropy': 1.0, 'metrics/train/A': 2.0, 'loss/train/total': 1.0}).splitlines()
    assert [line.split()[1] for line in lines[1:]] == ['LanguageCrossEntropy:', 'loss/train/total:', 'A:', 'TokenAccuracy:']


def test_extras_follow_with_four_digits() -> None:
    assert _print(LOGGED).splitlines()[4:] == ['\t Train lr-DecoupledAdamW/group0: 3e-05', '\t Train time/remaining_estimate: 0.25']


def test_bookkeeping_is_left_to_other_loggers() -> None:
    assert list(console_lines(LOGGED)) == ['LanguageCrossEntropy', 'Perplexity', 'loss/train/total', 'lr-DecoupledAdamW/group0', 'time/remaining_estimate']


def test_no_config_block_of_composer() -> None:
    stream = io.StringIO()
    logger = TrainConsoleLogger(stream=stream)
    logger.log_hyperparameters({'a': 1})
    logger.fit_start(None, None)
    assert stream.getvalue() == ''
