"""The ``dataset`` block of a finetuning loader: what may be in it, what goes together, and what it means.

Standard library only, so that ``llmfoundry validate`` can ask without importing torch; the loader asks the same functions. ``problems`` says everything that is wrong at once, ``normalise`` resolves
spellings (document 000's ``name``/``kwargs``) and defaults into one frozen record that the loader reads.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from typing import Any, Collection, Mapping

__all__ = ['HF_KEYS', 'LOADER_KEYS', 'FinetuningDataBlock', 'asks_for_packing', 'normalise', 'problems', 'unknown_keys']

HF_KEYS = ('hf_name', 'hf_kwargs', 'preprocessing_fn', 'safe_load', 'name', 'kwargs')
# Keys that neither source takes as they are: the loader's own.
LOADER_KEYS = (
    'max_seq_len', 'decoder_only_format', 'target_prompts', 'target_responses', 'shuffle', 'shuffle_seed', 'split', 'packing', 'packing_ratio', 'max_leftover_bins_to_keep', 'allow_pad_trimming',
    'pad_to_longest', 'auto_packing_replication', 'seq_parallel_replication', 'token_encoding_type', 'local', 'remote', 'streams',
)  # fmt: skip
# Arguments of StreamingDataset that the loader gives itself.
_FILLED_IN = ('tokenizer', 'batch_size', 'replication')
# Not passed on to StreamingDataset; `shuffle`, `split`, `local`, `remote` are.
_NOT_STREAMING = (*HF_KEYS, *(key for key in LOADER_KEYS if key not in ('shuffle', 'shuffle_seed', 'split', 'local', 'remote', 'token_encoding_type')), *_FILLED_IN)
_TOKEN_TYPES = ('int8', 'int16', 'int32', 'int64', 'uint8', 'uint16', 'uint32', 'uint64')
# Readers of Hugging Face datasets by the extension of data_files.
_READERS = {'.json': 'json', '.jsonl': 'json', '.csv': 'csv', '.parquet': 'parquet', '.arrow': 'arrow', '.txt': 'text'}
DEFAULT_MAX_SEQ_LEN = 2048

Problem = tuple[str, str]


@dataclass(frozen=True)
class FinetuningDataBlock:
    """A checked ``dataset`` block.

    Attributes:
        hf_name: name, folder or reader for Hugging Face datasets; None for a streaming dataset.
        hf_kwargs: arguments of ``load_dataset``.
        split: of either source.
        preprocessing_fn: registered name, ``module:function``, mapping of columns, or None.
        safe_load: only data files, no code.
        streams: streams by name, or None.
        streaming: arguments of StreamingDataset, ``local`` and ``remote`` among them; empty for Hugging Face sources.
        max_seq_len: tokens of a row.
        decoder_only_format: False for encoder-decoder models.
        target_prompts: which prompts are trained, lower case.
        target_responses: which responses are trained, lower case.
        shuffle: another order in each epoch.
        shuffle_seed: of the order.
        packing: None, ``'full'``, or examples per row.
        max_leftover_bins_to_keep: accepted; nothing is dropped whatever it is.
        allow_pad_trimming: cut padding that a batch shares.
        pad_to_longest: pad to the longest row of a batch.
    """

    hf_name: str | None
    hf_kwargs: Mapping[str, Any]
    split: str | None
    preprocessing_fn: Any
    safe_load: bool
    streams: Mapping[str, Any] | None
    streaming: Mapping[str, Any]
    max_seq_len: int
    decoder_only_format: bool
    target_prompts: str
    target_responses: str
    shuffle: bool
    shuffle_seed: int
    packing: float | str | None
    max_leftover_bins_to_keep: int | None
    allow_pad_trimming: bool
    pad_to_longest: bool

    @property
    def is_streaming(self) -> bool:
        """Whether samples come from MDS shards."""
        return self.hf_name is None


def asks_for_packing(dataset: Mapping[str, Any]) -> bool:
    """Whether several examples shall share a row."""
    ratio = dataset.get('packing_ratio')
    return dataset.get('packing') is True or ratio == 'auto' or (_is_number(ratio) and ratio != 1)


def problems(dataset: Mapping[str, Any], streaming_keys: Collection[str] = ()) -> list[Problem]:
    """Everything that is wrong with a block.

    Args:
        dataset: the block.
        streaming_keys: arguments of the installed StreamingDataset, which are keys too.

    Returns:
        ``(key, text)`` pairs; an empty key means the block as a whole.
    """
    found: list[Problem] = []
    for rule in (_source, _hf_source, _streaming_source, _lengths, _targets, _packing, _padding):
        found += rule(dataset)
    misspelt = unknown_keys(dataset, streaming_keys)[0]
    # One mistake, one line: a key that another one was meant to be is not missing too.
    meant = {key for _, text in misspelt for key in LOADER_KEYS + HF_KEYS if f'{key!r}' in text and key not in dataset}
    return [(key, text) for key, text in found if key not in meant] + misspelt


def unknown_keys(dataset: Mapping[str, Any], streaming_keys: Collection[str] = ()) -> tuple[list[Problem], list[str]]:
    """Keys that nobody knows: those that look like a known one are mistakes, the others are only worth a warning.

    Returns:
        ``(problems, others)``.
    """
    known = sorted({*HF_KEYS, *LOADER_KEYS, *streaming_keys} - {'tokenizer', 'batch_size'})
    mistakes, others = [], []
    for key in dataset:
        if key in known or key == 'replication':
            continue
        near = difflib.get_close_matches(str(key), known, 1, cutoff=0.75)
        if near:
            mistakes.append((str(key), f'unknown key (did you mean {near[0]!r}?)'))
        elif key in ('tokenizer', 'batch_size'):
            mistakes.append((str(key), 'is set by the trainer; delete the key'))
        else:
            others.append(str(key))
    return mistakes, others


def _given(dataset: Mapping[str, Any], *keys: str) -> list[str]:
    return [key for key in keys if dataset.get(key) not in (None, '')]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _and(keys: list[str]) -> str:
    return ', '.join(f'`{key}`' for key in keys)


def _source(dataset: Mapping[str, Any]) -> list[Problem]:
    places, hf = _given(dataset, 'local', 'remote'), _given(dataset, 'hf_name')
    streams, name = _given(dataset, 'streams'), _given(dataset, 'name')
    if not (places or hf or streams or name):
        return [('', 'needs a source: `hf_name` (Hugging Face, local files), `local` and `remote` (MDS shards) or `streams` (several of those), got none of them')]
    found: list[Problem] = []
    if hf and places:
        found.append(('hf_name', f'cannot be set together with {_and(places)}: the data come either from Hugging Face datasets or from MDS shards. Delete one of them'))
    if streams and places:
        found.append(('streams', f'cannot be set together with {_and(places)}; put {_and(places)} into each stream'))
    if streams and hf:
        found.append(('streams', 'cannot be set together with `hf_name`: the data come either from Hugging Face datasets or from MDS shards. Delete one of them'))
    if name and hf:
        found.append(('name', 'is the older spelling of `hf_name` and `preprocessing_fn` in one; with `hf_name`, use `preprocessing_fn`'))
    if dataset.get('kwargs') is not None and dataset.get('hf_kwargs') is not None:
        found.append(('kwargs', 'is the older spelling of `hf_kwargs`; give one of them'))
    return found


def _hf_source(dataset: Mapping[str, Any]) -> list[Problem]:
    found: list[Problem] = []
    for key in ('hf_kwargs', 'kwargs'):
        if dataset.get(key) is not None and not isinstance(dataset[key], Mapping):
            found.append((key, f'expected a mapping of arguments of load_dataset such as {{data_dir: ...}}, got {dataset[key]!r}'))
    fn = dataset.get('preprocessing_fn')
    if fn is not None and not isinstance(fn, (str, Mapping)) and not callable(fn):
        found.append(('preprocessing_fn', f'expected a registered name, module:function, or {{prompt: column, response: column}}, got {fn!r}'))
    if not _reads_hf(dataset):
        return found
    if not _given(dataset, 'split'):
        found.append(('split', 'is missing: the split of the Hugging Face dataset, for local files usually `train`'))
    if dataset.get('shuffle') is None:
        found.append(('shuffle', 'is missing: true (the usual choice for training) or false'))
    return found


def _reads_hf(dataset: Mapping[str, Any]) -> bool:
    return not _given(dataset, 'local', 'remote', 'streams') and bool(_given(dataset, 'hf_name', 'name'))


def _streaming_source(dataset: Mapping[str, Any]) -> list[Problem]:
    if not _given(dataset, 'local', 'remote', 'streams'):
        return []
    found: list[Problem] = []
    foreign = [] if _given(dataset, 'hf_name') else _given(dataset, 'hf_kwargs', 'kwargs', 'preprocessing_fn')
    for key in foreign + (['safe_load'] if dataset.get('safe_load') else []):
        found.append((key, f'belongs to Hugging Face sources and cannot be set together with {_and(_given(dataset, "local", "remote", "streams"))}. Preprocess when the shards are made, or delete the key'))
    if _given(dataset, 'remote') and not _given(dataset, 'local'):
        found.append(('remote', f'needs `local` too: the folder where the shards of {dataset["remote"]} are kept'))
    streams = dataset.get('streams')
    if streams is not None and (not isinstance(streams, Mapping) or not streams):
        found.append(('streams', f'expected a mapping of stream names to their settings, got {streams!r}'))
    if dataset.get('token_encoding_type') is not None and dataset['token_encoding_type'] not in _TOKEN_TYPES:
        found.append(('token_encoding_type', f'must be one of {", ".join(_TOKEN_TYPES)}, got {dataset["token_encoding_type"]!r}'))
    return found


def _lengths(dataset: Mapping[str, Any]) -> list[Problem]:
    value = dataset.get('max_seq_len', DEFAULT_MAX_SEQ_LEN)
    if not _is_number(value) or value != int(value) or value < 1:
        return [('max_seq_len', f'must be a whole number of tokens of at least 1, got {value!r}')]
    return []


def _targets(dataset: Mapping[str, Any]) -> list[Problem]:
    found: list[Problem] = []
    decoder_only = dataset.get('decoder_only_format')
    if not isinstance(decoder_only, bool):
        seen = f'got {decoder_only!r}' if 'decoder_only_format' in dataset else 'but is missing'
        found.append(('decoder_only_format', f'must be true (GPT-like models) or false (encoder-decoder models such as T5), {seen}'))
    prompts, responses = str(dataset.get('target_prompts') or 'none').lower(), str(dataset.get('target_responses') or 'last').lower()
    if not re.fullmatch(r'none|all|length>=0*[1-9][0-9]*', prompts):
        found.append(('target_prompts', f"must be 'none', 'all' or 'length>=N' with a positive whole number N, got {dataset['target_prompts']!r}"))
    if responses not in ('last', 'all'):
        found.append(('target_responses', f"must be 'last' or 'all', got {dataset['target_responses']!r}"))
    if decoder_only is False and (prompts, responses) != ('none', 'last'):
        found.append(('decoder_only_format', f"encoder-decoder models train the last response only: with false, target_prompts must be 'none' and target_responses 'last', got {prompts!r} and {responses!r}"))
    return found


def _packing(dataset: Mapping[str, Any]) -> list[Problem]:
    found: list[Problem] = []
    packing, ratio = dataset.get('packing'), dataset.get('packing_ratio')
    if packing is not None and not isinstance(packing, bool):
        found.append(('packing', f'must be true or false, got {packing!r}. A number of examples per row is `packing_ratio`'))
    if isinstance(ratio, str) and ratio != 'auto':
        found.append(('packing_ratio', f"must be a number of examples per row of at least 1, or 'auto', got {ratio!r}"))
    elif ratio is not None and ratio != 'auto' and not _is_number(ratio):
        found.append(('packing_ratio', f"must be a number of examples per row of at least 1, or 'auto', got {ratio!r}"))
    elif _is_number(ratio) and not 1 <= ratio < float('inf'):
        found.append(('packing_ratio', f'must be at least 1 (one example in each row, which is no packing), got {ratio}'))
    if packing is True and _is_number(ratio):
        found.append(('packing_ratio', 'cannot be set together with `packing: true`, which fills rows as far as possible. Delete one of them'))
    if packing is False and ratio not in (None, 1):
        found.append(('packing_ratio', f'is {ratio!r}, but `packing` is false. Delete one of them'))
    if asks_for_packing(dataset) and dataset.get('decoder_only_format') is False:
        found.append(('packing' if packing else 'packing_ratio', 'encoder-decoder models cannot be trained on packed rows. Delete the key'))
    leftovers = dataset.get('max_leftover_bins_to_keep')
    if leftovers is not None and (isinstance(leftovers, bool) or not isinstance(leftovers, int) or leftovers < 0):
        found.append(('max_leftover_bins_to_keep', f'must be a whole number of at least 0, got {leftovers!r}'))
    if leftovers is not None and not packing and ratio is None:
        found.append(('max_leftover_bins_to_keep', 'has a meaning only with `packing_ratio`. Delete the key, or set packing_ratio'))
    return found


def _padding(dataset: Mapping[str, Any]) -> list[Problem]:
    found: list[Problem] = []
    for key in ('allow_pad_trimming', 'pad_to_longest', 'shuffle', 'safe_load'):
        if dataset.get(key) is not None and not isinstance(dataset[key], bool):
            found.append((key, f'must be true or false, got {dataset[key]!r}'))
    for key in ('seq_parallel_replication', 'auto_packing_replication'):
        if dataset.get(key) not in (None, 1):
            found.append((key, f'sequence parallelism is not supported: must be 1, got {dataset[key]!r}. Leave it out'))
    return found


def _reader_of(kwargs: Mapping[str, Any]) -> str | None:
    """The Hugging Face reader of the files that ``data_files`` names, or None."""
    files: Any = kwargs.get('data_files')
    while isinstance(files, (Mapping, list, tuple)) and files:
        files = next(iter(files.values())) if isinstance(files, Mapping) else files[0]
    if not isinstance(files, str):
        return None
    stem, extension = os.path.splitext(files)
    return _READERS.get((os.path.splitext(stem)[1] if extension in ('.gz', '.zst', '.xz', '.bz2') else extension).lower())


def _hf_name(dataset: Mapping[str, Any], kwargs: Mapping[str, Any], is_registered: bool) -> str | None:
    """Document 000's ``name`` is the function and the data in one; where ``kwargs`` names files, or a registered task a folder, the files are the data."""
    if dataset.get('name') is None:
        return dataset.get('hf_name')
    reader = _reader_of(kwargs)
    return reader if reader is not None else 'json' if is_registered and kwargs.get('data_dir') else dataset['name']


