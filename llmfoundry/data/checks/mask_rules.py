"""Rules about one row: what is trained, what is not, and where documents and turns end.

Each rule is a function from (row, facts about the tokenizer, settings) to findings, over arrays alone, so that it can be tested on rows written by hand. They do not share code with the pipeline
that makes the masks: a mistake there must not be repeated here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Iterator

import numpy as np

from llmfoundry.data.checks.findings import ERROR, WARNING, Finding
from llmfoundry.data.checks.rows import FINETUNING, MASKED_TEXT, TEXT, LintRow, Turn, spans
from llmfoundry.data.checks.tokenizer_facts import TokenizerFacts

__all__ = ['MaskSettings', 'check_row', 'expected_targets', 'trained_turns']

STOP_REMEDY = (
    'The model would not learn to stop. Let the chat template end each assistant message with its end-of-turn token inside the message (before the next header), or set tokenizer.kwargs.eos_token to '
    'the token that it uses.'
)
# So many equal pad or eos tokens at the end of a document are padding. Text of empty documents has some in a row by nature.
_FILLER_RUN = {FINETUNING: 3, TEXT: 16, MASKED_TEXT: 16}


@dataclass(frozen=True)
class MaskSettings:
    """What the loader was asked to do.

    Args:
        target_prompts: ``none``, ``all`` or ``length>=N``.
        target_responses: ``last`` or ``all``.
        max_seq_len: tokens per row; a document that fills it may have lost its end. None if unknown.
        packed: rows hold several documents.
        vocab_size: rows of the model's embedding; None if unknown.
    """

    target_prompts: str = 'none'
    target_responses: str = 'last'
    max_seq_len: int | None = None
    packed: bool = False
    vocab_size: int | None = None


def check_row(row: LintRow, facts: TokenizerFacts, settings: MaskSettings) -> list[Finding]:
    """Every rule on one row."""
    for fundamental in (_lengths_agree, _in_vocabulary):
        # The other rules could not even show the place.
        found = list(fundamental(row, facts, settings))
        if found:
            return found
    rules = [_sequence_ids, _padding, _double_bos, _no_target]
    if row.kind == FINETUNING:
        rules += [_first_tokens, _expected_mask, _ends, _repeated_end]
    elif row.kind == TEXT:
        rules += [_text_end_is_trained]
    return [finding for rule in rules for finding in rule(row, facts, settings)]


def _finding(row: LintRow, facts: TokenizerFacts, rule: str, severity: str, position: int, seen: str, remedy: str) -> Finding:
    return Finding(rule, severity, seen, remedy, row=row.name, snippet=facts.snippet(row.ids, row.targets, position), position=position)


def _lengths_agree(row: LintRow, facts: TokenizerFacts, settings: MaskSettings) -> Iterator[Finding]:
    if len(row.ids) != len(row.targets):
        seen = f'{len(row.ids)} tokens but {len(row.targets)} labels'
        yield Finding('lengths', ERROR, seen, 'Make both lists equally long: one label per token, -100 where nothing is trained.', row=row.name)


def _in_vocabulary(row: LintRow, facts: TokenizerFacts, settings: MaskSettings) -> Iterator[Finding]:
    limit = min(facts.num_ids, settings.vocab_size or facts.num_ids)
    wrong = np.flatnonzero((row.ids < 0) | (row.ids >= limit))
    if len(wrong):
        at = int(wrong[0])
        whose = 'tokenizer' if limit == facts.num_ids else 'embedding of the model'
        # No snippet: an id outside the vocabulary cannot be decoded.
        yield Finding(
            'token-outside-vocabulary', ERROR, f'token {at} has the id {int(row.ids[at])}, but the {whose} has {limit} ids', 'Use the tokenizer that the data were prepared with.', row=row.name, position=at,
        )


def _sequence_ids(row: LintRow, facts: TokenizerFacts, settings: MaskSettings) -> Iterator[Finding]:
    """Documents of a packed row are numbered 0, 1, 2, ... in order, and padding (and only padding) is -1."""
    if row.sequence_id is None:
        if settings.packed:
            yield Finding(
                'sequence-ids', ERROR, 'the rows are packed, but the batch has no sequence_id', 'Without it documents of one row attend to each other: use a collator that writes sequence_id.', row=row.name,
            )
        return
    numbers = row.sequence_id
    real = numbers >= 0
    kept = numbers[real]
    steps = np.diff(kept)
    wrong = None
    if row.real is not None and not np.array_equal(real, row.real):
        wrong = (int(np.flatnonzero(real != row.real)[0]), 'attention_mask and sequence_id disagree about what is padding')
    elif len(kept) and row.kind == FINETUNING and kept[0] != 0:
        wrong = (int(np.flatnonzero(real)[0]), f'the first document has the number {int(kept[0])}, not 0')
    elif ((steps < 0) | (steps > 1)).any():
        index = int(np.flatnonzero((steps < 0) | (steps > 1))[0])
        wrong = (int(np.flatnonzero(real)[index + 1]), f'document {int(kept[index])} is followed by document {int(kept[index + 1])}')
    elif len(spans(real)) > 1:
        wrong = (spans(real)[0][1], 'padding stands between documents')
    if wrong is not None:
        position, seen = wrong
        yield _finding(row, facts, 'sequence-ids', ERROR, position, f'{seen} (token {position})', 'Documents of a row are numbered 0, 1, 2, ... and padding is -1; correct the collator.')


def _padding(row: LintRow, facts: TokenizerFacts, settings: MaskSettings) -> Iterator[Finding]:
    """Padding is no target, neither what the masks call padding nor a run of pad tokens at the end."""
    trained = np.flatnonzero(row.targets & ~row.is_real())
    remedy = 'Set the label of padding to -100. Where pad and eos are one token, mask by attention_mask and not by comparing ids, which would also mask the end of each answer.'
    if len(trained):
        at = int(trained[0])
        yield _finding(row, facts, 'trained-padding', ERROR, at, f'{len(trained)} tokens of padding are trained, first token {at}', remedy)
        return
    fillers = {i for i in (facts.pad_id, facts.eos_id) if i is not None}
    for start, stop in row.documents():
        last = int(row.ids[stop - 1])
        run = _trailing_run(row.ids[start:stop])
        count = int(row.targets[stop - run : stop].sum())
        if last in fillers and min(run, count) >= _FILLER_RUN[row.kind]:
            # Text may hold empty documents one after the other; an answer never ends like that.
            severity = ERROR if row.kind == FINETUNING else WARNING
            yield _finding(row, facts, 'trained-padding', severity, stop - 1, f'{count} times {facts.name(last)} at the end of the document are trained; it looks like padding', remedy)
            return


def _trailing_run(ids: np.ndarray) -> int:
    """How often the last id stands at the end."""
    different = np.flatnonzero(ids != ids[-1])
    return len(ids) - (int(different[-1]) + 1 if len(different) else 0)


def _double_bos(row: LintRow, facts: TokenizerFacts, settings: MaskSettings) -> Iterator[Finding]:
    if facts.bos_id is None:
        return
    for start, stop in row.documents():
        ids = row.ids[start:stop]
        pairs = np.flatnonzero((ids[:-1] == facts.bos_id) & (ids[1:] == facts.bos_id))
        if facts.bos_id == facts.eos_id:
            # Two separators in a row are an empty document of a text, or padding; only the start of a finetuning document tells.
            pairs = pairs[(pairs == 0) & (row.kind == FINETUNING)]
        if len(pairs):
            at = start + int(pairs[0])
            yield _finding(
                row, facts, 'double-bos', ERROR, at + 1, f'{facts.name(facts.bos_id)} stands twice in a row at tokens {at} and {at + 1}',
                'The chat template or the prompt text writes it and the tokenizer adds it again. Leave it out of the text, or set tokenizer.kwargs.add_bos_token: false.',
            )
            return


def _no_target(row: LintRow, facts: TokenizerFacts, settings: MaskSettings) -> Iterator[Finding]:
    """The label of the first token of a row is never used, so it does not count as a target."""
    for start, stop in row.documents():
        if row.kind != FINETUNING and stop - start == 1:
            continue  # where text is cut into rows, a document's last token may be alone in one
        if not row.targets[start + (1 if row.decoder_only else 0) : stop].any():
            cut = settings.max_seq_len is not None and stop - start >= settings.max_seq_len
            seen = f'no token of the {stop - start} is trained' + (f': the prompt fills max_seq_len {settings.max_seq_len}' if cut else '')
            remedy = 'Set max_seq_len higher, or shorten or leave out such rows.' if cut else 'Check which columns are prompt and response, and target_prompts / target_responses: the labels are all -100.'
            # A prompt that is too long wastes one row; labels that are all -100 are a mistake that other rows share.
            yield _finding(row, facts, 'no-target', WARNING if cut else ERROR, stop - 1, seen, remedy)
            return


def _first_tokens(row: LintRow, facts: TokenizerFacts, settings: MaskSettings) -> Iterator[Finding]:
    """In a packed row the first token of a document would be predicted from the document before it."""
    if row.sequence_id is None:
        return
    for start, _ in row.documents():
        if start and row.targets[start] and row.sequence_id[start - 1] >= 0:
            yield _finding(
                row, facts, 'first-token-trained', ERROR, start, f'the first token of document {int(row.sequence_id[start])} (token {start}) is trained: it is predicted from the document before it',
                'Set the label of the first token of each packed document to -100.',
            )
            return


def expected_targets(turns: Iterable[Turn], settings: MaskSettings, length: int) -> np.ndarray:
    """bool ``(length,)``: what ``target_prompts`` and ``target_responses`` ask to train, from the spans of the turns alone."""
    expected = np.zeros(length, bool)
    turns = list(turns)
    prompts = settings.target_prompts.lower()
    for index, turn in enumerate(turns):
        size = turn.middle - turn.start
        expected[turn.start : turn.middle] = prompts == 'all' or (prompts.startswith('length>=') and size >= int(prompts[len('length>=') :]))
        expected[turn.middle : turn.stop] = settings.target_responses.lower() == 'all' or index == len(turns) - 1
    return expected


def _expected_mask(row: LintRow, facts: TokenizerFacts, settings: MaskSettings) -> Iterator[Finding]:
    if not row.turns:
        return
    expected = expected_targets(row.turns, settings, len(row.ids))
    in_prompt = np.zeros(len(row.ids), bool)
    for turn in row.turns:
        in_prompt[turn.start : turn.middle] = True
    asked = f'target_prompts {settings.target_prompts!r} and target_responses {settings.target_responses!r}'
    cases = (
        ('prompt-trained', row.targets & ~expected & in_prompt, 'of prompts are trained'),
        ('history-trained', row.targets & ~expected & ~in_prompt, 'of earlier answers are trained'),
        ('response-not-trained', ~row.targets & expected & ~in_prompt, 'of answers are not trained'),
        ('prompt-not-trained', ~row.targets & expected & in_prompt, 'of prompts are not trained'),
    )
    for rule, wrong, what in cases:
        # Nothing predicts the first token of a row.
        places = np.flatnonzero(wrong[1:]) + 1
        if len(places):
            yield _finding(
                row, facts, rule, ERROR, int(places[0]), f'{len(places)} tokens {what}, first token {int(places[0])}, though {asked} say otherwise',
                'Set the labels as target_prompts and target_responses ask, or change these settings to what the labels do.',
            )


def trained_turns(row: LintRow, settings: MaskSettings) -> list[tuple[int, int, int]]:
    """(start, stop, end of its document) of each answer that is trained.

    Without spans of turns, answers are the runs of targets; where prompts are trained too, only the last run of a document ends with an answer.
    """
    found = []
    if row.turns:
        return [(t.middle, t.stop, len(row.ids)) for t in row.turns if row.targets[t.middle : t.stop].any()]
    for start, stop in row.documents():
        runs = [(start + a, start + b, stop) for a, b in spans(row.targets[start:stop])]
        found += runs if settings.target_prompts.lower() == 'none' else runs[-1:]
    return found


def _ends(row: LintRow, facts: TokenizerFacts, settings: MaskSettings) -> Iterator[Finding]:
    """Each trained answer ends in a token that ends turns, and that token is trained."""
    starts = {stop: start for start, stop in row.documents()}
    for start, stop, document_end in trained_turns(row, settings):
        full = settings.max_seq_len is not None and document_end - starts.get(document_end, 0) >= settings.max_seq_len
        if stop == document_end and (row.truncated or full):
            continue
        trained = np.flatnonzero(row.targets[start:stop]) + start
        last = int(trained[-1])
        while last > start and not facts.decode([int(row.ids[last])]).strip():
            last -= 1
        if int(row.ids[last]) in facts.stop_ids and row.targets[last]:
            continue
        if _ends_in_text(row, facts, start, last):
            continue
        after = _next_word(row, facts, last + 1, document_end)
        if after is not None and int(row.ids[after]) in facts.stop_ids:
            yield _finding(
                row, facts, 'terminator-not-trained', ERROR, after, f'the answer at tokens {start} to {stop - 1} is followed by {facts.name(int(row.ids[after]))}, which is not trained', STOP_REMEDY,
            )
            return
        ends = ', '.join(facts.name(i) for i in sorted(facts.stop_ids)) or 'none: the tokenizer has no eos_token'
        yield _finding(
            row, facts, 'unterminated-turn', ERROR, last, f'the answer at tokens {start} to {stop - 1} ends in {facts.name(int(row.ids[last]))}; tokens that end a turn: {ends}', STOP_REMEDY,
        )
        return


def _ends_in_text(row: LintRow, facts: TokenizerFacts, start: int, last: int) -> bool:
    """Whether the answer ends in a terminator that is several plain tokens, such as ``### End`` (reported once for the template)."""
    if not facts.terminator:
        return False
    return facts.decode([int(i) for i in row.ids[start : last + 1]]).rstrip().endswith(facts.terminator)


