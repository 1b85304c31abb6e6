"""Each rule about a row fires on a row written by hand that breaks it, and on no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmfoundry.data.checks.findings import ERROR, WARNING
from llmfoundry.data.checks.mask_rules import MaskSettings, check_row, expected_targets, trained_turns
from llmfoundry.data.checks.rows import TEXT, LintRow, Turn, spans, turns_of
from llmfoundry.data.checks.tokenizer_facts import TokenizerFacts

# Letters are words, B begins a text, E ends it, T ends a turn, P pads; a new line and a space are white space.
ALPHABET = 'BETP abcdefghij\n'
B, E, T, P = 0, 1, 2, 3


def facts(**changes: Any) -> TokenizerFacts:
    base = TokenizerFacts(
        bos_id=B, eos_id=E, pad_id=P, stop_ids=frozenset({E, T}), terminator=None, num_ids=len(ALPHABET), decode=lambda ids: ''.join(ALPHABET[i] for i in ids),
    )
    return replace(base, **changes)


def row(text: str, trained: str, **kwargs: Any) -> LintRow:
    """``trained`` has an x under each token that is trained."""
    assert len(text) == len(trained)
    return LintRow(name='5', ids=np.array([ALPHABET.index(c) for c in text], np.int32), targets=np.array([c == 'x' for c in trained]), **kwargs)


def packed(text: str, trained: str, documents: str) -> LintRow:
    """``documents`` has the number of each token's document, or - for padding."""
    numbers = np.array([-1 if c == '-' else int(c) for c in documents])
    return row(text, trained, sequence_id=numbers, real=numbers >= 0)


def rules(r: LintRow, settings: MaskSettings | None = None, **changes: Any) -> list[str]:
    return [f.rule for f in check_row(r, facts(**changes), settings or MaskSettings())]


ALL = MaskSettings(target_responses='all')
TWO = (Turn(0, 4, 7), Turn(7, 10, 13))


@pytest.mark.parametrize(
    ('r', 'settings'),
    [
        (row('Babc deT', '.....xxx'), MaskSettings()),
        (row('Babc deE', '.....xxx'), MaskSettings()),
        (row('abc deT\nE', '....xxxxx'), MaskSettings()),
        (row('BabcdeTfghijE', '....xxx...xxx', turns=TWO), ALL),
        (row('BabcdeTfghijE', '..........xxx', turns=TWO), MaskSettings()),
        (row('BabcdeTfghijE', 'xxxx......xxx', turns=TWO), MaskSettings(target_prompts='length>=4')),
        (row('BabcdeTfghijE', 'xxxxxxxxxxxxx', turns=TWO), MaskSettings(target_prompts='ALL', target_responses='ALL')),
        # The label of the first token of a row counts neither way.
        (row('BabcdeTfghijE', '.xxxxxxxxxxxx', turns=TWO), MaskSettings('all', 'all')),
        (packed('BabTcdT', 'xxxx.xx', '0000111'), MaskSettings('all', 'all', packed=True)),
        (packed('BabcTBdeTPP', '...xx..xx..', '000001111--'), replace(ALL, packed=True)),
        (row('Babcdef', '...xxxx'), MaskSettings(max_seq_len=7)),
        (row('Babcdef', '...xxxx', truncated=True), MaskSettings()),
        (row('abc T E cd', 'xxxxxxxxxx', kind=TEXT), MaskSettings()),
        (row('abcEEcd', 'xxxxxxx', kind=TEXT), MaskSettings()),
    ],
)
def test_good_rows_have_no_findings(r: LintRow, settings: MaskSettings) -> None:
    assert rules(r, settings) == []


@pytest.mark.parametrize(
    ('rule', 'r', 'settings'),
    [
        ('unterminated-turn', row('Babc def', '.....xxx'), MaskSettings()),
        ('unterminated-turn', row('BabcdefghijjE', '....xxx...xxx', turns=TWO), ALL),
        # The end token stands at the start of the next header, where it is never trained.
        ('terminator-not-trained', row('BabcdefTgijE', '....xxx...xx'), ALL),
        ('terminator-not-trained', row('Babc de\nT', '.....xxx.'), MaskSettings()),
        # pad is eos, and a collator that compares ids took the end of each text for padding.
        ('terminator-not-trained', row('abcEdefEg', 'xxx.xxx.x', kind=TEXT), MaskSettings()),
        ('trained-padding', row('BabcTPPPP', '...xxxxxx', real=np.arange(9) < 5), MaskSettings()),
        ('trained-padding', packed('BabcTPP', '...xx.x', '00000--'), MaskSettings(packed=True)),
        ('trained-padding', row('BabcEEEEE', '...xxxxxx'), MaskSettings()),
        ('double-bos', row('BBabcT', '....xx'), MaskSettings()),
        ('double-bos', packed('BabTBBcdT', '..xx...xx', '000011111'), MaskSettings(packed=True)),
        ('no-target', row('BabcdeT', '.......'), MaskSettings()),
        ('no-target', packed('BabTcdT', '..xx...', '0000111'), MaskSettings(packed=True)),
        # The label of the very first token is never used.
        ('no-target', row('ab', 'x.'), MaskSettings()),
        ('first-token-trained', packed('BabTcdT', '..xxxxx', '0000111'), MaskSettings(packed=True)),
        ('prompt-trained', row('BabcdeTfghijE', '...xxxx...xxx', turns=TWO), ALL),
        # Only the end of an earlier answer leaks into the loss.
        ('history-trained', row('BabcdeTfghijE', '......x...xxx', turns=TWO), MaskSettings()),
        ('response-not-trained', row('BabcdeTfghijE', '....x.x...xxx', turns=TWO), ALL),
        ('prompt-not-trained', row('BabcdeTfghijE', '....xxx...xxx', turns=TWO), MaskSettings('all', 'all')),
        ('sequence-ids', packed('BabTcdT', '..xx.xx', '0000222'), MaskSettings(packed=True)),
        ('sequence-ids', packed('BabTcdT', '..xx.xx', '1111000'), MaskSettings(packed=True)),
        ('sequence-ids', packed('BabTcdT', '..xx.xx', '1111222'), MaskSettings(packed=True)),
        ('sequence-ids', packed('BabTPcdT', '..xx..xx', '0000-111'), MaskSettings(packed=True)),
        ('sequence-ids', row('BabTcdT', '..xx.xx', sequence_id=np.array([0, 0, 0, 0, 1, 1, -1]), real=np.ones(7, bool)), MaskSettings(packed=True)),
        ('sequence-ids', row('BabT', '..xx'), MaskSettings(packed=True)),
        ('token-outside-vocabulary', row('BabT', '..xx'), MaskSettings(vocab_size=6)),
    ],
)
def test_each_rule_fires(rule: str, r: LintRow, settings: MaskSettings) -> None:
    found = check_row(r, facts(), settings)
    assert rule in [f.rule for f in found]
    assert all(f.severity == ERROR and f.row == '5' and f.seen and f.remedy for f in found)


