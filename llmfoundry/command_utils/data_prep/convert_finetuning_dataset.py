"""Finetuning data -> one folder of MDS shards per split, as texts, chats or tokens: ``convert_finetuning_dataset``."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from llmfoundry.command_utils.data_prep import remote
from llmfoundry.command_utils.data_prep.engine import say
from llmfoundry.command_utils.data_prep.finetuning_rows import COLUMNS, RowSpec
from llmfoundry.command_utils.data_prep.mds_shards import compressor
from llmfoundry.command_utils.data_prep.options import parse_json_object, run_main
from llmfoundry.command_utils.data_prep.outputs import output_names
from llmfoundry.command_utils.data_prep.row_conversion import RowPlan, RowSummary, convert_rows
from llmfoundry.data.finetuning.cache_key import function_fingerprint, tokenizer_fingerprint
from llmfoundry.data.finetuning.examples import get_example_type
from llmfoundry.data.finetuning.preprocessing import apply, registered_names, resolve_preprocessing_fn
from llmfoundry.data.finetuning.sources import describe_source, fingerprint, load_rows
from llmfoundry.data.finetuning.targets import validate_target_settings
from llmfoundry.errors import DataError, InvalidDatasetError, UserError
from llmfoundry.tokenizers.build import build_tokenizer

__all__ = ['convert_finetuning_dataset', 'convert_finetuning_dataset_from_args', 'get_columns_and_format', 'main']

_SHARD = re.compile(r'shard\.\d+\.mds(\..*)?')
_INDEX = 'index.json'


def get_columns_and_format(dataset: Any, tokenizing: bool, preprocessing_fn: Callable[[Any], Mapping[str, Any]]) -> tuple[dict[str, str], str]:
    """The MDS columns for a data set and the form of its examples, from its first row.

    Args:
        dataset: anything that yields rows.
        tokenizing: whether the samples will hold tokens.
        preprocessing_fn: from a row to an example.

    Returns:
        Name -> MDS encoding, and ``prompt_response`` or ``chat``.

    Raises:
        UnknownExampleTypeError: the example has neither form.
    """
    form = get_example_type(preprocessing_fn(next(iter(dataset))))
    return dict(COLUMNS['turns' if tokenizing else form]), form


def convert_finetuning_dataset(
    dataset: str,
    data_subset: str | None,
    splits: Sequence[str],
    preprocessor: str | Mapping[str, str] | None,
    data_files: Sequence[str],
    skip_preprocessing: bool,
    out_root: str,
    local: str | None = None,
    compression: str | None = None,
    num_workers: int | None = None,
    tokenizer: str | None = None,
    tokenizer_kwargs: Mapping[str, Any] | None = None,
    max_seq_len: int = 2048,
    target_prompts: str = 'none',
    target_responses: str = 'last',
    encoder_decoder: bool = False,
) -> list[RowSummary]:
    """Converts splits of a finetuning data set into ``out_root/<split>``.

    Args:
        dataset: name on the Hub, ``json`` (or csv, parquet) with ``data_files``, a file, a folder or a URI: what ``hf_name`` of the loader takes.
        data_subset: configuration on the Hub; None for none.
        splits: names of the splits.
        preprocessor: registered name, ``module:function``, or map of columns; None for the function registered under ``dataset``.
        data_files: one file (or URI) per split, or none at all.
        skip_preprocessing: the rows are prompt/response or chat examples already.
        out_root: folder or URI; must not have any of the splits yet.
        local: folder that gets a copy of the shards; None for none.
        compression: of the shards: zstd, gz, bz2, br, snappy, with a level as in ``zstd:7``; None for none.
        num_workers: processes that preprocess and tokenise; None or 0 for this one, which is enough for a fast tokenizer. The shards do not depend on it.
        tokenizer: a name; the samples then hold ``turns`` of token ids. None keeps ``prompt`` and ``response``, or ``messages``.
        tokenizer_kwargs: passed to the tokenizer.
        max_seq_len, target_prompts, target_responses: examples with no token to train on under these are left out and counted (with a tokenizer).
        encoder_decoder: the examples are for an encoder-decoder model.

    Raises:
        ValueError: arguments that do not fit, no preprocessor, a split that ``out_root`` already has, or (DataError) a row that cannot be used, with its
            index, the reason and the example.
        UserError: a source that cannot be read; InvalidDatasetError where no example of a split can be used.
    """
    splits = list(dict.fromkeys(splits))
    _check(splits, data_files, out_root, local, compression)
    _check_numbers(max_seq_len, num_workers)
    validate_target_settings(target_prompts, target_responses, decoder_only_format=not encoder_decoder)
    _check_preprocessor(preprocessor, dataset, skip_preprocessing)
    spec = RowSpec(
        where='', form='', dataset_name=dataset, preprocessor=preprocessor, skip_preprocessing=skip_preprocessing, tokenizer=tokenizer or None,
        tokenizer_kwargs=dict(tokenizer_kwargs or {}), max_seq_len=max_seq_len, target_prompts=target_prompts, target_responses=target_responses,
        decoder_only_format=not encoder_decoder, search_path=tuple(sys.path),
    )  # fmt: skip
    files = dict(zip(splits, data_files, strict=True)) if data_files else {}
    folder = None if local is None else Path(local)
    summaries = []
    for split in splits:
        hf_kwargs = {'name': data_subset or None, 'data_files': {split: files[split]} if files else None}
        rows = load_rows(dataset, split, {key: value for key, value in hf_kwargs.items() if value is not None})
        plan = _plan(rows, replace(spec, where=describe_source(dataset, split, hf_kwargs)), split, compression or None, num_workers or 0)
        summaries.append(_convert_to(rows, plan, remote.join(out_root, split), folder, split))
    return summaries


def _check_numbers(max_seq_len: int, num_workers: int | None) -> None:
    if max_seq_len < 1:
        raise ValueError(f'--max_seq_len must be at least 1, got {max_seq_len}')
    if num_workers is not None and num_workers < 0:
        raise ValueError(f'--num_workers must be 0 or more, got {num_workers}')


def _check_preprocessor(preprocessor: str | Mapping[str, str] | None, dataset: str, skip_preprocessing: bool) -> None:
    if skip_preprocessing and preprocessor is not None:
        raise ValueError(f'--preprocessor {preprocessor} and --skip-preprocessing contradict each other; pass one of them')
    if not skip_preprocessing and resolve_preprocessing_fn(preprocessor, dataset) is None:
        raise ValueError(
            f'no preprocessing function is registered under --dataset {dataset}, and --preprocessor names none. Pass --preprocessor NAME or '
            f'--preprocessor package.module:function, or --skip-preprocessing if the rows hold prompt and response (or messages) already. '
            f'Registered: {", ".join(registered_names())}'
        )


def _check(splits: Sequence[str], data_files: Sequence[str], out_root: str, local: str | None, compression: str | None) -> None:
    """What can be known to be wrong before anything is read."""
    if not splits:
        raise ValueError('--splits names no split')
    if data_files and len(data_files) != len(splits):
        raise ValueError(
            f'--data_files and --splits must have the same length, one file for each split: got {len(data_files)} files ({", ".join(data_files)}) '
            f'and {len(splits)} splits ({", ".join(splits)})'
        )
    if local is not None and remote.is_remote(local):
        raise ValueError(f'--local {local}: the copy that is kept must be in a local folder; --out_root may be a URI')
    compressor(compression)
    for flag, root in (('--out_root', out_root), *((('--local', local),) if local is not None else ())):
        present = [split for split in splits if _holds_data(remote.join(root, split))]
        if present:
            raise ValueError(
                f'{flag}={root} already contains {", ".join(present)}, which cannot overlap with the requested splits {", ".join(splits)}. '
                f'Remove it or name another.'
            )


def _holds_data(output: str) -> bool:
    """Whether something lies there, other than the leftovers of a run of ours that was killed: a work folder, or shards that were uploaded without their
    index, which no reader takes for a data set."""
    names = output_names(output)
    return bool(names) and not (remote.is_remote(output) and all(_SHARD.fullmatch(name) for name in names))


def _plan(rows: Any, spec: RowSpec, split: str, compression: str | None, processes: int) -> RowPlan:
    if not len(rows):
        raise InvalidDatasetError(spec.where, 'it has no rows')
    function = None if spec.skip_preprocessing else resolve_preprocessing_fn(spec.preprocessor, spec.dataset_name)
    spec = replace(spec, form='turns' if spec.tokenizer else _form_of(rows[0], function, spec.where))
    tokenizer = tokenizer_fingerprint(build_tokenizer(spec.tokenizer, spec.tokenizer_kwargs)) if spec.tokenizer else None
    settings = [spec.max_seq_len, spec.target_prompts, spec.target_responses, spec.decoder_only_format]
    # A changed preprocessing function must not go on with what the old one began.
    parts = [fingerprint(rows), function_fingerprint(function), tokenizer, settings]
    return RowPlan(split, spec, hashlib.sha256(repr(parts).encode()).hexdigest(), compression, processes)


def _form_of(row: Mapping[str, Any], function: Any, where: str) -> str:
    """Which text columns the first row calls for."""
    try:
        return get_columns_and_format([row], False, lambda r: r if function is None else apply(function, r, None))[1]
    except UserError as e:
        raise DataError(f'row 0: {type(e).__name__}: {str(e).rstrip(".")}. The example: {str(row)[:300]}', file=where) from e


def _convert_to(rows: Any, plan: RowPlan, output: str, local: Path | None, split: str) -> RowSummary:
    """Converts into ``output``; by way of a work folder if it is a URI or if a local copy is to be kept."""
    if local is None and not remote.is_remote(output):
        summary = convert_rows(rows, plan, Path(output))
        say(f'{plan.name}: written to {output}')
        return summary
    folder = remote.staging_folder(output) if local is None else local / f'.{split}.partial'
    if (folder / _INDEX).exists():
        # An earlier run was killed between its conversion and the end of its upload. Its arguments are not known any more.
        shutil.rmtree(folder)
    summary = convert_rows(rows, plan, folder)
    say(f'{plan.name}: uploading to {output}' if remote.is_remote(output) else f'{plan.name}: copying to {output}')
    _copy(folder, output)
    if local is None:
        remote.remove_staging(folder)
    else:
        os.replace(folder, local / split)
        say(f'{plan.name}: a copy is kept in {local / split}')
    return summary


def _copy(folder: Path, output: str) -> None:
    """The files of ``folder`` to ``output``, ``index.json`` last and at once."""
    if remote.is_remote(output):
        remote.upload_folder(folder, output)
        return
    target = Path(output)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.iterdir(), key=lambda p: (p.name == _INDEX, p.name)):
        shutil.copyfile(path, target / f'.{path.name}.partial')
        os.replace(target / f'.{path.name}.partial', target / path.name)


def convert_finetuning_dataset_from_args(
    dataset: str,
    data_subset: str | None,
    splits: Sequence[str] | str,
    preprocessor: str | None,
    data_files: Sequence[str] | str | None,
    skip_preprocessing: bool,
    out_root: str,
    local: str | None,
    compression: str | None,
    num_workers: int | None,
    tokenizer: str | None,
    tokenizer_kwargs: str | Mapping[str, Any] | None,
    max_seq_len: int,
    target_prompts: str,
    target_responses: str,
    encoder_decoder: bool,
) -> list[RowSummary]:
    """``convert_finetuning_dataset`` with the values of the command line: JSON for ``tokenizer_kwargs`` and for a map of columns, lists perhaps as
    comma-separated text."""
    mapping = preprocessor.strip().startswith('{') if preprocessor else False
    return convert_finetuning_dataset(
        dataset=dataset,
        data_subset=data_subset,
        splits=_names(splits),
        preprocessor=parse_json_object('--preprocessor', preprocessor) if mapping else preprocessor or None,
        data_files=_names(data_files),
        skip_preprocessing=skip_preprocessing,
        out_root=out_root,
        local=local or None,
        compression=compression,
        num_workers=num_workers,
        tokenizer=tokenizer,
        tokenizer_kwargs=parse_json_object('--tokenizer_kwargs', tokenizer_kwargs),
        max_seq_len=max_seq_len,
        target_prompts=target_prompts,
        target_responses=target_responses,
        encoder_decoder=encoder_decoder,
    )


def _names(value: Sequence[str] | str | None) -> list[str]:
    parts = [value] if isinstance(value, str) else value or []
    return [name.strip() for part in parts for name in part.split(',') if name.strip()]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of scripts/data_prep/convert_finetuning_dataset.py."""
    parser = argparse.ArgumentParser(description='Convert a finetuning data set to MDS shards, as texts or tokens.')
    add = parser.add_argument
    add('--dataset', required=True, help='name on the Hub; json, csv or parquet with --data_files; or a file, folder or URI')
    add('--data_subset', default=None, help='configuration on the Hub')
    add('--splits', nargs='+', default=['train', 'validation'], help='default: %(default)s')
    add('--preprocessor', default=None, help='registered name, package.module:function, or a JSON map {"prompt": COLUMN, "response": COLUMN}')
    add('--data_files', nargs='+', default=[], help='one file per split')
    add('--skip-preprocessing', '--skip_preprocessing', action='store_true', help='the rows hold prompt and response, or messages, already')
    add('--out_root', required=True, help='folder or URI; each split gets a sub-folder')
    add('--local', default=None, help='folder in which to keep a copy of the shards')
    add('--compression', default=None, help='of the shards: zstd, gz, bz2, br, snappy, with a level as in zstd:7')
    add('--num_workers', type=int, default=None, help='processes that preprocess and tokenise (default: this one); the shards do not depend on it')
    add('--tokenizer', default=None, help='tokenise: llmfoundry://gpt2, a local folder, or a name on the Hub')
    add('--tokenizer_kwargs', default=None, help='JSON object')
    add('--max_seq_len', type=int, default=2048, help='examples with nothing to train within this many tokens are left out (default: %(default)s)')
    add('--target_prompts', default='none', help='none, all or length>=N (default: %(default)s)')
    add('--target_responses', default='last', help='last or all (default: %(default)s)')
    add('--encoder_decoder', action='store_true', help='the examples are for an encoder-decoder model')
    run_main(lambda args: convert_finetuning_dataset_from_args(**vars(args)), parser, argv)