def _next_word(row: LintRow, facts: TokenizerFacts, at: int, stop: int) -> int | None:
    """The next token that is more than white space."""
    while at < stop:
        if facts.decode([int(row.ids[at])]).strip():
            return at
        at += 1
    return None


def _repeated_end(row: LintRow, facts: TokenizerFacts, settings: MaskSettings) -> Iterator[Finding]:
    for start, stop in row.documents():
        trained = row.targets[max(start, stop - 2) : stop]
        if _trailing_run(row.ids[start:stop]) == 2 and int(row.ids[stop - 1]) in facts.stop_ids and trained.all():
            yield _finding(
                row, facts, 'double-end', WARNING, stop - 1, f'{facts.name(int(row.ids[stop - 1]))} stands twice at the end and both are trained',
                'Leave the end token out of the response text: it is added where it is missing.',
            )
            return


def _text_end_is_trained(row: LintRow, facts: TokenizerFacts, settings: MaskSettings) -> Iterator[Finding]:
    """Text is trained everywhere; an end of document left out is the sign of a collator that masks by the pad id where pad is eos."""
    if facts.eos_id is None or not row.targets[1:].any():
        return
    ends = np.flatnonzero((row.ids[1:] == facts.eos_id) & row.is_real()[1:]) + 1
    masked = ends[~row.targets[ends]]
    if len(masked) and len(masked) == len(ends):
        yield _finding(
            row, facts, 'terminator-not-trained', ERROR, int(masked[0]), f'none of the {len(ends)} {facts.name(facts.eos_id)} is trained, first token {int(masked[0])}',
            'The collator takes it for padding, since pad and eos are one token: mask by attention_mask.',
        )
