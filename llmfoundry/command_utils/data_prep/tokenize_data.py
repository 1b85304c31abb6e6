"""Prompt/generation JSON lines -> one Arrow file of token ids and labels: ``tokenize_data``, document 004's data preparation.

The input is read a megabyte at a time and each megabyte becomes one record batch, so memory does not depend on the size of the file. The result
appears under its name only when it is whole. An Arrow file cannot be continued after a kill without reading it back; at a gigabyte of text in a few
minutes a killed run simply starts again, unlike the converters to MDS.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from llmfoundry.command_utils.data_prep import remote
from llmfoundry.command_utils.data_prep.convert_dataset_json import JSON_PATTERNS, find_files
from llmfoundry.command_utils.data_prep.engine import say
from llmfoundry.command_utils.data_prep.options import run_main
from llmfoundry.command_utils.data_prep.outputs import available_cores
from llmfoundry.command_utils.data_prep.pair_encoder import ENCODER, IGNORE_INDEX, EncodedPairs, PairSpec
from llmfoundry.command_utils.data_prep.pool import WorkerPool
from llmfoundry.command_utils.data_prep.progress import Progress, human_time
from llmfoundry.command_utils.data_prep.readers import BLOCK_BYTES, FileSource
from llmfoundry.command_utils.data_prep.rows import pair_of_row
from llmfoundry.command_utils.data_prep.tokenizer_spec import describe_tokenizer
from llmfoundry.data.token_concat import TOKEN_DTYPE
from llmfoundry.errors import DataError, InvalidDatasetError
from llmfoundry.whole_files import appearing_whole, flush_folder

__all__ = ['TokenizeSummary', 'main', 'tokenize_data']


@dataclass
class TokenizeSummary:
    """What came out. ``tokens`` counts those of the kept rows, ``target_tokens`` those that are trained (generation and EOS)."""

    rows: int = 0
    kept: int = 0
    too_long: int = 0
    empty: int = 0
    tokens: int = 0
    target_tokens: int = 0
    engine: str = ''
    seconds: float = 0.0


class _EngineDiffers(Exception):
    """tiktoken and the tokenizer gave different ids for a piece of the text."""


def tokenize_data(
    input_file: str,
    output_file: str,
    tokenizer_path: str,
    max_length: int = 2048,
    processes: int | None = None,
    use_tiktoken: bool = True,
) -> TokenizeSummary:
    """Writes the Arrow record-batch file ``output_file`` with columns ``input_ids`` and ``labels`` (lists of int32; -100 over the prompt).

    Args:
        input_file: JSON lines with ``prompt`` and ``generation``, plain or .gz, .zst, .xz, .bz2; a file, a folder or a URI.
        output_file: path or URI; replaced if it is there.
        tokenizer_path: a local folder, ``llmfoundry://gpt2``, or a name on the Hugging Face Hub.
        max_length: rows of more tokens than this, EOS included, are left out and counted; nothing is cut.
        processes: tokenising processes; None for one per core. The file does not depend on it.
        use_tiktoken: let tiktoken stand in for a byte-level BPE tokenizer when its ids are the same.

    Returns:
        The counts, which are also printed.

    Raises:
        DataError: an unusable row, with file and line (a ValueError, too). No file is written.
        InvalidDatasetError: no row is left.
        ValueError: a tokenizer that cannot be loaded or has no EOS token, or arguments out of range.
        FileNotFoundError: nothing is at ``input_file``.
    """
    if max_length < 2:
        raise ValueError(f'--max-length must be at least 2 (one token and EOS), got {max_length}')
    if processes is not None and processes < 1:
        raise ValueError(f'--processes must be at least 1, got {processes}')
    files = find_files(input_file, (*JSON_PATTERNS, os.path.basename(input_file)))
    if not files:
        raise FileNotFoundError(f'{input_file}: no such file, and no folder with {", ".join(JSON_PATTERNS[::6])}')
    tokenizer = describe_tokenizer(tokenizer_path)
    if tokenizer.eos_id is None:
        raise ValueError(f'the tokenizer {tokenizer_path!r} has no EOS token, so the model could never learn where a generation ends. Use one that has.')
    source = FileSource(files, 'json', convert=pair_of_row)
    spec = PairSpec(tokenizer, max_length, use_tiktoken)
    blocks = (source.total_bytes or BLOCK_BYTES) // BLOCK_BYTES + 1
    count = min(processes or available_cores(), blocks)
    if not remote.is_remote(output_file):
        summary = _write_file(source, spec, count, Path(output_file))
    else:
        with tempfile.TemporaryDirectory(prefix='llmfoundry-') as folder:
            local = Path(folder) / 'tokens.arrow'
            summary = _write_file(source, spec, count, local)
            remote.upload_file(local, output_file)
    _report(summary, input_file, output_file, max_length)
    return summary


def _write_file(source: FileSource, spec: PairSpec, processes: int, output: Path) -> TokenizeSummary:
    """Writes beside ``output`` and renames when the file is whole."""
    # One name for all runs, so that what a killed run left is written over; the lock goes with its process.
    partial = output.with_name(f'{output.name}.partial')
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, 'ab') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError('another process is writing this file. Wait for it, or choose another place.', file=str(output)) from None
            with appearing_whole(output, partial):
                summary = _tokenize_with_the_right_engine(source, spec, processes, partial)
        flush_folder(output.parent)
    except OSError as e:
        reason = os.strerror(e.errno) if e.errno else str(e)
        raise DataError(f'cannot write the output: {reason}. Make room or choose another place.', file=str(output)) from e
    return summary


def _tokenize_with_the_right_engine(source: FileSource, spec: PairSpec, processes: int, path: Path) -> TokenizeSummary:
    try:
        summary = _tokenize(source, spec, processes, path)
    except _EngineDiffers as e:
        say(f'tiktoken and the tokenizer differ on {e}; starting over with the tokenizers library, which is slower.')
        summary = _tokenize(source, replace(spec, use_tiktoken=False), processes, path)
    if not summary.kept:
        reason = f'of {summary.rows:,} rows, {_dropped(summary, spec.max_length) or "none is there"}, so nothing was written'
        raise InvalidDatasetError(source.files[0].path, reason)
    return summary


def _tokenize(source: FileSource, spec: PairSpec, processes: int, path: Path) -> TokenizeSummary:
    import pyarrow as pa

    schema = pa.schema([(name, pa.list_(pa.int32())) for name in ('input_ids', 'labels')])
    summary, began = TokenizeSummary(), time.monotonic()
    progress = Progress('tokenizing', source.total_bytes)
    with WorkerPool(spec, processes, ENCODER) as pool, pa.OSFile(str(path), 'wb') as sink, pa.ipc.new_file(sink, schema) as writer:
        facts = pool.facts()
        summary.engine = facts.engine
        if facts.reason and spec.use_tiktoken:
            say(f'tokenising with {facts.engine}, not with the faster tiktoken: {facts.reason}.')
        try:
            blocks = ((block.bytes_read, block.segments) for block in _readable(source))
            for bytes_read, encoded in pool.map(blocks):
                batch = _take(encoded, summary)
                if batch is not None:
                    writer.write_batch(pa.record_batch(batch, schema=schema))
                progress.update(bytes_read, summary.tokens, summary.rows)
        finally:
            progress.close()
    summary.seconds = time.monotonic() - began
    return summary


def _readable(source: FileSource) -> Any:
    """The blocks, with failures of the input told apart from failures of the output."""
    try:
        yield from source.blocks({})
    except OSError as e:
        raise DataError(f'the input cannot be read any further: {e}.') from e


def _take(encoded: EncodedPairs, summary: TokenizeSummary) -> list[Any] | None:
    """Adds one block to the counts; the columns of its record batch, None if no row of it is kept."""
    import pyarrow as pa

    if encoded.bad is not None:
        raise DataError(f'{encoded.bad.message}. Repair or remove the row.', file=encoded.bad.file, line=encoded.bad.line)
    if encoded.differs is not None:
        raise _EngineDiffers(repr(encoded.differs))
    summary.rows += encoded.rows
    summary.too_long += encoded.too_long
    summary.empty += encoded.empty
    summary.kept += len(encoded.lengths)
    if not len(encoded.lengths):
        return None
    labels = np.frombuffer(encoded.labels, dtype=TOKEN_DTYPE)
    summary.tokens += len(labels)
    summary.target_tokens += int((labels != IGNORE_INDEX).sum())
    offsets = pa.array(np.concatenate([[0], np.cumsum(encoded.lengths)]).astype(np.int32))
    ids = np.frombuffer(encoded.ids, dtype=TOKEN_DTYPE)
    return [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (ids, labels)]


def _dropped(summary: TokenizeSummary, max_length: int) -> str:
    """The rows left out, in words; '' if there are none."""
    parts = [(summary.too_long, f'longer than {max_length:,} tokens'), (summary.empty, 'with an empty generation')]
    return ', '.join(f'{count:,} {why}' for count, why in parts if count)


def _report(summary: TokenizeSummary, source: str, where: str, max_length: int) -> None:
    rate = summary.tokens / max(summary.seconds, 1e-6)
    say(
        f'{source}: {summary.kept:,} of {summary.rows:,} rows, {summary.tokens:,} tokens ({summary.target_tokens:,} of them trained) -> {where} '
        f'({human_time(summary.seconds)}, {rate:,.0f} tokens/s by {summary.engine})'
    )
    dropped = _dropped(summary, max_length)
    if dropped:
        say(f'{source}: {summary.rows - summary.kept:,} rows were left out: {dropped}')


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of preparation/tokenize_data.py."""
    parser = argparse.ArgumentParser(description='Tokenise prompt/generation JSON lines into an Arrow file for finetuning.')
    parser.add_argument('-i', '--input-file', required=True, help='JSON lines with "prompt" and "generation"; plain or compressed')
    parser.add_argument('-o', '--output-file', required=True, help='Arrow file with input_ids and labels')
    parser.add_argument('-t', '--tokenizer-path', required=True, help='a local folder, a name on the Hugging Face Hub, or llmfoundry://gpt2')
    parser.add_argument('-l', '--max-length', type=int, default=2048, help='rows with more tokens are left out and counted (default: %(default)s)')
    parser.add_argument('--processes', type=int, default=None, help='tokenising processes (default: one per core); the file does not depend on it')
    run_main(lambda args: tokenize_data(**vars(args)), parser, argv)
