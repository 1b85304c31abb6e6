"""From finetuning examples to a batch: one example for each row, or several packed documents.

Rows are joined and scattered into the batch in a handful of array operations over all of it, not example by example: about ten million tokens a second, so that the loader is never what training
waits for. Labels repeat the ids where a token is trained and are -100 elsewhere; they are not shifted, the model does that.
"""

from __future__ import annotations

import logging
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from llmfoundry.data.batch_stats import CROSS_ENTROPY_IGNORE_INDEX
from llmfoundry.data.finetuning.targets import ends_with_eos, line_break_ids, stitch_example, truncate, validate_target_settings
from llmfoundry.data.packing import best_fit_bins
from llmfoundry.data.sample_ids import SAMPLE_IDS, ids_per_row, with_sample_ids

__all__ = ['Document', 'PackedRow', 'PackingCollator', 'RowLayout', 'Seq2SeqFinetuningCollator', 'assemble', 'validate_target_settings', 'with_idle_rows']

log = logging.getLogger(__name__)

_TRIM_MULTIPLE = 8
_MODEL_KEYS = ('input_ids', 'labels', 'attention_mask', 'sequence_id', 'decoder_input_ids', 'decoder_attention_mask', 'total_tokens', 'loss_generating_tokens', SAMPLE_IDS)


class Document(NamedTuple):
    """One example: ``ids`` int32 ``(tokens,)``, and ``targets`` bool ``(tokens,)``, True where the token is trained."""

    ids: np.ndarray
    targets: np.ndarray


class PackedRow(NamedTuple):
    """The documents that share a row, and their numbers in the data set. Without documents it is a row that only keeps a rank busy: it counts no tokens and has no loss."""

    documents: tuple[Document, ...]
    sample_ids: tuple[int, ...] = ()


class RowLayout(NamedTuple):
    """Where tokens go in a row: ``width`` positions, filled up with ``pad_token_id`` on ``padding_side``."""

    width: int
    pad_token_id: int
    padding_side: str


def assemble(rows: Sequence[Sequence[Document]], layout: RowLayout) -> dict[str, Any]:
    """Lays documents out in a batch.

    The first token of a document has no target where something precedes it (another document, or padding on the left): the model would have to predict it from foreign tokens.

    Args:
        rows: the documents of each row; none for a row that only keeps a rank busy (one padding token, which counts as no token).
        layout: of each row; ``width`` must be at least the tokens of the longest row.

    Returns:
        ``input_ids``, ``labels``, ``attention_mask`` and ``sequence_id`` (number of the document in its row, -1 for padding), int64 ``(rows, width)``, and ``total_tokens`` and
        ``loss_generating_tokens``, lists of one int for each row.
    """
    # One real position, since attention over a row that is padding alone is not defined for every model.
    stand_in = Document(np.array([layout.pad_token_id], dtype=np.int32), np.zeros(1, dtype=bool))
    documents = [d for row in rows for d in (row or (stand_in,))]
    per_row = np.fromiter((len(row) or 1 for row in rows), dtype=np.int64, count=len(rows))
    lengths = np.fromiter((len(d.ids) for d in documents), dtype=np.int64, count=len(documents))
    first_of_row = np.cumsum(per_row) - per_row
    row_lengths = np.add.reduceat(lengths, first_of_row)

    ids = np.concatenate([d.ids for d in documents])
    targets = np.concatenate([d.targets for d in documents])
    starts = np.cumsum(lengths) - lengths
    follows = np.ones(len(documents), dtype=bool)
    follows[first_of_row] = (row_lengths < layout.width) & (layout.padding_side == 'left')
    targets[starts[follows & (lengths > 0)]] = False
    number = np.arange(len(documents)) - np.repeat(first_of_row, per_row)

    column = np.arange(layout.width)
    # (rows, width), filled row by row in the order of the joined arrays.
    mask = column < row_lengths[:, None] if layout.padding_side == 'right' else column >= layout.width - row_lengths[:, None]
    input_ids = np.full(mask.shape, layout.pad_token_id, dtype=np.int64)
    labels = np.full(mask.shape, CROSS_ENTROPY_IGNORE_INDEX, dtype=np.int64)
    sequence_id = np.full(mask.shape, -1, dtype=np.int64)
    input_ids[mask] = ids
    labels[mask] = np.where(targets, ids, CROSS_ENTROPY_IGNORE_INDEX)
    sequence_id[mask] = np.repeat(number, lengths)
    is_real = np.fromiter((len(row) > 0 for row in rows), dtype=bool, count=len(rows))
    return {
        'input_ids': torch.from_numpy(input_ids),
        'attention_mask': torch.from_numpy(mask.astype(np.int64)),
        'labels': torch.from_numpy(labels),
        'sequence_id': torch.from_numpy(sequence_id),
        'total_tokens': np.where(is_real, row_lengths, 0).tolist(),
        'loss_generating_tokens': (labels[:, 1:] != CROSS_ENTROPY_IGNORE_INDEX).sum(axis=1).tolist(),
    }


