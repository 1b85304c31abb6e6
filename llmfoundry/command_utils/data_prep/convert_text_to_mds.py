"""A folder of .txt files, local or remote -> tokenised MDS shards: ``convert_text_to_mds``.

A done file in the output holds the arguments and the names of the inputs, so that the same command on unchanged input returns at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any, Sequence

from llmfoundry.command_utils.data_prep import remote
from llmfoundry.command_utils.data_prep.convert_dataset_json import find_files
from llmfoundry.command_utils.data_prep.engine import ConversionSummary, say
from llmfoundry.command_utils.data_prep.mds_shards import index_text
from llmfoundry.command_utils.data_prep.options import TokenOptions, add_common_flags, make_plan, parse_bool, run_main, tokenizer_spec_of
from llmfoundry.command_utils.data_prep.outputs import available_cores, convert_to, output_names
from llmfoundry.command_utils.data_prep.readers import FileSource, InputFile
from llmfoundry.errors import InputFolderMissingDataError, InputFolderNotFound, OutputFolderNotEmptyError
from llmfoundry.whole_files import write_whole

__all__ = [
    'DONE_FILENAME',
    'convert_text_to_mds',
    'convert_text_to_mds_from_args',
    'default_processes',
    'download_and_convert',
    'is_already_processed',
    'main',
    'merge_shard_groups',
    'write_done_file',
]

log = logging.getLogger(__name__)

DONE_FILENAME = '.text_to_mds_conversion_done'
_PATTERNS = ('*.txt',)


def default_processes() -> int:
    """All cores but two, at least 1 and at most 32."""
    return min(max(available_cores() - 2, 1), 32)


def write_done_file(folder: str, args_str: str, object_names: list[str]) -> None:
    """Records in ``folder`` how and from what it was made.

    Args:
        folder: local folder.
        args_str: the arguments, as one line.
        object_names: names of the input files, in order.
    """
    write_whole(Path(folder) / DONE_FILENAME, _done_text(args_str, object_names))


def _done_text(args_str: str, object_names: Sequence[str]) -> str:
    return '\n'.join([args_str, *object_names]) + '\n'


def is_already_processed(output_root: str, args_str: str, object_names: list[str]) -> bool:
    """Whether the done file in ``output_root`` (a folder or a URI) says that these arguments and inputs made it."""
    if remote.is_remote(output_root):
        found = remote.remote_text(remote.join(output_root, DONE_FILENAME))
    else:
        path = Path(output_root) / DONE_FILENAME
        found = path.read_text(encoding='utf-8') if path.is_file() else None
    return found is not None and found.rstrip('\n') == _done_text(args_str, object_names).rstrip('\n')


def _input_files(input_folder: str) -> list[InputFile]:
    if not remote.is_remote(input_folder) and not os.path.isdir(input_folder):
        raise InputFolderNotFound(input_folder)
    files = find_files(input_folder, _PATTERNS)
    if not files:
        raise InputFolderMissingDataError(input_folder)
    return files


def convert_text_to_mds(
    tokenizer_name: str,
    output_folder: str,
    input_folder: str,
    concat_tokens: int,
    eos_text: str = '',
    bos_text: str = '',
    no_wrap: bool = False,
    compression: str | None = None,
    **options: Any,
) -> ConversionSummary | None:
    """Converts every .txt file below ``input_folder``, in the order of their names, each with one BOS and one EOS.

    Args:
        tokenizer_name: a name, a folder, or a tokenizer of transformers.
        output_folder: folder (empty or absent) or URI.
        input_folder: folder or URI, searched to any depth.
        concat_tokens: tokens in a sample.
        eos_text: text put after each file.
        bos_text: text put before each file.
        no_wrap: see ``TokenOptions``.
        compression: of the shards.
        options: ``processes``, ``args_str`` (how the done file records the arguments), ``reprocess`` (convert even if the done file says that it is
            done), ``trust_remote_code``, and the other fields of ``TokenOptions``.

    Returns:
        What was made, or None if the output was made from the same input by the same arguments before.

    Raises:
        InputFolderNotFound: no such folder.
        InputFolderMissingDataError: no .txt file in it.
        OutputFolderNotEmptyError: the local output holds something else.
        CannotUnicodeDecodeFile: a file that is not UTF-8.
        DatasetTooSmallError: the files do not fill one sample.
    """
    args_str, reprocess = options.pop('args_str', ''), options.pop('reprocess', False)
    kwargs = {'trust_remote_code': True} if options.pop('trust_remote_code', False) else None
    files = _input_files(input_folder)
    names = [f.path for f in files]
    if not reprocess and is_already_processed(output_folder, args_str, names):
        say(f'{output_folder} was made from {input_folder} by the same arguments before; nothing to do (--reprocess converts again).')
        return None
    if not remote.is_remote(output_folder) and output_names(output_folder):
        raise OutputFolderNotEmptyError(output_folder)
    options.setdefault('processes', default_processes())
    token_options = TokenOptions(bos_text=bos_text, eos_text=eos_text, no_wrap=no_wrap, tokenizer_kwargs=kwargs, **options)
    plan = make_plan('text', tokenizer_name, concat_tokens, compression, token_options)
    return convert_to(FileSource(files, 'text'), plan, output_folder, {DONE_FILENAME: _done_text(args_str, names)})


def download_and_convert(
    file_names: list[str],
    output_folder: str,
    input_folder: str,
    tokenizer_name: str,
    concat_tokens: int,
    eos_text: str,
    bos_text: str,
    no_wrap: bool,
    compression: str | None,
    trust_remote_code: bool = False,
) -> ConversionSummary:
    """Converts the files called ``file_names`` (below ``input_folder``, or with their full path or URI) into ``output_folder``, in one
    process. The other arguments are those of ``convert_text_to_mds``."""
    wanted = set(file_names)
    by_name = {name: f for f in _input_files(input_folder) for name in (f.path, f.path[len(input_folder) :].lstrip('/'))}
    missing = sorted(wanted - set(by_name))
    if missing:
        raise FileNotFoundError(f'{input_folder}: no file {", ".join(missing[:5])}')
    kwargs = {'trust_remote_code': True} if trust_remote_code else None
    options = TokenOptions(bos_text=bos_text, eos_text=eos_text, no_wrap=no_wrap, tokenizer_kwargs=kwargs, processes=1)
    plan = make_plan('text', tokenizer_name, concat_tokens, compression, options)
    return convert_to(FileSource([by_name[name] for name in file_names], 'text'), plan, output_folder)


def merge_shard_groups(root: str) -> None:
    """Makes one data set of the data sets in the sub-folders of ``root``: shards are moved up and renumbered, in the order of the sub-folders'
    names; the index comes last.

    Args:
        root: local folder; afterwards it holds the shards and ``index.json``, and the sub-folders are gone.

    Raises:
        FileNotFoundError: a sub-folder has no index.
    """
    folder, shards = Path(root), []
    groups = sorted(p for p in folder.iterdir() if p.is_dir())
    entries = [(group, json.loads((group / 'index.json').read_text(encoding='utf-8'))) for group in groups]
    for group, index in entries:
        for entry in index['shards']:
            number = f'{len(shards):05}'
            for key in ('raw_data', 'zip_data'):
                if entry.get(key):
                    old = entry[key]['basename']
                    new = '.'.join([old.split('.')[0], number, *old.split('.')[2:]])
                    entry[key]['basename'] = new
                    if (group / old).exists():
                        os.replace(group / old, folder / new)
            shards.append(entry)
    write_whole(folder / 'index.json', index_text(shards))
    for group in groups:
        (group / 'index.json').unlink()
        group.rmdir()


def convert_text_to_mds_from_args(
    output_folder: str, input_folder: str, concat_tokens: int, tokenizer: str, **flags: Any
) -> ConversionSummary | None:
    """``convert_text_to_mds`` with the values of the command line.

    Raises:
        ValueError: ``use_tokenizer_eos`` together with ``eos_text``, or a tokenizer without EOS.
    """
    logging.getLogger('llmfoundry').setLevel((flags.pop('logging_level', None) or 'INFO').upper())
    eos_text = flags.pop('eos_text', None) or ''
    bos_text = flags.pop('bos_text', None) or ''
    trust = bool(flags.get('trust_remote_code'))
    if flags.pop('use_tokenizer_eos', False):
        if eos_text:
            raise ValueError(f'Cannot set --eos_text (here {eos_text!r}) with --use_tokenizer_eos: leave one of them out')
        eos_text = tokenizer_spec_of(tokenizer, {'trust_remote_code': True} if trust else None).eos_token
        if not eos_text:
            raise ValueError(f'--use_tokenizer_eos: the tokenizer {tokenizer!r} has no EOS token; pass --eos_text')
    recorded = {'tokenizer': tokenizer, 'concat_tokens': concat_tokens, 'bos_text': bos_text, 'eos_text': eos_text}
    recorded.update(no_wrap=bool(flags.get('no_wrap')), compression=flags.get('compression'), output_folder=output_folder, input_folder=input_folder)
    if flags.get('processes') is None:
        flags['processes'] = default_processes()
    return convert_text_to_mds(
        tokenizer, output_folder, input_folder, concat_tokens, eos_text, bos_text, args_str=json.dumps(recorded, sort_keys=True), **flags
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of scripts/data_prep/convert_text_to_mds.py."""
    parser = argparse.ArgumentParser(description='Convert a folder of .txt files to tokenised MDS shards.')
    parser.add_argument('--output_folder', required=True, help='folder (empty or absent) or URI')
    parser.add_argument('--input_folder', required=True, help='folder or URI with .txt files at any depth')
    parser.add_argument('--compression', default='zstd', help='of the shards (default: %(default)s); "" for none')
    parser.add_argument('--use_tokenizer_eos', action='store_true', help="put the tokenizer's EOS after each file")
    parser.add_argument(
        '--reprocess', type=parse_bool, nargs='?', const=True, default=False, help='convert even if the done file says that it is done'
    )
    parser.add_argument('--trust-remote-code', action='store_true', help="run the tokenizer's own code from the Hub")
    parser.add_argument('--logging-level', default='INFO', help='default: %(default)s')
    add_common_flags(parser, '--processes', required=True)
    run_main(lambda args: convert_text_to_mds_from_args(**vars(args)), parser, argv)
