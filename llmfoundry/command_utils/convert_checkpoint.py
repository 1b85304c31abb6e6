"""``convert_checkpoint``: a sharded checkpoint as one file, or one file as a sharded checkpoint.

A run loads either form as it is; this is for other programs, for fewer files, and for starts of large runs, where each rank reads its part of a folder instead of the whole file. Parsing stays
free of torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

from llmfoundry.command_utils.error_report import exit_code_of
from llmfoundry.typed_registry import resolve_target

__all__ = ['ConvertArgs', 'convert_checkpoint', 'main', 'parse_args']


@dataclass(frozen=True)
class ConvertArgs:
    """Arguments of the conversion; see ``--help``."""

    source: str
    """``.pt`` file, folder of a sharded checkpoint, a link to one, or a URI."""
    target: str
    """New file or folder."""
    to: str
    """``monolithic`` or ``sharded``."""
    weights_only: bool = False
    """Leave out optimizer, callbacks, data position and random state."""
    allow_class: tuple[str, ...] = ()
    """Further classes that the checkpoint may hold."""


def parse_args(argv: Sequence[str] | None = None) -> ConvertArgs:
    """Arguments from the command line."""
    parser = argparse.ArgumentParser(
        prog='convert_checkpoint',
        description='Converts a training checkpoint between one .pt file and a sharded folder. The result continues the run as the original does, on any number of ranks, with DDP and FSDP2.',
    )
    parser.add_argument('source', metavar='IN', help='.pt file, folder of a sharded checkpoint (ep0-ba100), a link to one (latest-rank0.pt), or a URI (s3://...)')
    parser.add_argument('target', metavar='OUT', help='new .pt file or folder')
    parser.add_argument('--to', required=True, choices=['monolithic', 'sharded'], help='the form of OUT')
    parser.add_argument('--weights_only', action='store_true', help='weights, config and tokenizer only, as save_weights_only writes them')
    parser.add_argument('--allow_class', action='append', default=[], metavar='pkg.module.Class', help='a class of your own that the checkpoint may hold; may be repeated')
    args = vars(parser.parse_args(argv))
    return ConvertArgs(**{**args, 'allow_class': tuple(args['allow_class'])})


def convert_checkpoint(args: ConvertArgs) -> None:
    """Converts.

    Raises:
        FileNotFoundError: nothing at ``source``.
        FileExistsError: ``target`` exists.
        RuntimeError: ``source`` is damaged, unsafe to read (CheckpointError) or cannot be fetched.
        ValueError: an ``allow_class`` that is no class, or nothing at a remote ``source``.
    """
    source = args.source
    if '://' in source:
        names = resolve_target('llmfoundry.command_utils.save_folder:SaveNames')('', None, sharded=False)
        source, _ = resolve_target('llmfoundry.command_utils.remote_resumption:fetch_named')(source, names)
    else:
        problem = resolve_target('llmfoundry.checkpoint.local_path:unreadable')(source)
        if problem is not None:
            raise FileNotFoundError(problem)
        source = resolve_target('llmfoundry.checkpoint.local_path:follow')(source)
    resolve_target('llmfoundry.checkpoint.convert_form:convert_form')(
        Path(source), Path(args.target), sharded=args.to == 'sharded', weights_only=args.weights_only, extra_classes=args.allow_class,
    )
    print(f'Wrote {args.target}')


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command; 1 with one message for what a user can mend."""
    args = parse_args(argv)
    return exit_code_of(lambda: convert_checkpoint(args))


if __name__ == '__main__':
    sys.exit(main())
