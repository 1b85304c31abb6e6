"""Writes down which part of a step the run is in, from Composer's events, so that a crash, a hang or another rank can say it (``llmfoundry.phases``).

It stands first among the callbacks: what the others do at an event then counts as the phase that the event begins. Phases without events of their own (a checkpoint that is written, an
upload) set theirs where they happen.
"""

from __future__ import annotations

from typing import Any

from composer.core import Callback, Event, State
from composer.loggers import Logger

from llmfoundry import phases

__all__ = ['PhaseTracker']

_PHASE_OF_EVENT = {
    Event.FIT_START: 'callback',
    Event.EPOCH_START: 'callback',
    Event.BEFORE_DATALOADER: 'data',
    Event.AFTER_DATALOADER: 'callback',
    Event.BEFORE_FORWARD: 'forward',
    Event.BEFORE_BACKWARD: 'backward',
    Event.AFTER_BACKWARD: 'callback',
    Event.AFTER_TRAIN_BATCH: 'optimizer',
    Event.BATCH_END: 'callback',
    Event.EVAL_BEFORE_ALL: 'eval',
    Event.EVAL_START: 'eval',
    Event.EVAL_BATCH_START: 'eval',
    Event.EVAL_BATCH_END: 'eval',
    Event.EVAL_AFTER_ALL: 'callback',
    Event.BATCH_CHECKPOINT: 'checkpoint',
    Event.EPOCH_END: 'callback',
    Event.EPOCH_CHECKPOINT: 'checkpoint',
    Event.FIT_END: 'end',
}
_STREAMS_NAMED = 3


class PhaseTracker(Callback):
    """Sets the phase, and the position in training at the start and end of each step. Costs a look-up in a table per event."""

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        del logger
        name = _PHASE_OF_EVENT.get(event)
        if name is not None:
            phases.enter(name)
        if event in (Event.BATCH_START, Event.BATCH_END, Event.FIT_START):
            now = state.timestamp
            phases.report(
                step=now.batch.value, samples=now.sample.value, tokens=now.token.value, epoch=now.epoch.value, batch_in_epoch=now.batch_in_epoch.value,
                sample_in_epoch=now.sample_in_epoch.value,
            )
        if event == Event.FIT_START:
            phases.report(source=_source(state.dataloader))


def _source(loader: Any) -> str:
    """What a loader reads: the folders of its streams, as far as it says so."""
    streams = getattr(getattr(loader, 'dataset', None), 'streams', None) or []
    places = [f'{s.remote or s.local}/{s.split}' if getattr(s, 'split', None) else str(s.remote or s.local) for s in streams[:_STREAMS_NAMED]]
    return ', '.join(places) + (f' and {len(streams) - _STREAMS_NAMED} more' if len(streams) > _STREAMS_NAMED else '')
