"""A row with input, contexts and response -> text -> token ids and how many of them belong to the prompt.

The prompt is what ``Prompt.render`` gives without the response, which is what the model is given at generation. Both texts are tokenised, and
training begins where their ids part. Measuring the prompt by the length of its own ids is the alternative; it loses the first token of the answer
wherever a tokenizer joins a space of the prompt with the first word of the response.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Mapping, Sequence

from llmfoundry.command_utils.data_prep.dataprep.packing import TokenisedRow
from llmfoundry.data.finetuning.targets import ends_with_eos, line_break_ids
from llmfoundry.data.prompts import Prompt
from llmfoundry.errors import DataError

__all__ = ['Renderer', 'RowCounts']


@dataclass
class RowCounts:
    """What became of the rows."""

    rows: int = 0
    too_long: int = 0
    without_response: int = 0
    longest: int = 0

    def add(self, other: RowCounts) -> None:
        """Adds the counts of other rows."""
        self.rows += other.rows
        self.too_long += other.too_long
        self.without_response += other.without_response
        self.longest = max(self.longest, other.longest)

    @property
    def kept(self) -> int:
        """Rows that are packed."""
        return self.rows - self.too_long - self.without_response


@dataclass
class Renderer:
    """Renders and tokenises rows; can be sent to another process.

    Args:
        prompt: the wording and markers.
        tokenizer: of transformers.
        chunksize: rows with more tokens are dropped and counted.
        source: how errors call the source.
    """

    prompt: Prompt
    tokenizer: Any
    chunksize: int
    source: str = 'source_config'
    _bos: str = field(init=False, repr=False)
    _line_breaks: frozenset[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._bos = self.tokenizer.bos_token or ''
        self._line_breaks = line_break_ids(self.tokenizer)

    def __call__(self, columns: Mapping[str, Sequence[Any]], first_row: int) -> tuple[list[TokenisedRow], RowCounts]:
        """Rows ``first_row``, ``first_row + 1``, ... given as columns.

        Raises:
            DataError: a row that cannot be rendered, with its number.
        """
        counts = RowCounts(rows=len(columns['input']))
        prompts, texts = [], []
        for index in range(counts.rows):
            row = {name: values[index] for name, values in columns.items()}
            _check_row(row, self.source, first_row + index)
            if not (row['response'] or '').strip():
                counts.without_response += 1
                continue
            prompt, text = self._render(row, first_row + index)
            prompts.append(prompt)
            texts.append(text)
        rows = []
        for prompt_ids, ids, text in zip(self._encode(prompts), self._encode(texts), texts, strict=True):
            row_of_ids = self._finish(prompt_ids, ids, text)
            counts.longest = max(counts.longest, len(row_of_ids.input_ids))
            if len(row_of_ids.input_ids) > self.chunksize:
                counts.too_long += 1
            else:
                rows.append(row_of_ids)
        return rows, counts

    def _render(self, row: Mapping[str, Any], index: int) -> tuple[str, str]:
        contexts = row.get('contexts') or ()
        try:
            prompt = self.prompt.render(row['input'], None, contexts)
            text = self.prompt.render(row['input'], row['response'], contexts)
        except Exception as e:  # noqa: BLE001 - a prompt class of the user may raise anything; the row has to be named
            raise DataError(f'{type(self.prompt).__name__}.render failed: {type(e).__name__}: {e}', file=self.source, sample=index) from e
        if not text.startswith(prompt):
            raise DataError(
                f'{type(self.prompt).__name__}.render gives a text with the response, {text[:80]!r}, that does not begin with the one without it, '
                f'{prompt[:80]!r}: the model would be trained on a prompt that it never sees',
                file=self.source,
                sample=index,
            )
        return prompt, text

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text. The tokenizer adds what it always adds, except to a text in which the prompt format wrote the BOS already."""
        has_bos = [bool(self._bos) and text.startswith(self._bos) for text in texts]
        found: list[list[int]] = [[] for _ in texts]
        for flag in (False, True):
            where = [i for i, has in enumerate(has_bos) if has == flag]
            if where:
                batch = [texts[i] for i in where]
                encoded = self.tokenizer(batch, add_special_tokens=not flag, return_attention_mask=False, return_token_type_ids=False)['input_ids']
                for i, ids in zip(where, encoded, strict=True):
                    found[i] = list(ids)
        return found

    def _finish(self, prompt_ids: Sequence[int], ids: list[int], text: str) -> TokenisedRow:
        common = 0
        for a, b in zip(prompt_ids, ids, strict=False):
            if a != b:
                break
            common += 1
        eos = self.tokenizer.eos_token_id
        if eos is not None and (not ends_with_eos(ids, eos, self._line_breaks) or common == len(ids)):
            ids = [*ids, eos]
        return TokenisedRow(ids, common, text)


def _check_row(row: Mapping[str, Any], source: str, index: int) -> None:
    for name, optional in (('input', False), ('response', True)):
        value = row[name]
        if not isinstance(value, str) and not (optional and value is None):
            raise DataError(f'{name} must be text, got {type(value).__name__} {str(value)[:60]!r}', file=source, sample=index)
    contexts = row.get('contexts')
    if contexts is not None and (isinstance(contexts, str) or not all(isinstance(c, str) for c in contexts)):
        raise DataError(f'contexts must be a list of texts, got {type(contexts).__name__} {str(contexts)[:60]!r}', file=source, sample=index)
