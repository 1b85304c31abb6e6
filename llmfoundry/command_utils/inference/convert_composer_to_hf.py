"""``convert_composer_to_hf.py``: a Composer checkpoint becomes a Hugging Face folder.

Parsing stays free of torch, so that ``--help`` answers at once; the work is in ``llmfoundry.checkpoint``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Sequence

from llmfoundry.command_utils.error_report import exit_code_of
from llmfoundry.command_utils.inference.arguments import boolean
from llmfoundry.typed_registry import resolve_target

__all__ = ['ConvertArgs', 'convert_composer_to_hf', 'main', 'parse_args']

_REMOTE_CODE_HINT = (
    '--test_uploaded_model loads the uploaded MPT, whose code lies in the repository; pass --trust_remote_code to allow it, or leave --test_uploaded_model out.'
)

_UNCHECKED = {
    'adapter': "adapter: load it with PeftModel.from_pretrained(base_model, folder), or merge it with merge_adapter; its weights are the checkpoint's own",
    'merged': 'parity: every merged layer computes what the layer and its adapter computed',
    'skipped': 'parity: not checked (--skip_parity)',
}


@dataclass(frozen=True)
class ConvertArgs:
    """Arguments of the conversion; see ``--help``."""

    composer_path: str
    """Composer checkpoint: a .pt file, a folder of a sharded checkpoint, or a URI of either."""
    hf_output_path: str
    """New local folder, or URI of an object store."""
    local_checkpoint_save_location: str | None = None
    """Where a downloaded checkpoint is kept; default: a temporary folder."""
    output_precision: str = 'fp32'
    """fp32, fp16 or bf16."""
    hf_repo_for_upload: str | None = None
    """Hub repository to upload to, created as private."""
    test_uploaded_model: bool = False
    """Whether to download the repository again and compare it with the folder."""
    trust_remote_code: bool = False
    """Whether code of a model or tokenizer that is not ours may run."""
    max_shard_size: str = '5GB'
    """Largest file of weights."""
    skip_parity: bool = False
    """Whether to skip the comparison of the folder with the trained model."""
    allow_class: tuple[str, ...] = ()
    """Classes beyond Composer's own that the checkpoint may hold, as package.module.Class."""
    merge_adapter: bool = False
    """Whether a checkpoint with an adapter is written merged."""
    base_model: str | None = None
    """Base model to merge into, where the checkpoint does not hold it."""


def parse_args(argv: Sequence[str] | None = None) -> ConvertArgs:
    """Arguments from the command line."""
    parser = argparse.ArgumentParser(
        prog='convert_composer_to_hf.py', description='Convert a Composer checkpoint (one file or sharded) into a Hugging Face folder that loads without llmfoundry.',
    )
    parser.add_argument('--composer_path', required=True, help='Composer checkpoint: a .pt file, a folder of a sharded checkpoint, or a URI (s3://..., gs://...) of either')
    parser.add_argument('--hf_output_path', required=True, help='folder to create, or URI of an object store; a folder must not exist yet')
    parser.add_argument('--local_checkpoint_save_location', default=None, help='where to keep a downloaded checkpoint; default: a temporary folder, removed afterwards')
    parser.add_argument('--output_precision', choices=['fp32', 'fp16', 'bf16'], default='fp32', help='precision of the weights (default: %(default)s)')
    parser.add_argument('--hf_repo_for_upload', default=None, help='upload to this repository of the Hugging Face Hub, created as private')
    parser.add_argument('--test_uploaded_model', action='store_true', help='download the uploaded model again and compare it with the folder')
    parser.add_argument(
        '--trust_remote_code', type=boolean, nargs='?', const=True, default=False,
        help='run code of a model or tokenizer from the Hub (default: false); our MPT does not need it',
    )
    parser.add_argument('--max_shard_size', default='5GB', help='largest file of weights (default: %(default)s); bounds the memory that writing takes')
    parser.add_argument('--skip_parity', action='store_true', help='do not compare the written folder with the trained model')
    parser.add_argument('--allow_class', action='append', default=[], metavar='PACKAGE.MODULE.CLASS', help='a class of your own that the checkpoint may hold; may be repeated')
    parser.add_argument('--merge_adapter', action='store_true', help="of a run with an adapter, write the merged model; default: the adapter alone, in PEFT's format")
    parser.add_argument('--base_model', default=None, help='with --merge_adapter: base model to merge into, where the checkpoint does not hold it; default: the one that the adapter names')
    values = vars(parser.parse_args(argv))
    values['allow_class'] = tuple(values['allow_class'])
    return ConvertArgs(**values)


@contextlib.contextmanager
def _local_output(hf_output_path: str) -> Iterator[Path]:
    """The folder to write: the given one, or a temporary one if the output is remote."""
    if '://' not in hf_output_path:
        yield Path(hf_output_path)
        return
    with tempfile.TemporaryDirectory(prefix='hf-export-') as folder:
        yield Path(folder) / (os.path.basename(hf_output_path.rstrip('/')) or 'model')


def convert_composer_to_hf(args: ConvertArgs) -> None:
    """Converts, checks and, if asked, uploads.

    Raises:
        FileExistsError: the output folder exists.
        ValueError: ``test_uploaded_model`` of an MPT without ``trust_remote_code``, or without a repository.
        RuntimeError: an unusable checkpoint, or an export that differs from the trained model.
    """
    if args.test_uploaded_model and not args.hf_repo_for_upload:
        raise ValueError('--test_uploaded_model needs --hf_repo_for_upload, the repository to test')
    make_options = resolve_target('llmfoundry.checkpoint.composer_to_hf:ExportOptions')
    convert = resolve_target('llmfoundry.checkpoint.composer_to_hf:convert_checkpoint')
    options = make_options(
        precision=args.output_precision, max_shard_size=args.max_shard_size, trust_remote_code=args.trust_remote_code,
        check_parity=not args.skip_parity, allowed_classes=args.allow_class, merge_adapter=args.merge_adapter, base_model=args.base_model,
    )
    with _local_output(args.hf_output_path) as folder:
        print(f'Converting {args.composer_path} to {args.hf_output_path} in {args.output_precision}')
        report = convert(args.composer_path, folder, options, args.local_checkpoint_save_location)
        print(report if report is not None else _UNCHECKED['adapter' if (folder / 'adapter_config.json').exists() else 'merged' if args.merge_adapter else 'skipped'])
        has_code = (folder / 'modeling_mpt.py').exists()
        if '://' in args.hf_output_path:
            resolve_target('llmfoundry.checkpoint.upload:upload_folder')(folder, args.hf_output_path)
        if args.hf_repo_for_upload:
            if args.test_uploaded_model and has_code and not args.trust_remote_code:
                raise ValueError(_REMOTE_CODE_HINT)
            print('Uploaded to', resolve_target('llmfoundry.checkpoint.upload:upload_to_hub')(folder, args.hf_repo_for_upload))
            if args.test_uploaded_model:
                resolve_target('llmfoundry.checkpoint.upload:check_uploaded_model')(folder, args.hf_repo_for_upload, args.trust_remote_code)
                print(f'{args.hf_repo_for_upload} equals the folder')
    print(f'Wrote {args.hf_output_path}')
    if has_code:
        print(f"Load it with AutoModelForCausalLM.from_pretrained('{args.hf_output_path}', trust_remote_code=True): the code of the model lies in the folder")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the script; 1 with one message for what a user can mend."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format='%(levelname)s: %(message)s')
    return exit_code_of(lambda: convert_composer_to_hf(args))


if __name__ == '__main__':
    sys.exit(main())
