"""Prompts from the command line and from files."""

from __future__ import annotations

import os
from typing import Sequence

__all__ = ['PROMPT_FILE_PREFIX', 'load_prompts', 'load_prompts_from_file']

PROMPT_FILE_PREFIX = 'file::'


def load_prompts(prompts: Sequence[str], prompt_delimiter: str | None = None) -> list[str]:
    """The prompts, with every ``file::PATH`` replaced by the contents of that file.

    Args:
        prompts: texts or ``file::PATH`` references.
        prompt_delimiter: splits the text of a file into several prompts; None takes it whole.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file without a prompt.
    """
    loaded: list[str] = []
    for prompt in prompts:
        loaded += load_prompts_from_file(prompt, prompt_delimiter) if prompt.startswith(PROMPT_FILE_PREFIX) else [prompt]
    return loaded


def load_prompts_from_file(prompt_path: str, prompt_delimiter: str | None = None) -> list[str]:
    """The prompts in the file that ``file::PATH`` names; empty pieces are dropped.

    Raises:
        ValueError: ``prompt_path`` does not start with ``file::``, or the file holds no prompt.
        FileNotFoundError: no such file.
    """
    if not prompt_path.startswith(PROMPT_FILE_PREFIX):
        raise ValueError(f'prompt_path must start with {PROMPT_FILE_PREFIX!r}, got {prompt_path!r}')
    path = os.path.expanduser(prompt_path.removeprefix(PROMPT_FILE_PREFIX))
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{prompt_path!r}: no file at {path!r}')
    with open(path, encoding='utf-8') as f:
        text = f.read()
    # A shell passes '\n' as two characters.
    pieces = [text] if prompt_delimiter is None else text.split(prompt_delimiter.replace('\\n', '\n').replace('\\t', '\t'))
    prompts = [p for p in pieces if p.strip()]
    if not prompts:
        raise ValueError(f'{prompt_path!r} holds no prompt')
    return prompts
