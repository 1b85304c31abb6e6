"""C4, the Pile, or a folder with files per split -> one folder of MDS shards per split: ``convert_dataset_hf``."""

from __future__ import annotations

import argparse
from typing import Any, Sequence

from llmfoundry.command_utils.data_prep import remote
from llmfoundry.command_utils.data_prep.engine import ConversionSummary
from llmfoundry.command_utils.data_prep.hub_source import resolve_dataset, split_source
from llmfoundry.command_utils.data_prep.options import TokenOptions, add_common_flags, make_plan, parse_json_object, run_main
from llmfoundry.command_utils.data_prep.outputs import convert_to, output_names

__all__ = ['DEFAULT_SPLITS', 'convert_dataset_hf', 'convert_dataset_hf_from_args', 'main']

DEFAULT_SPLITS = ('train', 'train_small', 'val', 'val_small', 'val_xsmall')


def convert_dataset_hf(
    dataset: str,
    data_subset: str | None,
    splits: Sequence[str],
    out_root: str,
    compression: str | None = None,
    concat_tokens: int | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> list[ConversionSummary]:
    """Converts splits of a data set into ``out_root/<split>``.

    Args:
        dataset: ``allenai/c4`` (or ``c4``), ``the_pile``, or a folder or URI with json or parquet files per split.
        data_subset: configuration on the Hub (``en``), or sub-folder; None for none.
        splits: ``train``, ``val``; ``train_small`` (the first 100,000 rows), ``val_small`` (10,000), ``val_xsmall`` (3,000), ``val_xxsmall`` (100).
        out_root: folder or URI; must not have any of the splits yet.
        compression: of the shards: zstd, gz, bz2, br, snappy, with a level as in ``zstd:7``; None for none.
        concat_tokens: tokens in a sample. None keeps the text, one document per sample.
        tokenizer: a name or a tokenizer of transformers; needed with ``concat_tokens``.
        options: see ``TokenOptions``; ``num_workers`` stands for ``processes``.

    Raises:
        ValueError: an unknown data set, arguments that do not fit, a split that ``out_root`` already has, or a tokenizer that adds neither BOS nor
        EOS while both texts are empty.
        KeyError: an unknown split.
        DataError: an unusable row (a ValueError, too).
    """
    if 'num_workers' in options:
        options['processes'] = options.pop('num_workers')
    name = resolve_dataset(dataset)
    splits = list(dict.fromkeys(splits))
    present = [s for s in splits if output_names(remote.join(out_root, s))]
    if present:
        raise ValueError(
            f'--out_root={out_root} already contains {", ".join(present)}, which cannot overlap with the requested splits {", ".join(splits)}. Remove it or name another.'
        )
    sources = {split: split_source(name, data_subset, split) for split in splits}
    plan_options = TokenOptions(**options)
    plans = {split: make_plan(split, tokenizer, concat_tokens, compression, plan_options, require_separator=True) for split in splits}
    return [convert_to(sources[split], plans[split], remote.join(out_root, split)) for split in splits]


def convert_dataset_hf_from_args(
    dataset: str,
    data_subset: str | None,
    splits: Sequence[str] | str,
    out_root: str,
    compression: str | None = None,
    concat_tokens: int | None = None,
    tokenizer: str | None = None,
    tokenizer_kwargs: str | dict[str, Any] | None = None,
    **options: Any,
) -> list[ConversionSummary]:
    """``convert_dataset_hf`` with the values of the command line: ``tokenizer_kwargs`` as JSON, ``splits`` perhaps as one comma-separated string."""
    names = splits.split(',') if isinstance(splits, str) else [name for part in splits for name in part.split(',')]
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise ValueError('--splits names no split')
    return convert_dataset_hf(
        dataset, data_subset, names, out_root, compression, concat_tokens, tokenizer, tokenizer_kwargs=parse_json_object('--tokenizer_kwargs', tokenizer_kwargs), **options
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of scripts/data_prep/convert_dataset_hf.py."""
    parser = argparse.ArgumentParser(description='Convert a Hugging Face data set to MDS shards, optionally tokenised and concatenated.')
    parser.add_argument('--dataset', required=True, help='allenai/c4 (or c4), the_pile, or a folder or URI with json or parquet files per split')
    parser.add_argument('--data_subset', default=None, help='configuration on the Hub, such as en')
    parser.add_argument('--splits', nargs='+', default=list(DEFAULT_SPLITS), help='default: %(default)s')
    parser.add_argument('--out_root', required=True, help='folder or URI; each split gets a sub-folder')
    parser.add_argument('--compression', default=None, help='of the shards: zstd, gz, bz2, br, snappy, with a level as in zstd:7')
    parser.add_argument('--tokenizer_kwargs', default=None, help='JSON object')
    add_common_flags(parser, '--num_workers')
    run_main(lambda args: convert_dataset_hf_from_args(**vars(args)), parser, argv)
