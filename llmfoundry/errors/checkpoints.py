"""Checkpoints and exported folders that cannot be used."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, incomplete, or not one at all."""


class CheckpointUploadError(CheckpointError):
    """A checkpoint that the object store did not take; the one on the machine is whole."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint that would have to run code to be read."""


class ParityError(CheckpointError):
    """An exported model that does not compute what the trained model computes."""


class AdapterMismatchError(ValueError):
    """A PEFT adapter that was made for another base model."""