def test_the_rules_do_not_fire_together() -> None:
    """Of the broken rows that break one thing, one rule speaks: five complaints about one mistake hide the second mistake."""
    assert rules(row('Babc def', '.....xxx')) == ['unterminated-turn']
    assert rules(row('BBabcT', '....xx')) == ['double-bos']
    assert rules(row('BabcTPPPP', '...xxxxxx', real=np.arange(9) < 5)) == ['trained-padding']
    assert rules(packed('BabTcdT', '..xxxxx', '0000111'), MaskSettings(packed=True)) == ['first-token-trained']
    assert rules(row('BabcdeTfghijE', '......x...xxx', turns=TWO)) == ['history-trained']


def test_end_written_twice_is_a_warning() -> None:
    found = check_row(row('BabcEE', '...xxx'), facts(), MaskSettings())
    assert [(f.rule, f.severity) for f in found] == [('double-end', WARNING)]


def test_an_end_of_plain_words_counts() -> None:
    assert rules(row('Bab cde', '....xxx'), terminator='de') == []
    assert rules(row('Bab cdf', '....xxx'), terminator='de') == ['unterminated-turn']


def test_one_token_for_bos_and_eos() -> None:
    """Two in a row are an empty document in a text, and a mistake at the start of a finetuning row."""
    same = {'bos_id': E}
    assert rules(row('EEabT', '...xx'), **same) == ['double-bos']
    assert rules(row('EabEEcd', 'xxxxxxx', kind=TEXT), **same) == []
    assert rules(row('EabT', '..xx'), **same) == []


def test_the_place_is_shown_with_trained_tokens_in_brackets() -> None:
    found = check_row(row('Babc\ndef', '.....xxx'), facts(), MaskSettings())[0]
    assert (found.position, found.snippet) == (7, 'Babc\\n[[def]]')
    assert "ends in 'f' (id 10)" in found.seen


def test_labels_of_another_length() -> None:
    r = LintRow(name='5', ids=np.arange(4), targets=np.ones(3, bool))
    assert rules(r) == ['lengths']


def test_an_id_that_cannot_be_decoded_is_the_only_finding() -> None:
    found = check_row(row('BabT', '..xx', sequence_id=np.array([0, 0, 5, 5])), facts(num_ids=6), MaskSettings())
    assert [f.rule for f in found] == ['token-outside-vocabulary']


def test_expected_targets_by_hand() -> None:
    def mask(*settings: str) -> str:
        return ''.join('x' if t else '.' for t in expected_targets(TWO, MaskSettings(*settings), 13))

    assert mask('none', 'last') == '..........xxx'
    assert mask('none', 'all') == '....xxx...xxx'
    assert mask('all', 'last') == 'xxxx...xxxxxx'
    assert mask('length>=4', 'all') == 'xxxxxxx...xxx'


def test_trained_turns_without_spans() -> None:
    r = packed('BabTcdTefTP', '..xx.xx.xx.', '0000111222-')
    assert trained_turns(r, MaskSettings()) == [(2, 4, 4), (5, 7, 7), (8, 10, 10)]
    prompts_too = row('BabTcdTeT', 'xxxx.xx.x')
    assert trained_turns(prompts_too, MaskSettings(target_prompts='all')) == [(8, 9, 9)]


def test_spans_and_turns() -> None:
    assert spans(np.array([True, False, True, True])) == [(0, 1), (2, 4)]
    assert spans(np.zeros(3, bool)) == []
    turns = [{'input_ids': [1, 2], 'labels': [3]}, {'input_ids': [4], 'labels': [5, 6]}]
    assert turns_of(turns, 7) == (Turn(0, 2, 3), Turn(3, 4, 7))
    assert turns_of(turns, 5) == (Turn(0, 2, 3), Turn(3, 4, 5))
    assert turns_of(turns, 3) == (Turn(0, 2, 3),)


def test_documents_of_rows() -> None:
    assert list(packed('BabTcdTPP', '..xx.xx..', '0000111--').documents()) == [(0, 4), (4, 7)]
    left_padded = row('PPBab', '...xx', real=np.arange(5) > 1)
    assert list(left_padded.documents()) == [(2, 5)]
    assert list(row('PP', '..', real=np.zeros(2, bool)).documents()) == []
