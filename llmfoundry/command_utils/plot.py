"""Loss curves from a metrics file, as PNG."""

from __future__ import annotations

from pathlib import Path

from llmfoundry.loggers.metrics_file import read_metrics

__all__ = ['plot_loss']

TRAIN_KEY = 'loss/train/total'
EVAL_KEY = 'metrics/eval/LanguageCrossEntropy'


def plot_loss(metrics: Path, out: Path) -> list[float]:
    """Draws training and validation loss over steps and returns the validation losses in order of step.

    Args:
        metrics: file written by the ``jsonl`` logger.
        out: PNG to write.

    Raises:
        ValueError: the file holds no training loss.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    train, evaluation = read_metrics(metrics, TRAIN_KEY), read_metrics(metrics, EVAL_KEY)
    if not train:
        raise ValueError(f'{metrics}: no {TRAIN_KEY!r} in it; train with the jsonl logger first')
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150)
    axes.plot(*zip(*train, strict=True), color='#9ab4d0', linewidth=1, label='training')
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), color='#14365c', marker='o', markersize=4, label='validation (held-out text)')
        step, value = evaluation[-1]
        axes.annotate(f'{value:.2f}', (step, value), textcoords='offset points', xytext=(0, 8), ha='center')
    axes.set_xlabel('optimizer step')
    axes.set_ylabel('loss (nats per token)')
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    for side in ('top', 'right'):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(out)
    pyplot.close(figure)
    return [value for _, value in evaluation]