def with_idle_rows(batch: Mapping[str, Any], num_rows: int, pad_token_id: int) -> dict[str, Any]:
    """The batch of ``assemble`` with rows without documents after its own."""
    idle = assemble([()] * num_rows, RowLayout(batch['input_ids'].shape[1], pad_token_id, 'right'))
    added = {key: torch.cat([batch[key], value]) if isinstance(value, torch.Tensor) else [*batch[key], *value] for key, value in idle.items()}
    ids = {SAMPLE_IDS: [*batch[SAMPLE_IDS], *[[] for _ in range(num_rows)]]} if SAMPLE_IDS in batch else {}
    return {**batch, **added, **ids}


class Seq2SeqFinetuningCollator:
    """Makes batches of finetuning examples.

    An example is ``{'turns': [{'input_ids', 'labels'}, ...]}`` (ids of prompt and response), one such turn by itself, ``{'input_ids', 'labels'}`` with -100 in the labels (already one row), or a
    ``PackedRow``.

    Args:
        tokenizer: gives ``pad_token_id``, ``eos_token_id`` and ``padding_side``.
        max_seq_len: tokens of a row; longer examples are cut on the right, with one warning.
        decoder_only_format: False for encoder-decoder models, whose target is a sequence of its own.
        target_responses: ``last`` or ``all``: which responses are trained.
        target_prompts: ``none``, ``all`` or ``length>=N``: which prompts are trained.
        allow_pad_trimming: cut the padding that all rows of a batch share, down to a multiple of 8; not in the first batch, so that it shows the peak of memory.
        batch_metadata: added to each batch as it is.
        pad_to_longest: pad to the longest row of the batch only.
        allow_no_target: an example of which no token is trained (after truncation) has no loss, with one warning, instead of stopping the run.

    Raises:
        ValueError: no pad token, settings that make no sense, or metadata under a key of the model's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_seq_len: int,
        decoder_only_format: bool,
        target_responses: str = 'last',
        target_prompts: str = 'none',
        allow_pad_trimming: bool = False,
        batch_metadata: dict[str, Any] | None = None,
        pad_to_longest: bool = False,
        allow_no_target: bool = False,
    ) -> None:
        validate_target_settings(target_prompts, target_responses, decoder_only_format)
        if tokenizer.pad_token_id is None:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no pad token, which fills up rows. Set tokenizer.kwargs.pad_token, for example to {tokenizer.eos_token!r}")
        clashing = sorted(set(batch_metadata or {}) & set(_MODEL_KEYS))
        if clashing:
            raise ValueError(f'batch_metadata has keys that the model reads from the batch: {", ".join(clashing)}. Rename them')
        if max_seq_len % _TRIM_MULTIPLE:
            log.warning('max_seq_len is %d; tensor cores are fastest with a multiple of %d', max_seq_len, _TRIM_MULTIPLE)
        self.tokenizer = tokenizer
        self._line_breaks = line_break_ids(tokenizer)
        self.max_seq_len = int(max_seq_len)
        self.decoder_only_format = decoder_only_format
        self.target_responses = target_responses.lower()
        self.target_prompts = target_prompts.lower()
        self.allow_pad_trimming = allow_pad_trimming
        self.batch_metadata = dict(batch_metadata or {})
        self.pad_to_longest = pad_to_longest
        self.allow_no_target = allow_no_target
        self._seen_first_batch = False
        self._warned: set[str] = set()

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """The batch of ``examples``: see ``assemble``; for encoder-decoder models ``decoder_input_ids`` and ``decoder_attention_mask`` instead of ``sequence_id``.

        Raises:
            ValueError: an example without ids, or of which no token is trained.
        """
        if self.decoder_only_format:
            return with_sample_ids(self.batch_of_rows([e.documents if isinstance(e, PackedRow) else (self.document(e),) for e in examples]), ids_per_row(examples))
        documents = [e.documents[0] if isinstance(e, PackedRow) and e.documents else None if isinstance(e, PackedRow) else self._stitched(e) for e in examples]
        batch = self._encoder_decoder_batch(documents)
        batch.update(self.batch_metadata)
        return with_sample_ids(batch, ids_per_row(examples))

    def batch_of_rows(self, rows: Sequence[Sequence[Document]]) -> dict[str, Any]:
        """The batch in which each row holds the given documents."""
        longest = max(sum(len(d.ids) for d in row) for row in rows)
        batch = assemble(rows, self._layout(longest, self.tokenizer.padding_side))
        self._seen_first_batch = True
        batch.update(self.batch_metadata)
        return batch

    def document(self, example: Mapping[str, Any]) -> Document:
        """The row of one example, cut to ``max_seq_len``."""
        whole = self._stitched(example)
        ids, targets = truncate(whole.ids, whole.targets, self.max_seq_len)
        if len(ids) < len(whole.ids):
            self._warn_once('truncated', f'An example has {len(whole.ids)} tokens and is cut to max_seq_len {self.max_seq_len}; so will be others, without another warning')
        if not targets.any():
            problem = f'of an example with {len(whole.ids)} tokens no token is trained'
            if len(whole.ids) > len(ids):
                problem += f' after it is cut to max_seq_len {self.max_seq_len}'
            if not self.allow_no_target:
                raise ValueError(f'{problem}. Raise max_seq_len, or leave such examples out')
            self._warn_once('no target', f'{problem[0].upper()}{problem[1:]}: it is read and has no loss; so will be others, without another warning')
        return Document(ids, targets)

    def _stitched(self, example: Mapping[str, Any]) -> Document:
        if not isinstance(example, Mapping) or not ('turns' in example or ('input_ids' in example and 'labels' in example)):
            keys = f'the keys {sorted(map(str, example))}' if isinstance(example, Mapping) else type(example).__name__
            raise ValueError(f'an example must have `turns`, or `input_ids` and `labels`, got {keys}')
        turns = example['turns'] if 'turns' in example else [example]
        eos = self.tokenizer.eos_token_id if self.decoder_only_format else None
        return Document(*stitch_example(turns, self.target_prompts, self.target_responses, eos, self._line_breaks))

    def _layout(self, longest: int, padding_side: str) -> RowLayout:
        width = self.max_seq_len
        if self.pad_to_longest:
            width = min(width, longest)
        if self.allow_pad_trimming and self._seen_first_batch:
            width = min(width, -(-longest // _TRIM_MULTIPLE) * _TRIM_MULTIPLE)
        return RowLayout(max(1, width), self.tokenizer.pad_token_id, padding_side)

    def _encoder_decoder_batch(self, documents: Sequence[Document | None]) -> dict[str, Any]:
        """Context and target of each document, each cut to ``max_seq_len`` with its end token put back. None is a row that only keeps a rank busy."""
        nothing = np.zeros(0, dtype=np.int32)
        contexts = [self._cut(d.ids[~d.targets], 'context') if d is not None else nothing for d in documents]
        targets = [self._cut(self._with_eos(d.ids[d.targets]), 'target') if d is not None else nothing for d in documents]
        encoder = _padded(contexts, self._layout(max(map(len, contexts)), self.tokenizer.padding_side))
        decoder = _padded(targets, self._layout(max(map(len, targets)), 'right'))
        self._seen_first_batch = True
        labels = decoder['ids'].masked_fill(decoder['mask'] == 0, CROSS_ENTROPY_IGNORE_INDEX)
        start = torch.full((len(documents), 1), self.tokenizer.pad_token_id, dtype=torch.int64)
        totals = encoder['mask'].sum(-1) + decoder['mask'].sum(-1)
        for row, document in enumerate(documents):
            if document is None:
                encoder['mask'][row, 0] = decoder['mask'][row, 0] = 1
        return {
            'input_ids': encoder['ids'],
            'attention_mask': encoder['mask'],
            'labels': labels,
            'decoder_input_ids': torch.cat([start, decoder['ids'][:, :-1]], dim=1),
            'decoder_attention_mask': decoder['mask'],
            'total_tokens': totals.tolist(),
            'loss_generating_tokens': (labels != CROSS_ENTROPY_IGNORE_INDEX).sum(-1).tolist(),
        }

    def _with_eos(self, ids: np.ndarray) -> np.ndarray:
        eos = self.tokenizer.eos_token_id
        return ids if eos is None or ends_with_eos(ids, eos, self._line_breaks) else np.append(ids, np.int32(eos))

    def _cut(self, ids: np.ndarray, part: str) -> np.ndarray:
        if len(ids) <= self.max_seq_len:
            return ids
        self._warn_once(part, f'The {part} of an example has {len(ids)} tokens and is cut to max_seq_len {self.max_seq_len}; so will be others, without another warning')
        last = ids[-1:] if ids[-1] == self.tokenizer.eos_token_id else ids[self.max_seq_len - 1 : self.max_seq_len]
        return np.concatenate([ids[: self.max_seq_len - 1], last])

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning(message)


def _padded(sequences: Sequence[np.ndarray], layout: RowLayout) -> dict[str, torch.Tensor]:
    """``ids`` and ``mask``, int64 ``(rows, width)``."""
    lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))[:, None]
    column = np.arange(layout.width)
    mask = column < lengths if layout.padding_side == 'right' else column >= layout.width - lengths
    ids = np.full(mask.shape, layout.pad_token_id, dtype=np.int64)
    ids[mask] = np.concatenate(sequences)
    return {'ids': torch.from_numpy(ids), 'mask': torch.from_numpy(mask.astype(np.int64))}


class PackingCollator:
    """Packs the examples of each batch into as few rows as best fit needs, however many that is; nothing is dropped or carried over, so a batch depends on its own examples alone.

    Args:
        collator: reads examples and lays rows out.
    """

    def __init__(self, collator: Seq2SeqFinetuningCollator) -> None:
        self.collator = collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        documents = [d for e in examples for d in (e.documents if isinstance(e, PackedRow) else (self.collator.document(e),))]
        rows = ids_per_row(examples)
        if not documents:
            return with_sample_ids(self.collator.batch_of_rows([()]), None if rows is None else [[]])
        bins = best_fit_bins([len(d.ids) for d in documents], self.collator.max_seq_len)
        # One number for each document: a streamed example is one of each.
        numbers = None if rows is None else [number for row in rows for number in row]
        batch = self.collator.batch_of_rows([[documents[i] for i in bin_] for bin_ in bins])
        return with_sample_ids(batch, None if numbers is None else [[numbers[i] for i in bin_] for bin_ in bins])