def normalise(dataset: Mapping[str, Any], registered: Collection[str] = ()) -> FinetuningDataBlock:
    """The block as one record.

    Args:
        dataset: a block without problems.
        registered: names of registered preprocessing functions.
    """
    kwargs = dict(dataset.get('hf_kwargs') or dataset.get('kwargs') or {})
    streaming = bool(_given(dataset, 'local', 'remote', 'streams'))
    name = dataset.get('name')
    ratio = dataset.get('packing_ratio')
    packing: float | str | None = None
    if asks_for_packing(dataset):
        packing = 'full' if dataset.get('packing') or (ratio == 'auto' and not streaming) else ratio
    return FinetuningDataBlock(
        hf_name=None if streaming else _hf_name(dataset, kwargs, name in registered),
        hf_kwargs=kwargs,
        split=dataset.get('split'),
        preprocessing_fn=name if name is not None and (name in registered or streaming or ':' in name) else dataset.get('preprocessing_fn'),
        safe_load=bool(dataset.get('safe_load')),
        streams=dataset.get('streams'),
        streaming={key: value for key, value in dataset.items() if key not in _NOT_STREAMING} if streaming else {},
        max_seq_len=int(dataset.get('max_seq_len', DEFAULT_MAX_SEQ_LEN)),
        decoder_only_format=dataset['decoder_only_format'],
        target_prompts=str(dataset.get('target_prompts') or 'none').lower(),
        target_responses=str(dataset.get('target_responses') or 'last').lower(),
        shuffle=bool(dataset.get('shuffle')),
        shuffle_seed=int(dataset.get('shuffle_seed') or 0),
        packing=packing,
        max_leftover_bins_to_keep=dataset.get('max_leftover_bins_to_keep'),
        allow_pad_trimming=bool(dataset.get('allow_pad_trimming')),
        pad_to_longest=bool(dataset.get('pad_to_longest')),
    )
