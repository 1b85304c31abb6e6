"""Names of parameters as users and checkpoints know them."""

from __future__ import annotations

import re

__all__ = ['plain_name']

# What activation checkpointing, torch.compile, FSDP 1 and others put between the parts of a name.
_WRAPPER = re.compile(r'(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)(?=\.)')


def plain_name(name: str) -> str:
    """``name`` without what wrappers put into it, and without DDP's ``module.`` at its start."""
    return _WRAPPER.sub(r'\1', name).replace('..', '.').lstrip('.').removeprefix('module.')
