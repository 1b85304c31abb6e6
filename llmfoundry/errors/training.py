"""Errors that end a training run."""

from __future__ import annotations

from llmfoundry.errors.base import InternalError, UserError


class LossSpikeError(UserError):
    """Training loss spiked."""

    def __init__(self, outlier_multiplier: float, running_loss_avg: float, outlier_counter: int) -> None:
        super().__init__(
            f'Training stopped due to a loss spike. The training loss was more than {outlier_multiplier} times greater than the running average loss (approx. {running_loss_avg}) over '
            f'{outlier_counter} consecutive training steps. Please try submitting the run again with a lower learning rate.',
            outlier_multiplier=outlier_multiplier,
            running_loss_avg=running_loss_avg,
            outlier_counter=outlier_counter,
        )


class HighLossError(UserError):
    """Training loss stayed high."""

    def __init__(self, loss_cap: float, window_size: int) -> None:
        super().__init__(
            f'Training stopped due to consistently high losses. The training loss exceeded the threshold of {loss_cap} for more than half of the {window_size} most recent training steps. '
            'Please try submitting the run again with a lower learning rate.',
            loss_cap=loss_cap,
            window_size=window_size,
        )


class RunTimeoutError(InternalError):
    """The process did not exit in time after training."""

    def __init__(self, timeout: int) -> None:
        super().__init__(f'Run timed out after {timeout} seconds.', timeout=timeout)


class NaNLossError(UserError):
    """The loss is NaN or infinite; raised before the optimizer step, so the weights are those of the step before.

    ``batch`` is the step, ``rank`` the global rank that saw it.
    """

    def __init__(self, batch: int, rank: int, value: float) -> None:
        super().__init__(
            f'Train loss is {value} at batch {batch} on rank {rank}. No checkpoint was written after it: resume from the newest one with a lower learning rate or gradient clipping '
            '(algorithms.gradient_clipping), or look at the samples of that batch.',
            batch=batch,
            rank=rank,
            value=value,
        )


class PackingNotSupportedError(UserError):
    """A batch holds several documents per row and the model cannot keep them apart."""

    def __init__(self, model: str, backend: str, reason: str) -> None:
        super().__init__(
            f'{model} (attention {backend}) cannot keep documents that share a row apart: {reason}. Documents would attend to each other. '
            'Set packing: false (packing_ratio: 1.0) in the dataset; for rows cut from a token stream drop eos_token_id or bos_token_id from the dataset, which says that crossing documents is wanted.',
            model=model,
            backend=backend,
            reason=reason,
        )


class PackingSelfTestError(UserError):
    """Documents packed in a row do not get the loss that they get alone; raised before the first step. ``remedy`` is what may help besides not packing."""

    def __init__(self, backend: str, reason: str, remedy: str | None = None) -> None:
        super().__init__(
            f'Packing self-test failed for {backend}: {reason}. Training on packed rows would be wrong without any other sign. '
            f'Set packing: false (packing_ratio: 1.0) in the dataset{"" if remedy is None else f", or {remedy}"}.',
            backend=backend,
            reason=reason,
            remedy=remedy,
        )
