"""``merge_adapter``: a base model and a PEFT adapter become one Hugging Face folder.

Parsing stays free of torch, so that ``--help`` answers at once; the work is in ``llmfoundry.checkpoint.merge_adapter``.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass
from typing import Sequence

from llmfoundry.command_utils.error_report import exit_code_of
from llmfoundry.command_utils.inference.arguments import boolean
from llmfoundry.typed_registry import resolve_target

__all__ = ['MergeArgs', 'main', 'merge_adapter', 'parse_args']


@dataclass(frozen=True)
class MergeArgs:
    """Arguments of the merge; see ``--help``."""

    basemodel: str
    """Folder or Hub name of the base model."""
    peftmodel: str
    """Folder or Hub name of the adapter."""
    outpath: str
    """New folder."""
    tokenizer: str | None = None
    """Tokenizer to save; None: that of the adapter, else that of the base model."""
    device_map: str | None = None
    """Where layers are merged."""
    precision: str = 'auto'
    """Of the merged weights; auto: that of the base model."""
    max_shard_size: str = '5GB'
    """Largest file of weights."""
    trust_remote_code: bool = False
    """Whether code of the base model may run."""
    any_base: bool = False
    """Whether the adapter may name another base model."""


def parse_args(argv: Sequence[str] | None = None) -> MergeArgs:
    """Arguments from the command line."""
    parser = argparse.ArgumentParser(
        prog='merge_adapter',
        description='Merges adapters into a base model and saves the output as a single model. Memory stays at one layer and one file of weights, whatever the size of the model.',
    )
    parser.add_argument('basemodel', help='Name (e.g. HuggingFace Hub id) or Path of Base Model')
    parser.add_argument('peftmodel', help='Name or Path of Peft adapter')
    parser.add_argument('outpath', help='Where to save the merged model; a folder that does not exist yet')
    parser.add_argument('--tokenizer', default=None, help="Name or Path to tokenizer to save with the model. If not specified, will use the adapter model tokenizer, else the base model's")
    parser.add_argument('--device_map', default=None, help="Device map for merging the model. Can be 'auto' (the default), 'cpu', 'cuda' or a JSON string")
    parser.add_argument('--precision', default='auto', choices=['auto', 'fp32', 'fp16', 'bf16'], help='precision of the weights (default: that of the base model)')
    parser.add_argument('--max_shard_size', default='5GB', help='largest file of weights (default: %(default)s)')
    parser.add_argument('--trust_remote_code', type=boolean, nargs='?', const=True, default=False, help='run code in the repository of the base model (default: false)')
    parser.add_argument('--any_base', action='store_true', help='merge although the adapter names a base model of another name; sizes and layers must fit all the same')
    return MergeArgs(**vars(parser.parse_args(argv)))


def merge_adapter(args: MergeArgs) -> None:
    """Merges.

    Raises:
        FileExistsError: the output folder exists.
        ValueError: no adapter, one that cannot be merged, or (AdapterMismatchError) one of another base model.
        RuntimeError: an unusable base model (CheckpointError), or a merged layer that computes something else (ParityError).
    """
    options = resolve_target('llmfoundry.checkpoint.merge_adapter:MergeOptions')(
        tokenizer=args.tokenizer, device_map=args.device_map, precision=args.precision, max_shard_size=args.max_shard_size, trust_remote_code=args.trust_remote_code,
        any_base=args.any_base,
    )
    resolve_target('llmfoundry.checkpoint.merge_adapter:merge_adapter')(args.basemodel, args.peftmodel, args.outpath, options)
    print(f'Wrote {args.outpath}')


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the command; 1 with one message for what a user can mend."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    return exit_code_of(lambda: merge_adapter(args))


if __name__ == '__main__':
    sys.exit(main())
