"""The ``dataset`` block of a ``finetuning`` loader: its keys with types, and the check of a whole block.

What goes together is decided by ``llmfoundry/data/finetuning/dataset_block.py``, which the loader asks too; it is reached by name, as configs do not import components.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmfoundry.config.base import Block, field_types
from llmfoundry.config.blocks import check_kwargs, check_type, expect_mapping
from llmfoundry.config.report import KeyPath, Report
from llmfoundry.config.signatures import read_signature
from llmfoundry.config.value_types import UNRESOLVED
from llmfoundry.typed_registry import resolve_target

__all__ = ['FinetuningDatasetBlock', 'check_finetuning_dataset']

_RULES = 'llmfoundry.data.finetuning.dataset_block:problems'


class FinetuningDatasetBlock(Block):
    """``train_loader.dataset`` of the loader ``finetuning``; with MDS shards, every argument of StreamingDataset besides."""

    hf_name: str | None = None
    """Hugging Face dataset, local folder, URI, or ``json``, ``csv``, ``parquet`` with files in hf_kwargs."""
    hf_kwargs: dict[str, Any] | None = None
    """Arguments of load_dataset, such as data_files, data_dir, revision."""
    split: str | None = None
    """Split of the data; mandatory for Hugging Face data."""
    preprocessing_fn: str | dict[str, Any] | None = None
    """Registered name, ``module:function`` or {prompt: column, response: column}; null uses the one registered for hf_name, if any."""
    safe_load: bool | None = False
    """Only data files of known kinds, no code from the Hub."""
    name: str | None = None
    """Older spelling: the registered function, and with it the data."""
    kwargs: dict[str, Any] | None = None
    """Older spelling of hf_kwargs."""
    local: str | None = None
    """Folder of the MDS shards, or where to keep what is streamed."""
    remote: str | None = None
    """Where MDS shards are streamed from."""
    streams: dict[str, Any] | None = None
    """Several MDS sources by name."""
    token_encoding_type: str | None = 'int64'
    """Type of token ids that shards hold as bytes."""
    max_seq_len: int | float = 2048
    """Tokens of a row; longer examples are cut."""
    decoder_only_format: bool
    """True for GPT-like models, false for encoder-decoder models."""
    target_prompts: str | None = 'none'
    """Which prompts are trained: none, all or length>=N (N tokens)."""
    target_responses: str | None = 'last'
    """Which responses are trained: last or all."""
    shuffle: bool | None = None
    """Another order in each epoch; mandatory for Hugging Face data."""
    shuffle_seed: int | None = 0
    """Seed of the order; 9176 for MDS shards, which is Streaming's."""
    packing: bool | None = False
    """As many examples in each row as fit; none is dropped."""
    packing_ratio: int | float | str | None = None
    """Examples per row: a number of at least 1, or auto."""
    max_leftover_bins_to_keep: int | None = None
    """Accepted for older configs; what does not fit is never dropped."""
    allow_pad_trimming: bool | None = False
    """Cut padding that a batch shares, after the first batch."""
    pad_to_longest: bool | None = False
    """Pad to the longest row of the batch, not to max_seq_len."""
    auto_packing_replication: int | None = None
    """Sequence parallelism: only 1."""
    seq_parallel_replication: int | None = None
    """Sequence parallelism: only 1."""


def check_finetuning_dataset(report: Report, path: KeyPath, dataset: Mapping[str, Any]) -> None:
    """Notes what is wrong with a block: types first, then what the loader would refuse."""
    types = field_types(FinetuningDatasetBlock)
    streaming = read_signature('streaming:StreamingDataset')
    streaming_types = {name: p.type for name, p in streaming.parameters.items()} if streaming else {}
    for key, value in dataset.items():
        tp = types.get(key, streaming_types.get(key))
        if tp is not None:
            check_type(report, (*path, key), value, tp)
    streams = dataset.get('streams')
    signature = read_signature('streaming:Stream')
    for name, stream in streams.items() if isinstance(streams, Mapping) else ():
        if expect_mapping(report, (*path, 'streams', str(name)), stream):
            check_kwargs(report, (*path, 'streams', str(name)), stream, signature)
    if any(value is UNRESOLVED for value in dataset.values()):
        return
    for key, text in resolve_target(_RULES)(dataset, tuple(streaming_types)):
        if not report.has((*path, key)):
            report.add((*path, key) if key else path, text)
