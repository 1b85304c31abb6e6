"""The metrics file: one line per step, the later line of a step counts, a torn line is skipped; and the plot made from it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llmfoundry.command_utils.plot import plot_loss
from llmfoundry.loggers.metrics_file import read_metrics


def test_writes_finite_numbers_and_appends_on_resume(tmp_path) -> None:
    torch = pytest.importorskip('torch')
    from llmfoundry.loggers.jsonl_logger import JSONLLogger

    path = tmp_path / 'deep' / '{run_name}.jsonl'
    for first_step in (0, 1):
        logger = JSONLLogger(str(path))
        logger.init(SimpleNamespace(run_name='r'), None)
        logger.log_metrics({'loss': torch.tensor(2.0 - first_step), 'text': 'x', 'bad': float('nan')}, step=first_step)
        logger.log_metrics({'loss': 0.5}, step=first_step + 1)
        logger.close(None, None)
    written = tmp_path / 'deep' / 'r.jsonl'
    assert written.read_text().splitlines()[0] == '{"step": 0, "loss": 2.0}'
    assert read_metrics(written, 'loss') == [(0, 2.0), (1, 1.0), (2, 0.5)]


def test_plot(tmp_path) -> None:
    metrics, out = tmp_path / 'm.jsonl', tmp_path / 'loss.png'
    metrics.write_text(
        '{"step": 1, "loss/train/total": 10.0}\n{"step": 2, "loss/train/total": 9.0, "metrics/eval/LanguageCrossEntropy": 9.5}\n{"step": 3, "loss/tr',
    )
    assert plot_loss(metrics, out) == [9.5]
    assert out.read_bytes().startswith(b'\x89PNG')
    metrics.write_text('')
    with pytest.raises(ValueError, match="no 'loss/train/total' in it; train with the jsonl logger first"):
        plot_loss(metrics, out)
