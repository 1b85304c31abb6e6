"""JSON lines (or JSON arrays), local or remote, compressed or not -> MDS shards in ``out_root``: ``convert_dataset_json``."""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
from typing import Any, Sequence

from llmfoundry.command_utils.data_prep import remote
from llmfoundry.command_utils.data_prep.compressed import COMPRESSED_SUFFIXES
from llmfoundry.command_utils.data_prep.engine import ConversionSummary
from llmfoundry.command_utils.data_prep.options import TokenOptions, add_common_flags, make_plan, run_main
from llmfoundry.command_utils.data_prep.outputs import convert_to, output_names
from llmfoundry.command_utils.data_prep.readers import FileSource, InputFile, local_file

__all__ = ['JSON_PATTERNS', 'convert_dataset_json', 'convert_dataset_json_from_args', 'find_files', 'main']

JSON_PATTERNS = tuple(f'*.{kind}{suffix}' for kind in ('json', 'jsonl', 'ndjson') for suffix in ('', *COMPRESSED_SUFFIXES))


def find_files(path: str, patterns: tuple[str, ...]) -> list[InputFile]:
    """The input files at ``path`` (a file, a folder searched to any depth, or a URI), sorted by name.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if remote.is_remote(path):
        return [InputFile(uri, size) for uri, size in remote.list_files(path, patterns)]
    if os.path.isfile(path):
        return [local_file(path)]
    if not os.path.isdir(path):
        raise FileNotFoundError(f'{path}: no such file or folder')
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith('.'))
        found += [os.path.join(folder, n) for n in names if not n.startswith('.') and any(fnmatch.fnmatch(n, p) for p in patterns)]
    return [local_file(p) for p in sorted(found)]


def _of_split(files: list[InputFile], root: str, split: str) -> list[InputFile]:
    """The files of one split: those that name it, or for ``train``, if none does, all."""
    named = [f for f in files if split in re.split(r'[/\\.-]', f.path[len(root) :])]
    if named:
        return named
    if split != 'train' and files and files[0].path != root:
        raise ValueError(
            f'--split {split}: no file below {root} carries that name (as in {split}.jsonl or {split}/...); leave --split out to take all files'
        )
    return files


def convert_dataset_json(
    path: str,
    out_root: str,
    compression: str | None = None,
    concat_tokens: int | None = None,
    split: str = 'train',
    tokenizer: Any = None,
    **options: Any,
) -> ConversionSummary:
    """Converts JSON rows with a ``text`` into MDS shards.

    Args:
        path: a file, a folder or a URI; .json, .jsonl or .ndjson, plain or .gz, .zst, .xz, .bz2.
        out_root: folder or URI of the shards; must not hold anything yet.
        compression: of the shards: zstd, gz, bz2, br, snappy, with a level as in ``zstd:7``; None for none.
        concat_tokens: tokens in a sample. None keeps the text, one document per sample.
        split: which files of the folder, if their names carry split names.
        tokenizer: a name or a tokenizer of transformers; needed with ``concat_tokens``.
        options: see ``TokenOptions``.

    Raises:
        ValueError: arguments that do not fit, or an output that is not empty.
        DataError: an unusable row, with file and line (a ValueError, too).
        DatasetTooSmallError: the rows do not fill one sample.
    """
    present = output_names(out_root)
    if present:
        shown = ', '.join(present[:5])
        raise ValueError(
            f'--out_root={out_root} contains {shown}: it must be empty, so that the shards of the split {split!r} overlap with nothing. Remove it or name another.'
        )
    files = find_files(path, JSON_PATTERNS)
    if not files:
        raise ValueError(f'{path}: no file that matches {", ".join(JSON_PATTERNS[::6])} (or compressed as {", ".join(COMPRESSED_SUFFIXES)})')
    plan = make_plan(split, tokenizer, concat_tokens, compression, TokenOptions(**options))
    return convert_to(FileSource(_of_split(files, path, split), 'json'), plan, out_root)


def convert_dataset_json_from_args(
    path: str,
    out_root: str,
    compression: str | None = None,
    concat_tokens: int | None = None,
    split: str = 'train',
    tokenizer: str | None = None,
    **options: Any,
) -> ConversionSummary:
    """``convert_dataset_json`` with the values of the command line."""
    return convert_dataset_json(path, out_root, compression, concat_tokens, split.strip(), tokenizer, **options)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of scripts/data_prep/convert_dataset_json.py."""
    parser = argparse.ArgumentParser(description='Convert JSON rows with a "text" field to MDS shards.')
    parser.add_argument('--path', required=True, help='file, folder or URI of .json/.jsonl, plain or compressed')
    parser.add_argument('--out_root', required=True, help='folder or URI of the shards')
    parser.add_argument('--compression', default=None, help='of the shards: zstd, gz, bz2, br, snappy, with a level as in zstd:7')
    parser.add_argument('--split', default='train', help='which files of the folder, if their names carry split names')
    add_common_flags(parser, '--processes')
    run_main(lambda args: convert_dataset_json_from_args(**vars(args)), parser, argv)
