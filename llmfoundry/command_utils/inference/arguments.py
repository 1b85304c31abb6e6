"""Command-line forms that the inference scripts share."""

from __future__ import annotations

import argparse

__all__ = ['add_hub_flags', 'boolean', 'seconds']

_TRUE, _FALSE = {'1', 'true', 'yes', 'on', 't', 'y'}, {'0', 'false', 'no', 'off', 'f', 'n'}


def boolean(text: str) -> bool:
    """``true``, ``no``, ``1`` and their kin; ``type=bool`` of argparse would take any text for true."""
    lowered = text.strip().lower()
    if lowered in _TRUE | _FALSE:
        return lowered in _TRUE
    raise argparse.ArgumentTypeError(f'{text!r} is not a boolean; write true or false')


def seconds(duration: float) -> str:
    """``1.234 s`` or ``12.3 ms``."""
    return f'{duration:.3f} s' if duration >= 1 else f'{1000 * duration:.1f} ms'


def add_hub_flags(parser: argparse.ArgumentParser) -> None:
    """Flags for models that come from the Hub or carry code."""
    parser.add_argument(
        '--trust_remote_code', type=boolean, nargs='?', const=True, default=False,
        help='run the code that lies in the model folder or on the Hub. Needed for MPT folders written by convert_composer_to_hf.py; default: false',
    )
    parser.add_argument('--use_auth_token', type=str, nargs='?', const='', default=None, help='Hugging Face token for private models; without a value, the one you are logged in with')
    parser.add_argument('--revision', type=str, default=None, help='branch, tag or commit on the Hub')
