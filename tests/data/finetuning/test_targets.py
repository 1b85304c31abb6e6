"""Stitching turns: nothing lost, nothing added but the EOS, and exactly the wanted tokens trained."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfoundry.data.finetuning.targets import (
    IGNORE_INDEX,
    holds_labels_of_ids,
    prompt_threshold,
    row_from_labels,
    stitch_example,
    stitch_turns,
    truncate,
    validate_target_settings,
)

EOS = 99
LINE_BREAK = 77
IDS = st.lists(st.integers(0, 90), max_size=8)
TURNS = st.lists(st.fixed_dictionaries({'input_ids': IDS, 'labels': IDS}), min_size=1, max_size=5)
PROMPTS = st.sampled_from(['none', 'all', 'length>=1', 'length>=4', 'LENGTH>=2', 'None'])
RESPONSES = st.sampled_from(['last', 'all', 'LAST'])

# Two turns, as the public release stitches them: (target_prompts, target_responses) -> which of the ten tokens are trained.
TWO_TURNS = [{'input_ids': [1, 2, 3], 'labels': [4, 5]}, {'input_ids': [6, 7], 'labels': [8, 9]}]
PEER_MASKS = {
    ('none', 'last'): '.......###',
    ('none', 'all'): '...##..###',
    ('all', 'last'): '###..#####',
    ('all', 'all'): '##########',
    ('length>=3', 'last'): '###....###',
    ('length>=3', 'all'): '#####..###',
    ('length>=03', 'last'): '###....###',
    ('LENGTH>=2', 'LAST'): '###..#####',
}


@pytest.mark.parametrize('settings', PEER_MASKS, ids='-'.join)
def test_masks_of_the_public_release(settings: tuple[str, str]) -> None:
    ids, targets = stitch_turns(TWO_TURNS, *settings, eos_token_id=EOS)
    assert ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, EOS]
    assert ''.join('#' if t else '.' for t in targets) == PEER_MASKS[settings]
    assert ids.dtype == np.int32 and targets.dtype == bool


@given(TURNS, PROMPTS, RESPONSES, st.booleans())
def test_tokens_are_conserved_and_masks_follow_the_rules(turns: list, prompts: str, responses: str, with_eos: bool) -> None:
    ids, targets = stitch_turns(turns, prompts, responses, EOS if with_eos else None)
    expected_ids: list[int] = []
    expected_targets: list[bool] = []
    for i, turn in enumerate(turns):
        threshold = {'none': 10**9, 'all': 0}.get(prompts.lower(), None)
        threshold = int(prompts.split('=')[1]) if threshold is None else threshold
        expected_ids += turn['input_ids'] + turn['labels']
        expected_targets += [len(turn['input_ids']) >= threshold] * len(turn['input_ids'])
        expected_targets += [responses.lower() == 'all' or i == len(turns) - 1] * len(turn['labels'])
    if with_eos:
        expected_ids.append(EOS)
        expected_targets.append(True)
    assert ids.tolist() == expected_ids
    assert targets.tolist() == expected_targets


@pytest.mark.parametrize(
    ('response', 'ends'),
    [([4], [4, EOS]), ([4, EOS], [4, EOS]), ([4, EOS, LINE_BREAK], [4, EOS, LINE_BREAK]), ([4, EOS, 5], [4, EOS, 5, EOS]), ([LINE_BREAK], [LINE_BREAK, EOS]), ([EOS, 4, 5], [EOS, 4, 5, EOS]), ([], [EOS]), ([EOS], [EOS])],
)
def test_eos_is_appended_once(response: list[int], ends: list[int]) -> None:
    for given_response in (response, np.array(response, np.int64)):
        ids, targets = stitch_turns([{'input_ids': [1], 'labels': given_response}], eos_token_id=EOS, line_breaks={LINE_BREAK})
        assert ids.tolist() == [1, *ends]
        assert targets.tolist() == [False, *[True] * len(ends)]


def test_only_the_last_response_gets_an_eos() -> None:
    ids, _ = stitch_turns([{'input_ids': [1], 'labels': [2]}, {'input_ids': [3], 'labels': [4]}], eos_token_id=EOS)
    assert ids.tolist() == [1, 2, 3, 4, EOS]


@given(TURNS, PROMPTS, RESPONSES)
def test_a_stitched_row_comes_back_from_its_labels(turns: list, prompts: str, responses: str) -> None:
    ids, targets = stitch_turns(turns, prompts, responses, EOS)
    labels = np.where(targets, ids, IGNORE_INDEX)
    again, again_targets = row_from_labels(ids.tolist(), labels.tolist())
    assert again.tolist() == ids.tolist() and again_targets.tolist() == targets.tolist()
    if not targets.all():
        turn = {'input_ids': ids.tolist(), 'labels': labels.tolist()}
        assert holds_labels_of_ids(turn)
        assert stitch_example([turn], 'all', 'all', 98)[0].tolist() == ids.tolist(), 'what was decided outside stays'


def test_a_response_as_long_as_its_prompt_is_still_a_response() -> None:
    turn = {'input_ids': [1, 2], 'labels': [1, 2]}
    assert not holds_labels_of_ids(turn)
    assert stitch_example([turn])[0].tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ('ids', 'labels', 'text'),
    [
        ([1, 2, 3], [-100, 3, -100], 'labels[1] is 3, but must be -100 or input_ids[1], which is 2: labels are not shifted, the model does that'),
        ([1, 2, 3], [-100, 2], 'input_ids and labels must be two lists of one length, got the shapes (3,) and (2,)'),
    ],
)
def test_labels_that_do_not_fit(ids: list[int], labels: list[int], text: str) -> None:
    with pytest.raises(ValueError) as e:
        row_from_labels(ids, labels)
    assert str(e.value) == text


@given(TURNS, st.integers(1, 30))
def test_truncation_keeps_the_beginning(turns: list, max_seq_len: int) -> None:
    ids, targets = stitch_turns(turns, eos_token_id=EOS)
    cut, cut_targets = truncate(ids, targets, max_seq_len)
    assert len(cut) == len(cut_targets) == min(len(ids), max_seq_len)
    assert cut.tolist() == ids[:max_seq_len].tolist() and cut_targets.tolist() == targets[:max_seq_len].tolist()


BAD_SETTINGS = [
    ('none', 'first', True, 'target_responses must be "last" or "all", got \'first\''),
    ('some', 'last', True, 'target_prompts must be "none", "all" or "length>=N" where N is a positive integer, got \'some\''),
    ('length>3', 'last', True, 'target_prompts must be "none", "all" or "length>=N" where N is a positive integer, got \'length>3\''),
    ('length>= 3', 'last', True, 'target_prompts starts with "length>=" but \' 3\' after it is not digits (target_prompts=\'length>= 3\'). Write "length>=N" with a positive integer N: prompts of at least N tokens are then trained.'),
    ('length>=', 'last', True, 'target_prompts starts with "length>=" but \'\' after it is not digits (target_prompts=\'length>=\'). Write "length>=N" with a positive integer N: prompts of at least N tokens are then trained.'),
    ('length>=²', 'last', True, 'target_prompts starts with "length>=" but \'²\' after it is not digits (target_prompts=\'length>=²\'). Write "length>=N" with a positive integer N: prompts of at least N tokens are then trained.'),
    ('length>=0', 'last', True, "target_prompts='length>=0': the length must be at least 1. To train every prompt, set target_prompts: all"),
    ('all', 'last', False, 'When using encoder_decoder format, you must use target_prompts="none" and target_responses="last": the encoder reads all but the last response. Got target_prompts=\'all\', target_responses=\'last\''),
    ('none', 'all', False, 'When using encoder_decoder format, you must use target_prompts="none" and target_responses="last": the encoder reads all but the last response. Got target_prompts=\'none\', target_responses=\'all\''),
]


@pytest.mark.parametrize('case', BAD_SETTINGS, ids=lambda c: f'{c[0]}-{c[1]}-{c[2]}')
def test_settings_that_are_refused(case: tuple[str, str, bool, str]) -> None:
    with pytest.raises(ValueError) as e:
        validate_target_settings(*case[:3])
    assert str(e.value) == case[3]


@pytest.mark.parametrize('settings', [('none', 'last', False), ('NONE', 'LAST', False), ('All', 'ALL', True), ('length>=1', 'all', True), ('LENGTH>=10', 'last', True)])
def test_settings_that_are_accepted(settings: tuple[str, str, bool]) -> None:
    validate_target_settings(*settings)


def test_thresholds() -> None:
    assert [prompt_threshold(v) for v in ('none', 'all', 'length>=7')] == [None, 0, 7]
